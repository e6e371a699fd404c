"""The interface of compression methods."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

from recalkv_vllm.checkpoint import AttentionGeometry
from recalkv_vllm.compression.calibration.statistics import Statistics
from recalkv_vllm.compression.errors import InputError
from recalkv_vllm.compression.layer import LayerFactors, LayerInputs
from recalkv_vllm.compression.plan import Budget, ModelPlan
from recalkv_vllm.compression.ranks.decode_time import model_decode_time
from recalkv_vllm.compression.ranks.targets import ANYWHERE, Target

#: What a method measures of a model, for plans to be made of.
Measured = TypeVar("Measured")


@dataclass(frozen=True, slots=True)
class MethodOptions:
    """What the user chose; None is the method's default.

    Args:
        k_group_size: KV heads per K group; divides ``h_kv``.
        v_groups: V groups; divides ``h_kv``.
        rank_allocation: one of the method's :attr:`Method.allocations`.
        spans: one of the method's :attr:`Method.span_kinds`.
        target: device to serve on, and how long decoding may take there.
        allow_head_reordering: groups may be of any heads; else of neighbors, as for quantized
            projections.
    """

    k_group_size: int | None = None
    v_groups: int | None = None
    rank_allocation: str | None = None
    spans: str | None = None
    target: Target = ANYWHERE
    allow_head_reordering: bool = True


class Method(ABC, Generic[Measured]):
    """A way to choose ranks and factors. A new method is one subclass in its own file.

    A method only holds the options: the layers are measured once (:meth:`measure`), a plan is made
    of the measurements for every budget (:meth:`plan`), and a plan says how to factor
    (:meth:`factor`).

    Raises:
        InputError: an option that the method does not know, or groups that do not divide.
    """

    name: ClassVar[str]
    #: Rank allocations and span kinds that the method knows; the first is its default.
    allocations: ClassVar[tuple[str, ...]]
    span_kinds: ClassVar[tuple[str, ...]]
    #: ``o_proj`` is refitted to the dense attention output unless the user says otherwise.
    refits_output: ClassVar[bool] = False
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
        self.allow_head_reordering = options.allow_head_reordering
        self.target = options.target

    @abstractmethod
    def observers(self, compression: float) -> set[str]:
        """Names of the statistics needed (:data:`..calibration.statistics.OBSERVERS`)."""

    @abstractmethod
    def check(self, compression: float) -> None:
        """Raise :class:`InputError`, before any work, for a compression that cannot be reached."""

    @abstractmethod
    def measure(
        self,
        compression: float,
        layers: Sequence[LayerInputs],
        statistics: Statistics | None,
        before: Measured | None = None,
    ) -> Measured:
        """What :meth:`plan` has to know of the layers.

        Args:
            compression: fraction of cached elements to remove, of the first plan to be made.
            layers: what there is to factor.
            statistics: what :meth:`observers` named.
            before: measured of the same layers at another compression; what is the same at this
                one is taken from it. It changes no result.
        """

    @abstractmethod
    def plan(self, measured: Measured, budget: Budget) -> ModelPlan:
        """Head order and widths of all layers; full rank at compression 0."""

    @abstractmethod
    def factor(self, inputs: LayerInputs, plan: ModelPlan) -> LayerFactors:
        """Factor one layer in float64."""

    def settings(self, plan: ModelPlan) -> dict[str, Any]:
        """What to record of a plan in the checkpoint's provenance."""
        return {"k_group_size": plan.k_group_size, "v_groups": plan.v_groups}

    def loss_anywhere(self, measured: Measured, budget: Budget) -> float:
        """Expected loss of a plan without limit of decode time (``--target none``)."""
        method = copy(self)
        method.target = ANYWHERE
        return method.plan(measured, budget).expected_loss

    def decode_time(self, plan: ModelPlan) -> float | None:
        """Predicted for the target, as a fraction of the dense cache's; None without a device."""
        device = self.target.device
        if device is None:
            return None
        return model_decode_time(plan.layouts, plan.latent_format, self.geometry, device)


def divisors(number: int) -> list[int]:
    """Ascending."""
    return [n for n in range(1, number + 1) if number % n == 0]
