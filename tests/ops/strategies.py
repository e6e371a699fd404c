"""Random attention cases: one hypothesis strategy for every fast version's tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from hypothesis import strategies as st

from recalkv_vllm.band_format import PLANES, BandFormat
from recalkv_vllm.latent_format import BITS, GROUP_SIZES, LatentFormat
from recalkv_vllm.span import Span
from tests.ops.band_cases import banded
from tests.ops.cases import AttentionCase, joint, spanned

MULTIPLE = 16


@st.composite
def attention_cases(
    draw: st.DrawFn,
    head_dims: Sequence[int],
    max_queries: int = 20,
    quantized: bool = True,
) -> AttentionCase:
    """Legal cases: any mix of lengths, spans, strides and options.

    Args:
        head_dims: to choose from.
        max_queries: of one sequence.
        quantized: whether the cache may hold quantized latents.
    """

    def pick(*values: int) -> int:
        return draw(st.sampled_from(values))

    group = pick(1, 2, 3)
    kv_heads = group * pick(1, 2)
    heads = (kv_heads * pick(1, 3, 4), kv_heads, pick(*head_dims))
    sequence = st.tuples(st.integers(0, max_queries), st.integers(0, 90))
    key_norm = draw(st.booleans())
    # Key scales and codes have their places behind each other in a block.
    whole_blocks = st.sampled_from(("dense", "blocks"))
    batch = draw(st.lists(sequence.map(lambda x: (x[0], sum(x))), min_size=1, max_size=4))
    rest = {
        "batch": tuple(batch),
        "block_size": pick(16, 32, 48, 64),
        "is_neox": draw(st.booleans()),
        "rot_dim": pick(*(n for n in (0, 16, 20, heads[2]) if n <= heads[2])),
        "key_bias": draw(st.booleans()),
        "key_norm": key_norm,
        "sliding_window": draw(st.sampled_from((None, 5, 31, 33, 64, 65))),
        "soft_cap": draw(st.sampled_from((None, 4.0))),
        "sinks": draw(st.booleans()),
        "cache": draw(whole_blocks if key_norm else whole_blocks | st.just("tokens")),
        "padding_rows": pick(0, 0, 2),
    }
    if quantized and draw(st.booleans()):
        rest["cache"] = draw(whole_blocks)
        if draw(st.booleans()):
            return draw(banded_cases(heads, group, rest))
        rest["latent_format"] = draw(latent_formats())
    if draw(st.booleans()):
        case = joint("random", heads, group, pick(16, 80), **rest)
    else:
        v_groups = draw(st.sampled_from([n for n in (1, 2, 3) if kv_heads % n == 0]))
        case = spanned("random", heads, group, pick(16, 48), v_groups, pick(16, 112), **rest)
    return draw(moved_spans(case)) if draw(st.booleans()) else case


def latent_formats() -> st.SearchStrategy[LatentFormat]:
    """All formats with one number of bits."""
    return st.builds(LatentFormat, st.sampled_from(tuple(BITS)), st.sampled_from((0, *GROUP_SIZES)))


def bands() -> st.SearchStrategy[tuple[tuple[int, int], ...]]:
    """Columns and bits of a span's bands."""
    band = st.tuples(st.sampled_from((32, 64)), st.sampled_from(tuple(PLANES)))
    return st.lists(band, min_size=1, max_size=4).map(tuple)


def band_formats() -> st.SearchStrategy[BandFormat]:
    """Formats of latents in bands."""
    return bands().map(BandFormat)


@st.composite
def banded_cases(
    draw: st.DrawFn, heads: tuple[int, int, int], group: int, rest: dict[str, Any]
) -> AttentionCase:
    """Cases on latents in bands: joint spans, K spans that are the start of V spans, or apart.

    Args:
        heads: query heads, KV heads and head size.
        group: KV heads per K group.
        rest: other parameters of the case.
    """
    groups = heads[1] // group
    k_bands, v_bands, behind = draw(bands()), draw(bands()), draw(st.just(()) | bands())
    k_width, v_width = (sum(columns for columns, _ in span) for span in (k_bands, v_bands))
    way = draw(st.sampled_from(("joint", "nested", "split")))
    if way == "split":
        v_groups = draw(st.sampled_from([n for n in (1, 2, 3) if heads[1] % n == 0]))
        case = spanned("random", heads, group, k_width, v_groups, v_width, **rest)
        return banded(case, *[k_bands] * groups, *[v_bands] * v_groups, behind)
    if way == "joint":
        return banded(joint("random", heads, group, k_width, **rest), *[k_bands] * groups, behind)
    case = joint("random", heads, group, k_width + v_width, **rest)
    starts = tuple(Span(span.start, span.start + k_width) for span in case.v_spans)
    case = replace(case, k_spans=starts)
    return banded(case, *[(*k_bands, *v_bands)] * groups, behind)


@st.composite
def moved_spans(draw: st.DrawFn, case: AttentionCase) -> AttentionCase:
    """The case with its spans anywhere in a latent: in any order, overlapping, with gaps."""
    widths = [spans[0].width for spans in (case.k_spans, case.v_spans)]
    rank = max(*widths, case.rank) + MULTIPLE * draw(st.integers(0, 2))

    def moved(width: int, count: int) -> tuple[Span, ...]:
        first = st.integers(0, (rank - width) // MULTIPLE).map(lambda i: i * MULTIPLE)
        starts = draw(st.lists(first, min_size=count, max_size=count))
        return tuple(Span(start, start + width) for start in starts)

    return replace(
        case,
        rank=rank,
        k_spans=moved(widths[0], len(case.k_spans)),
        v_spans=moved(widths[1], len(case.v_spans)),
    )
