"""Kronecker factors of the Fisher information of a layer's key and value projections.

For stacked projections ``W = [W_k; W_v]`` with input ``x`` and loss gradient ``g`` at their output
(before RoPE), a change ``ΔW`` raises the loss per token, to second order, by half of

    E[(gᵀ ΔW x)²]  ≈  tr(G ΔW A ΔWᵀ),   A: [H, H],  G: [n, n],  n = 2 · h_kv · d.

``A`` and ``G`` are the maximum-likelihood factors of the flip-flop iteration (Dutilleul 1999)

    A = E[x xᵀ · gᵀ G⁻¹ g] / n,    G = E[g gᵀ · xᵀ A⁻¹ x] / H.

Plain second moments (K-FAC, arXiv 1503.05671) fit far worse where a few tokens, attention sinks,
have inputs and gradients hundreds of times larger than any other's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch.utils.hooks import RemovableHandle

from recalkv_vllm.checkpoint import AttentionGeometry
from recalkv_vllm.compression.base_model.attention import Attention
from recalkv_vllm.compression.calibration.first_rows import Rows
from recalkv_vllm.compression.calibration.observers import Observer
from recalkv_vllm.compression.calibration.projection_trace import ProjectionTrace
from recalkv_vllm.compression.errors import InputError
from recalkv_vllm.compression.lowrank.linalg import GRADIENT_DAMPING, damped

ROUNDS = 3
#: The pilot holds this many times as many tokens as the larger factor has rows.
PILOT_TOKENS = 4
#: Samples of the second round, as a multiple of the pilot's.
SECOND_ROUND = 3


def flip_flop(
    inputs: torch.Tensor, gradients: torch.Tensor, rounds: int = ROUNDS
) -> tuple[torch.Tensor, torch.Tensor]:
    """Kronecker factors from tokens held in memory.

    Args:
        inputs: ``x: [tokens, H]``.
        gradients: ``g: [tokens, n]``.
        rounds: of the iteration, which starts at the plain second moment of ``g``.

    Returns:
        ``A: [H, H]`` and ``G: [n, n]``, float64.
    """
    x, g = inputs.float(), gradients.float()
    outer_g = (g.T @ g).double() / len(g)
    for _ in range(rounds):
        outer_x = weighted_outer(x, token_weights(g, inverse_gradient(outer_g))) / len(x)
        outer_g = weighted_outer(g, token_weights(x, inverse_input(outer_x))) / len(x)
    return outer_x, outer_g


def inverse_input(outer: torch.Tensor) -> torch.Tensor:
    """``A⁻¹ / H``, damped, float32."""
    return (torch.linalg.inv(damped(outer)) / len(outer)).float()


def inverse_gradient(outer: torch.Tensor) -> torch.Tensor:
    """``G⁻¹ / n``, damped, float32."""
    return (torch.linalg.inv(damped(outer, GRADIENT_DAMPING)) / len(outer)).float()


def token_weights(rows: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """``rowᵀ M row`` of every row: ``[tokens]``."""
    return ((rows @ inverse) * rows).sum(dim=1)


def weighted_outer(rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """``Σ w · row rowᵀ``, float64."""
    return ((rows * weights.unsqueeze(1)).T @ rows).double()


class KroneckerFactors(Observer):
    """Sums of the flip-flop iteration's terms over all samples.

    Weighting a token takes factors from before. They come from a pilot, the first few samples held
    in memory, and one round over a few more samples: weights from as few tokens as a pilot's are
    far too large for tokens unlike those. The pass over all samples is the last round.
    """

    needs_gradient = True
    SUMS = ("kronecker_input", "kronecker_gradient", "kronecker_weight")

    def __init__(self) -> None:
        self._trace = ProjectionTrace()
        self._inverses: list[tuple[torch.Tensor, torch.Tensor]] = []

    def shapes(self, geometry: AttentionGeometry) -> dict[str, tuple[int, ...]]:
        layers, hidden, width = geometry.num_layers, geometry.hidden_size, geometry.dense_width
        shapes = (layers, hidden, hidden), (layers, width, width), (layers,)
        return dict(zip(self.SUMS, shapes, strict=True))

    def samples_to_prepare(self, samples: torch.Tensor, sums: Mapping[str, torch.Tensor]) -> int:
        return sum(map(len, _first_rounds(samples, _least_tokens(sums))))

    def prepare(
        self,
        samples: torch.Tensor,
        sums: Mapping[str, torch.Tensor],
        rows_of: Callable[[int], Rows],
    ) -> None:
        """Find the weights of tokens from the first few of ``samples: [samples, seq_len]``.

        Raises:
            InputError: inputs or gradients that are not finite or all zero, or too few tokens.
        """
        need = _least_tokens(sums)
        if samples.numel() < need:
            raise InputError(
                f"calibration text: {samples.numel()} tokens are too few; expected at least {need} "
                "to estimate the metric of a layer (give more text or --num-samples)"
            )
        pilot, second = _first_rounds(samples, need)
        self._inverses = self._pilot([rows_of(index) for index in range(len(pilot))])
        if len(second):
            partial_sums = {name: torch.zeros_like(sums[name]) for name in self.SUMS}
            for index in range(len(pilot), len(pilot) + len(second)):
                self.add_rows(rows_of(index), partial_sums)
            sums_of_layers = zip(*partial_sums.values(), strict=True)
            for layer, (outer_x, outer_g, weight) in enumerate(sums_of_layers):
                outer_x, outer_g = mean_factors(outer_x, outer_g, weight, second.numel())
                # Sums are kept in memory, a layer's rows where the layer is.
                device = self._inverses[layer][0].device
                inverses = inverse_input(outer_x), inverse_gradient(outer_g)
                self._inverses[layer] = (inverses[0].to(device), inverses[1].to(device))

    def _pilot(self, samples: Sequence[Rows]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        inverses = []
        for layer, parts in enumerate(zip(*samples, strict=True)):
            x, g = (torch.cat(rows) for rows in zip(*parts, strict=True))
            for what, rows in (("inputs", x), ("gradients", g)):
                if not rows.isfinite().all():
                    raise InputError(
                        f"calibration: {what} of layer {layer} are not finite; the model overflows "
                        "in this precision (try --device cpu or another --dtype)"
                    )
                if not rows.any():
                    raise InputError(
                        f"calibration: {what} of layer {layer} are all zero; the loss does not "
                        "depend on it, so nothing can be measured (try --method recalkv)"
                    )
            outer_x, outer_g = flip_flop(x, g)
            inverses.append((inverse_input(outer_x), inverse_gradient(outer_g)))
        return inverses

    def attach(
        self, attention: Sequence[Attention], sums: Mapping[str, torch.Tensor]
    ) -> list[RemovableHandle]:
        return self._trace.attach(attention, sums)

    def after_backward(
        self, attention: Sequence[Attention], sums: Mapping[str, torch.Tensor]
    ) -> None:
        self.add_rows(self._trace.take(), sums)

    def add_rows(self, rows: Rows, sums: Mapping[str, torch.Tensor]) -> None:
        for layer, (x, g) in enumerate(rows):
            x, g = x.float(), g.float()
            inverse_x, inverse_g = self._inverses[layer]
            by_gradient, by_input = token_weights(g, inverse_g), token_weights(x, inverse_x)
            outer_x, outer_g = weighted_outer(x, by_gradient), weighted_outer(g, by_input)
            sums["kronecker_input"][layer] += outer_x.to(sums["kronecker_input"])
            sums["kronecker_gradient"][layer] += outer_g.to(sums["kronecker_gradient"])
            sums["kronecker_weight"][layer] += (by_gradient @ by_input).to(sums["kronecker_weight"])


def _least_tokens(sums: Mapping[str, torch.Tensor]) -> int:
    """Rows of the larger factor: fewer tokens leave it singular."""
    return max(sums["kronecker_input"].shape[1], sums["kronecker_gradient"].shape[1])


def _first_rounds(samples: torch.Tensor, least_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Samples of the pilot and of the second round; there is none of too few samples."""
    count = -(-PILOT_TOKENS * least_tokens // samples.shape[1])
    end = (1 + SECOND_ROUND) * count
    return samples[:count], samples[count : end if len(samples) >= end else count]


def mean_factors(
    outer_x: torch.Tensor, outer_g: torch.Tensor, weight: torch.Tensor, tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """``A`` and ``G`` of one layer from its sums, float64.

    Both sums grow with the weights, whose own scale is off by the mean of
    ``xᵀA⁻¹x · gᵀG⁻¹g / (H n)`` (1 for the factors of these very tokens); one must lose it.

    Args:
        outer_x: ``Σ x xᵀ · gᵀG⁻¹g / n``.
        outer_g: ``Σ g gᵀ · xᵀA⁻¹x / H``.
        weight: ``Σ xᵀA⁻¹x · gᵀG⁻¹g / (H n)``, a scalar.
        tokens: that the sums are over.
    """
    return outer_x.double() / weight, outer_g.double() / tokens
