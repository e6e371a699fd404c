"""The one test matrix of the attention op: every fast version runs through all of it.

A case is a frozen set of parameters; :func:`build` turns it into tensors whose unused memory is
poisoned with NaN. ``tests/ops/checks.py`` holds the oracle and the tolerance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch

from recalkv_vllm.band_format import BandFormat, CacheFormat, slot_width
from recalkv_vllm.latent_format import BITS, LatentFormat
from recalkv_vllm.ops import Batch, LatentLayer, bind, reference
from recalkv_vllm.span import Span

BLOCK = 16
MAX_POSITION = 1024


def split_spans(groups: int, width: int, start: int = 0) -> tuple[Span, ...]:
    """``groups`` disjoint spans of ``width`` from ``start`` on."""
    return tuple(Span(start + g * width, start + (g + 1) * width) for g in range(groups))


@dataclass(frozen=True, slots=True)
class AttentionCase:
    """Parameters of one attention call.

    Args:
        batch: ``(queries, cached tokens)`` of each sequence; ``(0 or 1, 0)`` is padding.
        rot_dim: rotated columns of a head; 0 is no RoPE at all.
        cache: ``dense`` is contiguous, ``blocks`` leaves gaps between blocks, ``tokens`` also
            between tokens, as views of a storage that several layers share do.
        latent_format: how the cache is quantized; ``tokens`` is then not possible.
        padding_rows: rows of ``q`` that belong to no sequence.
    """

    name: str
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    k_group_size: int = 1
    rank: int = 128
    k_spans: tuple[Span, ...] = split_spans(2, 32)
    v_spans: tuple[Span, ...] = split_spans(2, 32, 64)
    block_size: int = BLOCK
    batch: tuple[tuple[int, int], ...] = ((1, 37),)
    rot_dim: int | None = None
    is_neox: bool = True
    cos_sin_dtype: torch.dtype = torch.float32
    key_bias: bool = False
    key_norm: bool | Literal["all heads"] = False
    sliding_window: int | None = None
    soft_cap: float | None = None
    sinks: bool = False
    cache: Literal["dense", "blocks", "tokens"] = "dense"
    latent_format: CacheFormat | None = None
    padding_rows: int = 0

    @property
    def key_scales(self) -> int:
        """Of a cached token."""
        return {False: 0, True: self.num_kv_heads}.get(self.key_norm, 1)

    def __str__(self) -> str:
        return self.name


def spanned(
    name: str,
    heads: tuple[int, int, int],
    k_group_size: int,
    k_width: int,
    v_groups: int,
    v_width: int,
    overlap: int = 0,
    **rest: Any,
) -> AttentionCase:
    """A case with ``heads = (h_q, h_kv, d)`` whose K and V spans share ``overlap`` columns.

    All K spans lie side by side, then all V spans; ``overlap`` pulls the V spans back.
    """
    num_kv_heads = heads[1]
    k_spans = split_spans(num_kv_heads // k_group_size, k_width)
    v_start = k_spans[-1].end - overlap
    v_spans = split_spans(v_groups, v_width, v_start)
    return AttentionCase(
        name,
        *heads,
        k_group_size=k_group_size,
        rank=max(k_spans[-1].end, v_spans[-1].end),
        k_spans=k_spans,
        v_spans=v_spans,
        **rest,
    )


def joint(
    name: str, heads: tuple[int, int, int], k_group_size: int, width: int, **rest: Any
) -> AttentionCase:
    """A case whose K group ``g`` and V group ``g`` read the same span."""
    case = spanned(name, heads, k_group_size, width, heads[1] // k_group_size, width, **rest)
    return replace(case, rank=case.k_spans[-1].end, v_spans=case.k_spans)


def quantized(
    cases: Sequence[AttentionCase], dtype: str, group_size: int
) -> tuple[AttentionCase, ...]:
    """The cases on a cache of quantized latents."""
    latent_format = LatentFormat(dtype, group_size)
    return tuple(
        replace(case, name=f"{case.name}-{dtype}-{group_size}", latent_format=latent_format)
        for case in cases
    )


DECODE_LENGTHS = tuple((1, n) for n in (0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 77))
MIXED = ((1, 45), (3, 50), (0, 0), (20, 20), (13, 47), (1, 1))
#: Of cases with all that a layer may have.
EVERY_OPTION: dict[str, Any] = {
    "batch": (*MIXED, (25, 90)),
    "block_size": 32,
    "rot_dim": 48,
    "is_neox": False,
    "key_bias": True,
    "key_norm": True,
    "sliding_window": 40,
    "soft_cap": 5.0,
    "sinks": True,
    "padding_rows": 2,
}

CASES: tuple[AttentionCase, ...] = (
    # Lengths and batches.
    spanned("decode-lengths", (4, 2, 64), 1, 32, 2, 32, batch=DECODE_LENGTHS),
    spanned("decode-long", (4, 2, 64), 1, 32, 2, 32, batch=((1, 700),)),
    spanned("prefill", (4, 2, 64), 1, 32, 2, 32, batch=((70, 70),)),
    spanned("chunk-after-context", (4, 2, 64), 1, 32, 2, 32, batch=((33, 150),)),
    spanned("speculative", (4, 2, 64), 1, 32, 2, 32, batch=((4, 61), (4, 4), (3, 33))),
    spanned("mixed", (4, 2, 64), 1, 32, 2, 32, batch=MIXED, padding_rows=3),
    spanned("block-32", (4, 2, 64), 1, 32, 2, 32, batch=MIXED, block_size=32),
    spanned("block-528", (4, 2, 64), 1, 32, 2, 32, batch=((1, 600), (5, 127)), block_size=528),
    spanned("block-128", (4, 2, 64), 1, 32, 2, 32, batch=((1, 129), (5, 127)), block_size=128),
    spanned("block-48", (4, 2, 64), 1, 32, 2, 32, batch=((1, 97), (9, 49)), block_size=48),
    # Cache strides.
    spanned("strided-blocks", (4, 2, 64), 1, 32, 2, 32, batch=MIXED, cache="blocks"),
    spanned("strided-tokens", (4, 2, 64), 1, 32, 2, 32, batch=MIXED, cache="tokens"),
    # Heads per KV head, group sizes, head sizes, ranks.
    spanned("mha-d32-r16", (2, 2, 32), 1, 16, 2, 16, batch=MIXED),
    spanned("gqa3-smollm2", (9, 3, 64), 3, 96, 1, 96, batch=MIXED),
    spanned("gqa4-d128", (8, 2, 128), 1, 64, 2, 64, batch=MIXED),
    spanned("gqa7-d128-bias", (14, 2, 128), 2, 128, 1, 80, batch=MIXED, key_bias=True),
    spanned("gqa8-d128", (8, 1, 128), 1, 48, 1, 112, batch=MIXED),
    spanned("mqa-d256", (4, 1, 256), 1, 128, 1, 64, batch=((1, 40), (6, 30))),
    spanned("d80", (4, 4, 80), 2, 48, 4, 32, batch=MIXED),
    spanned("d96-two-v-groups", (4, 4, 96), 4, 112, 2, 48, batch=MIXED),
    spanned("d112-one-v-group", (4, 4, 112), 1, 16, 1, 144, batch=MIXED),
    spanned("one-v-group-many-k", (8, 8, 32), 1, 16, 1, 128, batch=MIXED),
    spanned("full-rank", (4, 2, 64), 2, 128, 1, 128, batch=MIXED),
    spanned("rank-1024", (4, 2, 64), 2, 512, 1, 512, batch=((1, 33), (5, 19))),
    # Spans that are not disjoint.
    joint("joint-per-head", (4, 2, 64), 1, 64, batch=MIXED),
    joint("joint-all-heads", (9, 3, 64), 3, 192, batch=MIXED),
    spanned("overlapping", (4, 2, 64), 2, 96, 1, 112, overlap=64, batch=MIXED),
    AttentionCase(
        "k-inside-v",
        rank=96,
        k_spans=(Span(0, 32), Span(0, 32)),
        v_spans=(Span(0, 96),),
        batch=MIXED,
    ),
    AttentionCase(
        "unsorted-spans-with-gap",
        rank=160,
        k_spans=(Span(96, 128), Span(16, 48)),
        v_spans=(Span(128, 160), Span(48, 80)),
        batch=MIXED,
    ),
    # What models add.
    spanned("no-rope", (4, 2, 64), 1, 32, 2, 32, batch=MIXED, rot_dim=0),
    spanned("partial-rope", (4, 2, 64), 1, 32, 2, 32, batch=MIXED, rot_dim=32),
    spanned("partial-rope-odd", (4, 2, 80), 1, 32, 2, 32, batch=MIXED, rot_dim=20),
    spanned("interleaved", (4, 2, 64), 1, 32, 2, 32, batch=MIXED, is_neox=False),
    spanned(
        "interleaved-partial", (4, 2, 96), 2, 64, 1, 48, batch=MIXED, is_neox=False, rot_dim=24
    ),
    spanned(
        "low-precision-table", (4, 2, 64), 1, 32, 2, 32, batch=MIXED, cos_sin_dtype=torch.bfloat16
    ),
    spanned("key-norm", (8, 2, 128), 1, 64, 2, 64, batch=MIXED, key_norm=True),
    spanned("bias-and-norm", (4, 2, 64), 2, 64, 2, 32, batch=MIXED, key_bias=True, key_norm=True),
    spanned("norm-of-all", (9, 3, 64), 1, 32, 3, 32, batch=MIXED, key_norm="all heads"),
    joint(
        "norm-of-all-grouped",
        (4, 4, 64),
        2,
        96,
        batch=MIXED,
        key_bias=True,
        key_norm="all heads",
        is_neox=False,
        cache="blocks",
    ),
    spanned("window", (4, 2, 64), 1, 32, 2, 32, batch=(*MIXED, (40, 120)), sliding_window=24),
    spanned("window-1", (4, 2, 64), 1, 32, 2, 32, batch=MIXED, sliding_window=1),
    spanned("soft-cap", (4, 2, 64), 1, 32, 2, 32, batch=MIXED, soft_cap=3.0),
    spanned("sinks", (9, 3, 64), 1, 32, 3, 32, batch=MIXED, sinks=True, padding_rows=2),
    spanned(
        "everything",
        (6, 2, 64),
        2,
        64,
        1,
        48,
        overlap=16,
        cache="blocks",
        **EVERY_OPTION,
    ),
)


#: Spans at odd multiples of 16, so that they start and end inside groups of 32 and 64 elements.
ODD_SPANS = (
    spanned("odd-split", (4, 2, 64), 1, 48, 2, 16, batch=DECODE_LENGTHS),
    joint("odd-joint", (9, 3, 64), 3, 176, batch=MIXED, padding_rows=2),
    spanned("odd-overlapping", (4, 2, 64), 2, 80, 1, 112, overlap=48, batch=MIXED, cache="blocks"),
    AttentionCase(
        "odd-with-gaps",
        rank=208,
        k_spans=(Span(112, 160), Span(16, 64)),
        v_spans=(Span(176, 208), Span(80, 112)),
        batch=MIXED,
        block_size=48,
        key_norm=True,
    ),
)

QUANTIZED_CASES: tuple[AttentionCase, ...] = tuple(
    case
    for dtype in BITS
    for i, group_size in enumerate((0, 16, 32, 64))
    for case in quantized((ODD_SPANS[i], ODD_SPANS[i - 1]), dtype, group_size)
)


@dataclass(frozen=True, slots=True)
class AttentionInputs:
    """One call: a layer, and the arguments of its ``attend``."""

    layer: LatentLayer
    q: torch.Tensor
    kv_cache: torch.Tensor
    batch: Batch

    @property
    def call(self) -> tuple[torch.Tensor, torch.Tensor, Batch]:
        """What changes from call to call."""
        return self.q, self.kv_cache, self.batch

    def change(self, **changes: Any) -> AttentionInputs:
        """With other tensors or constants, by the names that layer, batch and call give them."""
        parts: dict[str, Any] = {}
        for part in (self.layer, self.batch, self):
            names = {f.name for f in fields(part)} & changes.keys()
            parts[type(part).__name__] = replace(part, **{n: changes.pop(n) for n in names})
        assert not changes, f"no such argument: {', '.join(changes)}"
        return replace(parts["AttentionInputs"], layer=parts["LatentLayer"], batch=parts["Batch"])


def attend(inputs: AttentionInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Bind and call at once."""
    return bind(inputs.layer).attend(*inputs.call)


def attend_in_torch(
    inputs: AttentionInputs, compute_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """The reference in any precision."""
    return reference.paged_latent_attention(inputs.layer, *inputs.call, compute_dtype=compute_dtype)


def value_layer(
    v_up: torch.Tensor,
    v_bias: torch.Tensor | None = None,
    latent_format: CacheFormat | None = None,
) -> LatentLayer:
    """A layer for the sake of its values or its cache; its keys are as wide as its values.

    Args:
        v_up: ``[h_kv, d, v_width]``.
        v_bias: ``[h_kv, d]``.
    """
    heads, head_dim, width = v_up.shape
    return LatentLayer(
        k_up=torch.zeros_like(v_up),
        v_up=v_up,
        k_spans=split_spans(heads, width),
        v_spans=split_spans(1, width),
        head_dim=head_dim,
        scale=1.0,
        v_bias=v_bias,
        latent_format=latent_format,
    )


def caching_layer(
    latent_format: CacheFormat | None = None, device: torch.device | str = "cpu"
) -> LatentLayer:
    """A layer that writes latents of any dtype, and of any rank that the format has."""
    width = latent_format.rank if isinstance(latent_format, BandFormat) else 16
    return value_layer(torch.zeros(1, 16, width, device=device), latent_format=latent_format)


def paged_cache(
    case: AttentionCase, num_blocks: int, dtype: torch.dtype, device: torch.device | str
) -> torch.Tensor:
    """An all-NaN cache ``[num_blocks, block_size, slot width]`` with the case's strides.

    Quantized, all its bytes are 0xFF, which makes scales NaN.
    """
    block_size = case.block_size
    width = slot_width(case.latent_format, case.rank, dtype, case.key_scales)
    poison: float = torch.nan
    if case.latent_format is not None:
        dtype, poison = torch.uint8, 0xFF
    if case.cache == "dense":
        shape: tuple[int, ...] = (num_blocks, block_size, width)
    elif case.cache == "blocks":
        shape = (num_blocks, 3, block_size, width)
    else:
        shape = (num_blocks, block_size, 2, width + 32)
    storage = torch.full(shape, poison, dtype=dtype, device=device)
    if case.cache == "dense":
        return storage
    return storage[:, 1] if case.cache == "blocks" else storage[:, :, 1, 16 : 16 + width]


def rope_table(rot_dim: int, dtype: torch.dtype) -> torch.Tensor:
    """``[MAX_POSITION, rot_dim]`` cosines then sines, vLLM's layout."""
    frequency = 10000.0 ** (-torch.arange(0, rot_dim, 2).double() / rot_dim)
    angle = torch.arange(MAX_POSITION).double()[:, None] * frequency
    return torch.cat((angle.cos(), angle.sin()), dim=-1).to(dtype)


def build(
    case: AttentionCase,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> AttentionInputs:
    """Random inputs of a case; slots that no sequence owns and padding rows of q are NaN.

    Factors, bias and norm weight have the cache's dtype. Keys come out with unit variance and
    logits with a standard deviation near 2, so that the softmax is neither flat nor one-hot.
    Block tables are shuffled; entries past a sequence's last block name a block of NaN.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    needed = [-(-length // case.block_size) for _, length in case.batch]
    num_blocks = sum(needed) + 3
    order = torch.randperm(num_blocks, generator=generator).tolist()
    poison = order.pop()
    block_table = torch.full((len(case.batch), max(needed) + 2), poison, dtype=torch.int32)
    cache = paged_cache(case, num_blocks, dtype, device)
    latents: list[tuple[torch.Tensor, torch.Tensor]] = []
    for row, (count, (_, length)) in enumerate(zip(needed, case.batch, strict=True)):
        blocks = [order.pop() for _ in range(count)]
        block_table[row, :count] = torch.tensor(blocks, dtype=torch.int32)
        for i, block in enumerate(blocks):
            filled = min(case.block_size, length - i * case.block_size)
            slots = block * case.block_size + torch.arange(filled, device=device)
            latents.append((normal(filled, case.rank).to(device, dtype), slots))

    queries = [count for count, _ in case.batch]
    starts = torch.tensor([0, *queries]).cumsum(0).to(torch.int32)
    q = 2 * normal(sum(queries) + case.padding_rows, case.num_heads, case.head_dim)
    q[sum(queries) :] = torch.nan
    k_width, v_width = case.k_spans[0].width, case.v_spans[0].width
    rows = case.k_group_size * case.head_dim
    k_up = normal(len(case.k_spans), rows, k_width) / k_width**0.5
    bias = normal(case.num_kv_heads, case.head_dim) if case.key_bias else None
    norm = None
    if case.key_norm:
        heads = () if case.key_norm is True else (case.num_kv_heads,)
        norm = 1 + 0.3 * normal(*heads, case.head_dim)
    v_up = normal(case.num_kv_heads, case.head_dim, v_width) / v_width**0.5
    # As large as a row's log-sum-exp, give or take.
    sinks = 2 + 3 * normal(case.num_heads) if case.sinks else None
    rot_dim = case.head_dim if case.rot_dim is None else case.rot_dim

    def low(x: torch.Tensor | None) -> torch.Tensor | None:
        return None if x is None else x.to(device, dtype)

    layer = LatentLayer(
        k_up=k_up.to(device, dtype),
        v_up=v_up.to(device, dtype),
        k_spans=case.k_spans,
        v_spans=case.v_spans,
        head_dim=case.head_dim,
        scale=case.head_dim**-0.5,
        cos_sin_cache=rope_table(rot_dim, case.cos_sin_dtype).to(device) if rot_dim else None,
        is_neox=case.is_neox,
        k_bias=low(bias),
        k_norm_weight=low(norm),
        sliding_window=case.sliding_window,
        soft_cap=case.soft_cap,
        sinks=low(sinks),
        latent_format=case.latent_format,
    )
    for z, slots in latents:
        reference.bind(layer).update_cache(z, cache, slots)
    batch = Batch(
        block_table=block_table.to(device),
        seq_lens=torch.tensor([n for _, n in case.batch], dtype=torch.int32, device=device),
        query_start_loc=starts.to(device),
    )
    return AttentionInputs(layer, q.to(device, dtype), cache, batch)
