"""The scalar quantizer of least squared error for a density (Lloyd 1957, Max 1960)."""

from __future__ import annotations

import functools

import torch

#: Points that the density is sampled at, and most rounds of Lloyd's iteration.
POINTS = 200_001
ROUNDS = 2_000


def lloyd_max(density: torch.Tensor, at: torch.Tensor, bits: int) -> torch.Tensor:
    """Levels for a density given at equally spaced points, ascending: ``[2^bits]`` float64."""
    zero = torch.zeros(1, dtype=torch.float64)
    mass = torch.cat((zero, density.cumsum(0)))
    moment = torch.cat((zero, (density * at).cumsum(0)))
    # Where many levels end up (Panter and Dite 1951): Lloyd's iteration is slow to move them.
    spread = density.pow(1 / 3).cumsum(0)
    quantiles = (torch.arange(2**bits, dtype=torch.float64) + 0.5) / 2**bits
    levels = at[torch.searchsorted(spread / spread[-1], quantiles)]
    for _ in range(ROUNDS):
        edges = torch.searchsorted(at, (levels[1:] + levels[:-1]) / 2)
        edges = torch.cat((torch.zeros(1, dtype=edges.dtype), edges, torch.tensor([len(at)])))
        new = moment[edges].diff() / mass[edges].diff()
        if torch.equal(new, levels):
            break
        levels = new
    return levels


def _gaussian() -> tuple[torch.Tensor, torch.Tensor]:
    at = torch.linspace(-8, 8, POINTS, dtype=torch.float64)
    return (-(at**2) / 2).exp(), at


@functools.cache
def gaussian_levels(bits: int) -> torch.Tensor:
    """Levels for a normal variable of variance 1; with no bits, its mean."""
    return lloyd_max(*_gaussian(), bits)


@functools.cache
def gaussian_distortion(bits: int) -> float:
    """Mean squared error of :func:`gaussian_levels`."""
    density, at = _gaussian()
    error = (at - nearest(at, gaussian_levels(bits))).square()
    return ((density * error).sum() / density.sum()).item()


@functools.cache
def sphere_levels(size: int, bits: int) -> torch.Tensor:
    """Levels for a coordinate of a uniformly drawn unit vector of ``size`` elements, 3 or more."""
    at = torch.linspace(-1, 1, POINTS, dtype=torch.float64)
    return lloyd_max((1 - at**2).clamp_min(0) ** ((size - 3) / 2), at, bits)


def nearest(x: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """The level nearest to each element."""
    levels = levels.to(x)
    return levels[torch.bucketize(x, (levels[1:] + levels[:-1]) / 2)]
