"""How many directions hold the energy of a layer's compressed keys and values.

Energy is a squared singular value of the projection that the factors of a head group multiply to.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from recalkv_vllm.checkpoint import AttentionGeometry, FactorReader, RecalkvConfig
from recalkv_vllm.span import Span

#: Shares of the energy whose directions are counted.
SHARES = (0.9, 0.99, 0.999)


@dataclass(frozen=True, slots=True)
class Spectrum:
    """Of the keys or the values of a layer, all head groups together.

    Args:
        directions: that there are.
        holding: the fewest of them that hold each of :data:`SHARES`.
    """

    directions: int
    holding: tuple[int, ...]


def layer_spectra(
    reader: FactorReader, recalkv: RecalkvConfig, geometry: AttentionGeometry
) -> list[tuple[Spectrum, Spectrum]]:
    """Spectra of keys and of values, for every layer."""
    found = []
    for layer, layout in enumerate(recalkv.layers):
        down, k_up, v_up = (reader.read(layer, n).float() for n in ("down", "k_up", "v_up"))
        heads = geometry.num_kv_heads // len(layout.v_spans)
        values = v_up.reshape(len(layout.v_spans), heads * geometry.head_dim, layout.v_width)
        found.append(
            (_of_groups(k_up, down, layout.k_spans), _of_groups(values, down, layout.v_spans))
        )
    return found


def _of_groups(ups: torch.Tensor, down: torch.Tensor, spans: tuple[Span, ...]) -> Spectrum:
    pairs = zip(ups, spans, strict=True)
    return spectrum(torch.cat([singular_values(up, down[slice(*span)]) for up, span in pairs]))


def singular_values(up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """Of ``up @ down``, without making it.

    Args:
        up: ``[n, w]``.
        down: ``[w, H]``.

    Returns:
        ``[min(n, w, H)]``, descending.
    """
    triangle = torch.linalg.qr(down.T, mode="r").R
    return torch.linalg.svdvals(up @ triangle.T)


def spectrum(values: torch.Tensor) -> Spectrum:
    """Of singular values in any order."""
    energy = values.double().square().sort(descending=True).values.cumsum(0)
    holding = (int((energy < share * energy[-1]).sum()) + 1 for share in SHARES)
    return Spectrum(len(values), tuple(min(n, len(values)) for n in holding))
