"""The interface of compression methods."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from recalkv_vllm.checkpoint import AttentionGeometry
from recalkv_vllm.compression.errors import InputError
from recalkv_vllm.compression.factors import LayerFactors, LayerInputs
from recalkv_vllm.compression.ranks import LayerPlan
from recalkv_vllm.compression.statistics import Statistics


@dataclass(frozen=True, slots=True)
class MethodOptions:
    """What the user chose; None is the method's default.

    Args:
        k_group_size: KV heads per K group; divides ``h_kv``.
        v_groups: V groups; divides ``h_kv``.
        rank_allocation: one of the method's :attr:`Method.allocations`.
        spans: one of the method's :attr:`Method.span_kinds`.
        flop_per_byte: most reconstruction FLOP per cached byte of any layer.
        heads_move: groups may be of any heads; else of neighbours, as for quantised projections.
    """

    k_group_size: int | None = None
    v_groups: int | None = None
    rank_allocation: str | None = None
    spans: str | None = None
    flop_per_byte: float = float("inf")
    heads_move: bool = True


class Method(ABC):
    """A way to choose ranks and factors. A new method is one subclass in its own file.

    Raises:
        InputError: an option that the method does not know, or groups that do not divide.
    """

    name: ClassVar[str]
    #: Rank allocations and span kinds that the method knows; the first is its default.
    allocations: ClassVar[tuple[str, ...]]
    span_kinds: ClassVar[tuple[str, ...]]
    #: ``o_proj`` is refitted to the dense attention output unless the user says otherwise.
    refits_output: ClassVar[bool] = False
    #: Of the last plan, per token in nats; not a number for methods that do not know it.
    expected_loss: float = math.nan
    #: Whether plans say what they are expected to lose.
    knows_loss: ClassVar[bool] = False

    def __init__(self, geometry: AttentionGeometry, options: MethodOptions):
        self.geometry = geometry
        for flag, value, known in (
            ("--rank-allocation", options.rank_allocation, self.allocations),
            ("--spans", options.spans, self.span_kinds),
        ):
            if value is not None and value not in known:
                raise InputError(
                    f"{flag} {value}: not known to method {self.name}; "
                    f"expected {' or '.join(known)}"
                )
        heads = geometry.num_kv_heads
        for flag, number in (
            ("--k-group-size", options.k_group_size),
            ("--v-groups", options.v_groups),
        ):
            if number is not None and (number < 1 or heads % number):
                raise InputError(
                    f"{flag} {number}: does not divide the model's {heads} KV heads; "
                    f"expected one of {', '.join(map(str, divisors(heads)))}"
                )
        self.rank_allocation = options.rank_allocation or self.allocations[0]
        self.spans = options.spans or self.span_kinds[0]
        self.heads_move = options.heads_move

    @abstractmethod
    def observers(self, compression: float) -> set[str]:
        """Names of the statistics needed (:data:`..statistics.OBSERVERS`)."""

    @abstractmethod
    def check(self, compression: float) -> None:
        """Raise :class:`InputError`, before any work, for a compression that cannot be reached."""

    @abstractmethod
    def plan(
        self,
        compression: float,
        layers: Sequence[LayerInputs],
        statistics: Statistics | None,
        latent_error: float = 0.0,
    ) -> list[LayerPlan]:
        """Head order and widths of all layers; full rank at compression 0.

        Args:
            compression: fraction of cached numbers to remove.
            layers: what there is to factor.
            statistics: what :meth:`observers` named.
            latent_error: relative error of stored latents, for methods that weigh it.
        """

    @abstractmethod
    def factor(self, inputs: LayerInputs, plan: LayerPlan) -> LayerFactors:
        """Factor one layer in float64."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What to record of a finished plan: ``k_group_size``, ``v_groups`` and more."""


def divisors(number: int) -> list[int]:
    """Ascending."""
    return [n for n in range(1, number + 1) if number % n == 0]
