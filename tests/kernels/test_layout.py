"""Properties of the host-side layout and of launch parameters."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recalkv_vllm.band_format import Band, BandFormat, CacheFormat
from recalkv_vllm.kernels import columns as cut
from recalkv_vllm.kernels import heuristics
from recalkv_vllm.latent_format import LatentFormat
from recalkv_vllm.ops.contract import LatentLayer
from recalkv_vllm.ops.reference import apply_rope
from recalkv_vllm.ops.rotary import pair_order
from recalkv_vllm.ops.triton import layout
from recalkv_vllm.span import Span
from tests.ops.cases import rope_table

units = st.integers(0, 20).map(lambda n: 16 * n)


@given(start=units, width=units)
def test_chunks_tile_their_span(start: int, width: int) -> None:
    chunks = cut.power_of_2_chunks(start, start + width)
    covered = [column for offset, size in chunks for column in range(offset, offset + size)]
    assert covered == list(range(start, start + width))
    assert all(16 <= size <= 128 and size & (size - 1) == 0 for _, size in chunks)


@given(
    k_width=units.filter(bool),
    v_width=units.filter(bool),
    starts=st.lists(st.tuples(units, units), min_size=1, max_size=3),
    alike=st.booleans(),
)
def test_columns_cover_both_spans_and_share_only_what_coincides(
    k_width: int, v_width: int, starts: list[tuple[int, int]], alike: bool
) -> None:
    if alike:
        shift = starts[0][0] - starts[0][1]
        starts = [(v + shift, v) for _, v in starts if v + shift >= 0] or starts[:1]
    k_spans = tuple(Span(k, k + k_width) for k, _ in starts)
    v_spans = tuple(Span(v, v + v_width) for _, v in starts)
    columns = cut.plan_columns(k_spans, v_spans, v_width)
    for chunks, width in ((columns.k, k_width), (columns.v, v_width)):
        covered = sorted(c for offset, size, *_ in chunks for c in range(offset, offset + size))
        assert covered == list(range(width))
    for offset, size, *_, shared in columns.k:
        if shared >= 0:
            v_offset, v_size, *_ = columns.v[shared]
            assert v_size == size
            assert all(k + offset == v + v_offset for k, v in starts)
    k_low, v_low = starts[0]
    overlap = min(k_low + k_width, v_low + v_width) - max(k_low, v_low)
    if alike and overlap > 0:
        assert sum(size for _, size, *_, shared in columns.k if shared >= 0) == overlap


@pytest.mark.parametrize(
    ("arch", "k_span", "v_span", "latent_format", "whole"),
    [
        (90, (0, 96), (0, 128), None, True),
        (90, (0, 192), (0, 256), None, False),  # even already
        (80, (0, 192), (0, 256), None, True),
        (80, (0, 192), (0, 512), None, False),  # too many columns more
        (90, (32, 128), (0, 128), None, False),  # not the first columns
        (90, (0, 128), (0, 128), None, False),
        (90, (0, 96), (0, 128), LatentFormat("int8"), True),
        (90, (0, 96), (0, 128), BandFormat((Band(128, 4),)), False),
    ],
)
def test_keys_read_whole_spans(
    arch: int,
    k_span: tuple[int, int],
    v_span: tuple[int, int],
    latent_format: CacheFormat | None,
    whole: bool,
) -> None:
    k_up = torch.randn(1, 2 * 64, k_span[1] - k_span[0])
    v_up = torch.randn(2, 64, v_span[1])
    spans = {"k_spans": (Span(*k_span),), "v_spans": (Span(*v_span),)}
    layer = LatentLayer(
        k_up=k_up, v_up=v_up, **spans, head_dim=64, scale=1.0, latent_format=latent_format
    )
    attended = layout.with_whole_spans(layer, heuristics.Target(arch, 100))
    if not whole:
        assert attended is layer
        return
    assert attended.k_spans == layer.v_spans
    latents = torch.randn(5, v_span[1])
    keys = latents[:, : k_up.shape[2]] @ k_up[0].T
    torch.testing.assert_close(latents @ attended.k_up[0].T, keys)


@pytest.mark.parametrize("is_neox", [True, False])
@pytest.mark.parametrize(("head_dim", "rot_dim"), [(64, 64), (80, 20), (96, 0), (112, 112)])
def test_pair_order_turns_rope_into_rotations_of_neighbors(
    head_dim: int, rot_dim: int, is_neox: bool
) -> None:
    order = pair_order(head_dim, rot_dim, is_neox)
    assert sorted(order.tolist()) == list(range(head_dim))
    x, table = torch.randn(5, 1, head_dim), rope_table(rot_dim, torch.float32)
    positions = torch.arange(5)
    neox = apply_rope(x, positions, table, is_neox)[..., order]
    neighbors = apply_rope(x[..., order], positions, table, is_neox=False)
    torch.testing.assert_close(neox, neighbors)


@pytest.mark.parametrize("magnitude", [1.0, 1.3])
def test_local_rotation_composes(magnitude: float) -> None:
    table = magnitude * rope_table(48, torch.float32)
    local = layout.local_rotation(table, 64, torch.float32)
    assert local is not None
    assert local.shape == (layout.LARGEST_TILE, 2, 32)
    angle = torch.complex(*table.split(24, dim=1))
    turned = angle[640] * torch.complex(local[:, 0], local[:, 1])[:, :24]
    torch.testing.assert_close(turned, angle[640:768], rtol=0, atol=1e-6)
    assert (local[:, 0, 24:] == 1).all()
    assert (local[:, 1, 24:] == 0).all()


def test_local_rotation_is_refused_where_positions_do_not_compose() -> None:
    table = rope_table(32, torch.float32)
    assert layout.local_rotation(table[:100], 32, torch.float32) is None
    assert layout.local_rotation(table.bfloat16(), 32, torch.float32) is None
    assert layout.local_rotation(table.bfloat16(), 32, torch.bfloat16) is not None
    stretched = torch.cat((table[:512], table[:512]))
    assert layout.local_rotation(stretched[100:900], 32, torch.bfloat16) is None


@st.composite
def shapes(draw: st.DrawFn) -> heuristics.AttentionShape:
    group = draw(st.sampled_from((1, 2, 3, 4)))
    heads_per_v = draw(st.sampled_from((1, group, 2 * group)))
    k_width, v_width = (draw(st.integers(1, 64)) * 16 for _ in range(2))
    code_bits = draw(st.sampled_from((None, 3, 4, 8)))
    return heuristics.AttentionShape(
        queries_per_kv=draw(st.sampled_from((1, 3, 4, 7, 8, 16))),
        num_kv_heads=4 * group,
        k_group_size=group,
        heads_per_v=heads_per_v,
        dim=draw(st.sampled_from((32, 64, 128, 256))),
        k_width=k_width,
        v_width=v_width,
        itemsize=2,
        shared_columns=draw(st.sampled_from((0, min(k_width, v_width)))),
        local_rope=draw(st.booleans()),
        rope=True,
        key_bias=draw(st.booleans()),
        key_norm=draw(st.booleans()),
        code_bits=code_bits,
        bands=code_bits is not None and draw(st.booleans()),
    )


@given(
    shape=shapes(),
    arch=st.sampled_from((80, 86, 89, 90, 100, 120)),
    queries=st.sampled_from((1, 4, 16, 64)),
)
def test_every_shape_has_launch_parameters_that_fit(
    shape: heuristics.AttentionShape, arch: int, queries: int
) -> None:
    target = heuristics.Target(arch, 100)
    config = heuristics.attention_config(shape, target, queries)
    assert shape.heads_per_v % config.heads == 0
    assert config.heads % shape.k_group_size == 0 or shape.k_group_size % config.heads == 0
    assert shape.v_width % config.v_block == 0
    assert config.v_block % 16 == 0
    assert config.rows >= config.query_block * config.heads * shape.queries_per_kv
    assert config.rows & (config.rows - 1) == 0
    assert config.stream == 0 or shape.k_width % config.stream == 0
    assert config.local_rope <= shape.local_rope
    assert heuristics.shared_memory(shape, config, target) <= target.shared_bytes


def test_no_launch_parameters() -> None:
    shape = heuristics.AttentionShape(
        queries_per_kv=128,
        num_kv_heads=1,
        k_group_size=1,
        heads_per_v=1,
        dim=64,
        k_width=64,
        v_width=64,
        itemsize=2,
        shared_columns=0,
        local_rope=True,
        rope=True,
        key_bias=False,
        key_norm=False,
    )
    with pytest.raises(ValueError, match="no launch parameters for sm_90 fit"):
        heuristics.attention_config(shape, heuristics.Target(90, 132), 1)
    few = replace(shape, queries_per_kv=64)
    assert heuristics.attention_config(few, heuristics.Target(90, 132), 1).rows == 64
