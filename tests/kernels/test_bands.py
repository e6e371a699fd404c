"""Latents in bands in Triton's interpreter: how spans are cut, cache update and attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recalkv_vllm.band_format import BLOCK_COLUMNS, PLANES, BandFormat
from recalkv_vllm.kernels import columns as cut
from recalkv_vllm.latent_format import unpack_bits
from recalkv_vllm.ops import reference
from recalkv_vllm.ops import triton as ops
from recalkv_vllm.ops.triton.layout import format_constants
from recalkv_vllm.span import Span
from tests.kernels.pieces import cut_into
from tests.kernels.test_attention import DEVICE, change_config, check
from tests.ops.band_cases import BAND_CASES
from tests.ops.cases import AttentionCase, build, caching_layer, paged_cache

BY_NAME = {case.name: case for case in BAND_CASES}
ALL_BITS = BandFormat(((96, 8), (224, 6), (32, 4), (32, 4), (96, 3), (64, 2)))

bands = st.tuples(st.integers(1, 6).map(lambda n: n * BLOCK_COLUMNS), st.sampled_from([*PLANES]))


def codes_at(packed: torch.Tensor, size: int, planes: Sequence[int]) -> torch.Tensor:
    """What the kernel makes of the bytes of ``size`` columns."""
    low, low_byte, high, high_byte = planes
    codes = unpack_bits(packed[low_byte : low_byte + size * low // 8], low)
    if high:
        codes |= unpack_bits(packed[high_byte : high_byte + size * high // 8], high) << low
    return codes


@given(
    parts=st.tuples(*[st.lists(bands, max_size=3)] * 4).filter(lambda parts: bool(parts[1])),
    groups=st.integers(1, 3),
    nested=st.sampled_from(["k in v", "v in k", "equal", "apart"]),
    blocks=st.integers(1, 3),
)
def test_chunks_find_their_codes(
    parts: tuple[list[tuple[int, int]], ...], groups: int, nested: str, blocks: int
) -> None:
    """Of every span, whatever is in front of it, whether or not V is cut into blocks."""
    before, both, more, after = parts
    one = [*before, *both, *more, *after]
    latent_format = BandFormat(tuple(one * groups))
    widths = [sum(width for width, _ in part) for part in parts]
    lows = [sum(widths) * g + widths[0] for g in range(groups)]
    inner = [Span(low, low + widths[1]) for low in lows]
    outer = [Span(low, low + widths[1] + widths[2]) for low in lows]
    k_spans, v_spans = {
        "k in v": (inner, outer),
        "v in k": (outer, inner),
        "equal": (outer, outer),
        "apart": (inner, inner[::-1]),
    }[nested]
    v_width = v_spans[0].width
    if v_width % (16 * blocks):
        blocks = 1
    codes, _ = latent_format.quantize(torch.randn(latent_format.rank))
    packed = latent_format.pack(codes)
    v_block = v_width // blocks
    for block in range(blocks):
        columns = cut.plan_columns(tuple(k_spans), tuple(v_spans), v_block, block, latent_format)
        cuts = [(k_spans, 0, chunk[:6]) for chunk in columns.k]
        cuts += [(v_spans, block * v_block, chunk) for chunk in columns.v]
        for spans, first, (offset, size, *planes) in cuts:
            for span in spans:
                found = codes_at(packed[latent_format.code_offset(span) :], size, planes)
                start = span.start + first + offset
                assert torch.equal(found, codes[start : start + size])
        for chunks, width in ((columns.k, k_spans[0].width), (columns.v, v_block)):
            covered = sorted(c for offset, size, *_ in chunks for c in range(offset, offset + size))
            assert covered == list(range(width))
        for offset, size, *_, shared in columns.k:
            if shared >= 0:
                v_offset, v_size, *_ = columns.v[shared]
                starts = zip(k_spans, v_spans, strict=True)
                assert v_size == size
                assert all(k.start + offset == v.start + v_offset for k, v in starts)
        if nested == "equal" and blocks == 1:
            assert all(shared >= 0 for *_, shared in columns.k)
        streams = columns.streams(64)
        assert [(start, end) for start, *_, end in streams] == [r[:2] for r in columns.k_runs]
        assert all((end - start) % step == 0 for start, step, *_, end in streams)


def test_first_codes_count_in_the_largest_unit() -> None:
    case = BY_NAME["bands-split"]
    layer = build(case, torch.float32).layer
    assert case.latent_format == BandFormat(((32, 3), (32, 2)) * 2 + ((32, 4), (32, 4)))
    constants = format_constants(layer)
    assert constants["CODE_UNIT"] == 4
    starts = (4 * constants["first_codes"]).tolist()
    assert starts == [[0, 40], [20, 56]]


def poisoned_caches(latent_format: BandFormat, layout: str) -> list[torch.Tensor]:
    case = AttentionCase(
        "update",
        rank=latent_format.rank,
        block_size=16,
        cache=layout,  # type: ignore[arg-type]
        latent_format=latent_format,
    )
    return [paged_cache(case, 6, torch.float32, DEVICE) for _ in range(2)]


@pytest.mark.parametrize(
    ("latent_format", "layout"),
    [
        (ALL_BITS, "blocks"),
        (BandFormat(((32, 2),)), "dense"),
        (BandFormat(((32, 6), (32, 3), (32, 3), (32, 2))), "dense"),
    ],
    ids=["all-bits", "one-block", "ends-in-padding"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_quantizes_bit_for_bit(dtype: torch.dtype, latent_format: BandFormat, layout: str) -> None:
    rank = latent_format.rank
    caches = poisoned_caches(latent_format, layout)
    z = torch.randn(42, rank + 16)[:, :rank]  # two rows more than slots
    z[:10] *= 2.0 ** torch.arange(-25, 15, 4).unsqueeze(1)  # scales that are not normal halves too
    z[10:13, :16] = 0
    z[13] = 0
    z[14] = 1e-7  # the smallest scale
    z[15] = 3e4
    z[16:24] = z[16:24].round()  # on the edges between codes
    z = z.to(DEVICE, dtype)
    slots = torch.randperm(6 * 16, device=DEVICE)[:40]
    slots[::7] = -1
    ops.bind(caching_layer(latent_format, DEVICE)).update_cache(z, caches[0], slots)
    reference.latent_cache_update(z, caches[1], slots, latent_format)
    assert torch.equal(*caches)


@pytest.mark.parametrize(
    ("element", "scale"),
    [(torch.nan, 0xFF), (torch.inf, 0xF8), (-torch.inf, 0xF8), (3e38, 0xF7), (1e-30, 0x01)],
)
def test_scales_of_extreme_elements(element: float, scale: int) -> None:
    """NaN and infinity are kept, what is above the largest scale saturates."""
    rank = ALL_BITS.rank
    cache = torch.full((1, 16, ALL_BITS.slot_bytes(rank)), 0xFF, dtype=torch.uint8, device=DEVICE)
    z = torch.ones(2, rank)
    z[1].view(-1, BLOCK_COLUMNS)[:, : 5 if abs(element) > 1 else BLOCK_COLUMNS] = element
    slots = torch.arange(2, device=DEVICE)
    ops.bind(caching_layer(ALL_BITS, DEVICE)).update_cache(z.to(DEVICE), cache, slots)
    scales = ALL_BITS.split_cache(cache)[1][0, :2].cpu()
    assert torch.equal(scales, ALL_BITS.quantize(z)[1])
    assert (scales[1] == scale).all()


@pytest.mark.parametrize("case", BAND_CASES, ids=str)
def test_matrix(case: AttentionCase) -> None:
    check(case)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["bands-joint-all-heads", "bands-split", "bands-everything"])
def test_low_precision(name: str, dtype: torch.dtype) -> None:
    check(BY_NAME[name], dtype)


@pytest.mark.parametrize(
    ("name", "pieces"), [("bands-joint", 5), ("bands-unsorted-with-gaps", 2), ("bands-long", 3)]
)
def test_pieces(name: str, pieces: int, monkeypatch: pytest.MonkeyPatch) -> None:
    cut_into(pieces, monkeypatch)
    check(BY_NAME[name])


def test_decodes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    cut_into(3, monkeypatch)
    batch = ((1, 45), (3, 50), (0, 0), (2, 2), (20, 20), (13, 47))
    case = replace(BY_NAME["bands-joint"], name="bands-decodes-first", batch=batch)
    check(case, num_decodes=4, num_decode_tokens=6, max_decode_query_len=3, max_seq_len=64)


@pytest.mark.parametrize(
    ("name", "stream"),
    [("bands-joint-all-heads", 64), ("bands-unsorted-with-gaps", 16), ("bands-v-inside-k", 32)],
)
@pytest.mark.parametrize("late_values", [False, True])
def test_streamed_factors(
    name: str, stream: int, late_values: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    change_config(monkeypatch, stream=stream, late_values=late_values)
    check(BY_NAME[name])


@pytest.mark.parametrize(
    ("name", "v_block", "pieces"),
    [("bands-joint-all-heads", 112, 1), ("bands-one-v-group", 112, 3), ("bands-split", 16, 2)],
)
def test_value_columns_in_blocks(
    name: str, v_block: int, pieces: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every block, two of each span, is a launch; only the first writes the log-sum-exp."""
    cut_into(pieces, monkeypatch)
    change_config(monkeypatch, v_block=v_block)
    check(BY_NAME[name])


def test_nan_in_the_cache_reaches_the_output() -> None:
    """A scale that is NaN must not be turned into a plausible number."""
    case = replace(BY_NAME["bands-joint"], name="bands-nan", batch=((1, 200),), padding_rows=0)
    inputs = build(case, torch.float32, DEVICE)
    assert isinstance(case.latent_format, BandFormat)
    _, scales = case.latent_format.split_cache(inputs.kv_cache)
    scales[inputs.batch.block_table[0, 0], 3] = 0xFF
    o_lat, lse = ops.bind(inputs.layer).attend(*inputs.call)
    assert o_lat.isnan().all()
    assert lse.isnan().all()
