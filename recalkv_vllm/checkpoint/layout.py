"""What one layer caches per token, and who reads which part of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from recalkv_vllm.band_format import Band, BandFormat
from recalkv_vllm.checkpoint.errors import CheckpointError, brief, check_keys, is_int, require
from recalkv_vllm.checkpoint.geometry import AttentionGeometry
from recalkv_vllm.span import Span

#: Latent spans start and end at multiples of this many elements.
SPAN_MULTIPLE = 16


@dataclass(frozen=True, slots=True)
class LatentLayout:
    """What one layer caches per token, and which part of it each head group reads.

    Args:
        rank: elements cached per token.
        k_group_size: KV heads per K group (``s``).
        k_spans: ``[start, end)`` in the latent, one per K group; all equally wide.
        v_spans: the same, one per V group.
        head_order: ``head_order[i]`` is the base model's index of KV head ``i`` here.
        bands: how the latent is stored (:mod:`recalkv_vllm.band_format`), the same in all K spans
            and in all V spans; None where all layers' latents are stored alike.
    """

    rank: int
    k_group_size: int
    k_spans: tuple[Span, ...]
    v_spans: tuple[Span, ...]
    head_order: tuple[int, ...]
    bands: tuple[Band, ...] | None = None

    def __post_init__(self) -> None:
        # Plain pairs will do, as JSON has them.
        for name in ("k_spans", "v_spans"):
            spans = tuple(Span(*span) for span in getattr(self, name))
            object.__setattr__(self, name, spans)
        if self.bands is not None:
            object.__setattr__(self, "bands", tuple(Band(*band) for band in self.bands))

    @property
    def k_width(self) -> int:
        return self.k_spans[0].width

    @property
    def v_width(self) -> int:
        return self.v_spans[0].width

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], where: str) -> LatentLayout:
        optional = {"bands": None}
        check_keys(cls, {**optional, **raw} if isinstance(raw, Mapping) else raw, where)
        require(
            is_int(raw["rank"]), f"{where}.rank: expected an integer, found {brief(raw['rank'])}"
        )
        require(
            is_int(raw["k_group_size"]),
            f"{where}.k_group_size: expected an integer, found {brief(raw['k_group_size'])}",
        )
        for name in ("k_spans", "v_spans"):
            spans = raw[name]
            require(
                _are_pairs(spans),
                f"{where}.{name}: expected a list of [start, end], found {brief(spans)}",
            )
        order = raw["head_order"]
        require(
            isinstance(order, list) and all(map(is_int, order)),
            f"{where}.head_order: expected a list of integers, found {brief(order)}",
        )
        bands = raw.get("bands")
        require(
            bands is None or _are_pairs(bands),
            f"{where}.bands: expected a list of [columns, bits], found {brief(bands)}",
        )
        return cls(
            rank=raw["rank"],
            k_group_size=raw["k_group_size"],
            k_spans=raw["k_spans"],
            v_spans=raw["v_spans"],
            head_order=tuple(order),
            bands=bands,
        )

    def to_dict(self) -> dict[str, Any]:
        """The JSON form; :meth:`from_dict` reads it back."""
        raw = asdict(self)
        if self.bands is None:
            del raw["bands"]
        return raw

    def validate(self, geometry: AttentionGeometry, where: str) -> None:
        """Raise :class:`CheckpointError` unless the layout fits ``geometry``."""
        heads = geometry.num_kv_heads
        require(
            self.rank > 0 and self.rank % SPAN_MULTIPLE == 0,
            f"{where}.rank: expected a positive multiple of {SPAN_MULTIPLE}, found {self.rank}",
        )
        require(
            self.k_group_size > 0 and heads % self.k_group_size == 0,
            f"{where}.k_group_size: expected a divisor of {heads} KV heads, "
            f"found {self.k_group_size}",
        )
        require(
            len(self.k_spans) == heads // self.k_group_size,
            f"{where}.k_spans: expected {heads // self.k_group_size} spans "
            f"({heads} KV heads in groups of {self.k_group_size}), found {len(self.k_spans)}",
        )
        require(
            heads % len(self.v_spans) == 0,
            f"{where}.v_spans: expected a number of spans that divides {heads} KV heads, "
            f"found {len(self.v_spans)}",
        )
        for name, spans in (("k_spans", self.k_spans), ("v_spans", self.v_spans)):
            width = spans[0].width
            for span in spans:
                start, end = span
                require(
                    0 <= start < end <= self.rank
                    and start % SPAN_MULTIPLE == 0
                    and end % SPAN_MULTIPLE == 0,
                    f"{where}.{name}: expected spans inside [0, {self.rank}] at multiples of "
                    f"{SPAN_MULTIPLE}, found [{start}, {end}]",
                )
                require(
                    span.width == width,
                    f"{where}.{name}: expected spans of one width ({width}), found {span.width}",
                )
        require(
            sorted(self.head_order) == list(range(heads)),
            f"{where}.head_order: expected a permutation of 0..{heads - 1}, "
            f"found {list(self.head_order)}",
        )

        if self.bands is not None:
            self._validate_bands(self.bands, where)

    def _validate_bands(self, bands: tuple[Band, ...], where: str) -> None:
        try:
            latent_format = BandFormat(bands)
            found = [{latent_format.within(s) for s in spans} for spans in self.all_spans]
        except ValueError as error:
            raise CheckpointError(f"{where}.{error}") from error
        require(
            latent_format.rank == self.rank,
            f"{where}.bands: expected {self.rank} columns, as rank, found {latent_format.rank}",
        )
        require(
            all(len(different) == 1 for different in found),
            f"{where}.bands: expected the same in all k_spans and in all v_spans, found others",
        )

    @property
    def all_spans(self) -> tuple[tuple[Span, ...], tuple[Span, ...]]:
        """K spans and V spans."""
        return self.k_spans, self.v_spans

    def reconstruct_flop(self, geometry: AttentionGeometry) -> int:
        """FLOP to rebuild all keys of one cached token: ``2 · w_k · s · d`` per K group."""
        return 2 * self.k_width * geometry.num_kv_heads * geometry.head_dim

    def factor_shapes(self, geometry: AttentionGeometry) -> dict[str, tuple[int, ...]]:
        """Shapes of the layer's factors, by short name."""
        return {
            "down": (self.rank, geometry.hidden_size),
            "k_up": (len(self.k_spans), self.k_group_size * geometry.head_dim, self.k_width),
            "v_up": (geometry.num_kv_heads, geometry.head_dim, self.v_width),
        }


def _are_pairs(value: Any) -> bool:
    """Whether JSON's value is a list, not empty, of pairs of integers."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(v, list) and len(v) == 2 and all(map(is_int, v)) for v in value)
    )
