"""The rows of the comparison, in the order of its table."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

from recalkv_vllm.checkpoint import AttentionGeometry
from recalkv_vllm.compression.errors import InputError

from .. import accuracy
from .kivi import Kivi
from .kvtc import KvtcLike
from .oscar import Oscar
from .peer import Peer
from .quarot import QuaRot
from .turboquant import TurboQuant
from .vllm_formats import Fp8, Int4PerTokenHead, Int8PerTokenHead
from .vllm_turboquant import PRESETS, VllmTurboQuant

OURS = "ours"
SINGLE = "ours, K groups of 1"
HEALED = "ours, healed"
#: Families that are no peers.
OWN = (OURS, SINGLE, HEALED)


@dataclass(frozen=True, slots=True)
class Row:
    """A way to cache, under one name: a peer, or a checkpoint.

    Args:
        name: of the row.
        family: what is drawn as one line.
        make: the peer, for a geometry.
        checkpoint: what ``recalkv compress`` makes.
        latent_bits: of a code, where the checkpoint's latents are stored as its method's paper does
            (:mod:`.latents`), and not as ``recalkv`` does.
        storage_only: nothing could decode from such a cache token by token.
    """

    name: str
    family: str
    make: Callable[[AttentionGeometry], Peer] | None = None
    checkpoint: accuracy.Row | None = None
    latent_bits: int | None = None
    storage_only: bool = False


def _checkpoint(family: str, row: accuracy.Row) -> Row:
    return Row(row.name, family, checkpoint=row)


def _latents(family: str, method: str) -> list[Row]:
    """A method's latents of two ranks in codes."""
    return [
        Row(
            f"{method}-{c}-int{bits}",
            f"{family}, codes",
            checkpoint=accuracy.Row(method, c),
            latent_bits=bits,
        )
        for c in (0.3, 0.5)
        for bits in (4, 3)
    ]


BANDS = (0.5, 0.75, 0.79, 0.86, 0.9125, 0.94)
PEERS = (
    Row("fp8", "vLLM fp8, int8, int4", Fp8),
    Row("int8_per_token_head", "vLLM fp8, int8, int4", Int8PerTokenHead),
    Row("int4_per_token_head", "vLLM fp8, int8, int4", Int4PerTokenHead),
    *(Row(f"kivi-{bits}", "KIVI", functools.partial(Kivi, bits=bits)) for bits in (4, 2)),
    Row("kivi-2-residual-32", "KIVI", functools.partial(Kivi, bits=2, residual=32)),
    *(Row(f"quarot-{b}", "QuaRot", functools.partial(QuaRot, bits=b)) for b in (4, 3, 2)),
    *(
        Row(f"turboquant-{name}", "TurboQuant", functools.partial(TurboQuant, **options))
        for name, options in (
            ("3.5", {"bits": 3, "outliers": 0.5}),
            ("2.5", {"bits": 2, "outliers": 0.5}),
            ("2.25", {"bits": 2, "outliers": 0.25}),
        )
    ),
    *(
        Row(name, "vLLM TurboQuant", functools.partial(VllmTurboQuant, preset=name))
        for name in PRESETS
    ),
    Row("oscar-64-256", "OSCAR", Oscar),
    Row("oscar-4-32", "OSCAR", functools.partial(Oscar, sink=4, recent=32)),
    *(
        Row(f"kvtc-like-{b}", "KVTC-like", functools.partial(KvtcLike, bits=b), storage_only=True)
        for b in (3, 2, 1)
    ),
    *(_checkpoint("Palu", accuracy.Row("palu", c)) for c in accuracy.COMPRESSIONS),
    *_latents("Palu", "palu"),
    *(_checkpoint("ReCalKV", accuracy.Row("recalkv", c)) for c in accuracy.COMPRESSIONS),
    *_latents("ReCalKV", "recalkv"),
)
ROWS = {
    row.name: row
    for row in (
        *PEERS,
        *(_checkpoint(OURS, accuracy.Row("kfac", c, "bands")) for c in BANDS),
        *(
            _checkpoint(SINGLE, accuracy.Row("kfac", c, "bands", k_group_size=1))
            for c in (0.75, 0.86)
        ),
        *(_checkpoint(HEALED, accuracy.Row("kfac", c, "bands", heal=True)) for c in BANDS[1:]),
    )
}


def choose(names: list[str] | None, heal: bool) -> list[Row]:
    """Rows by name, all without names; healed ones then only with ``heal``.

    Raises:
        InputError: a name that no row has.
    """
    if names is None:
        return [row for row in ROWS.values() if heal or row.family != HEALED]
    for name in names:
        if name not in ROWS:
            raise InputError(f"--rows {name}: unknown; expected one of {', '.join(ROWS)}")
    return [row for row in ROWS.values() if row.name in names]
