"""Plans of the CUDA kernel and the layout of what it is given."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recalkv_vllm.ops import LatentLayer
from recalkv_vllm.ops.cuda import layout as cuda_layout
from recalkv_vllm.ops.cuda import plan as cuda_plan
from recalkv_vllm.ops.cuda.shapes import LayerShape, Limits
from recalkv_vllm.span import Span

H100 = Limits(132, 227 << 10, 228 << 10)
SMALL = Limits(48, 99 << 10, 100 << 10)


def layer_of(
    head_dim: int, group: int, k_spans: list, v_spans: list, bias: bool = False
) -> LayerShape:
    k_width, v_width = (Span(*spans[0]).width for spans in (k_spans, v_spans))
    layer = LatentLayer(
        k_up=torch.empty(len(k_spans), group * head_dim, k_width, device="meta"),
        v_up=torch.empty(len(k_spans) * group, head_dim, v_width, device="meta"),
        k_spans=k_spans,
        v_spans=v_spans,
        head_dim=head_dim,
        scale=1.0,
        k_bias=torch.empty(0) if bias else None,
    )
    return LayerShape.of(layer)


@st.composite
def layers(draw: st.DrawFn) -> LayerShape:
    """Any spans: they may lie anywhere, overlap, or be equal."""
    group, groups = draw(st.sampled_from((1, 2, 3, 4, 8))), draw(st.integers(1, 4))
    v_groups = draw(st.sampled_from([n for n in range(1, 9) if group * groups % n == 0]))
    k_width, v_width = (16 * draw(st.integers(1, 40)) for _ in range(2))

    def spans(count: int, width: int) -> list[Span]:
        starts = draw(st.lists(st.integers(0, 60), min_size=count, max_size=count))
        return [Span(16 * start, 16 * start + width) for start in starts]

    head_dim = draw(st.sampled_from(cuda_plan.HEAD_DIMS))
    bias = draw(st.booleans())
    return layer_of(head_dim, group, spans(groups, k_width), spans(v_groups, v_width), bias)


@given(layer=layers(), limits=st.sampled_from((H100, SMALL)), column_tiles=st.sampled_from((1, 2)))
def test_plans_fit_and_load_every_column_once(
    layer: LayerShape, limits: Limits, column_tiles: int
) -> None:
    plan = cuda_plan.plan(layer, limits, column_tiles)
    if plan is None:
        return
    assert plan.shared_bytes <= limits.shared_bytes
    assert layer.k_group_size % plan.heads == 0
    assert 1 <= plan.heads * plan.teams <= cuda_plan.LARGEST_BLOCK_WARPS
    assert 2 <= plan.stages <= cuda_plan.MOST_STAGES
    table = cuda_layout.tile_columns(layer, plan)
    parts = cuda_plan.v_blocks(layer, plan.v_tiles)
    assert table.shape[0] * table.shape[1] == plan.blocks
    for part, rows in zip(parts, table.tolist(), strict=True):
        for block, (k_offset, chunks, *rest) in enumerate(rows):
            first = block * plan.heads
            sources = rest[plan.heads : plan.heads + chunks]
            assert chunks <= plan.tile_width // 8
            assert len(set(sources)) == len(sources)

            def columns(start: int, width: int, chunks: list[int] = sources) -> list[int]:
                return chunks[start // 8 : (start + width) // 8]

            k_span = layer.k_spans[first]
            assert columns(k_offset, layer.k_width) == list(range(*k_span, 8))
            for head in range(plan.heads):
                start = layer.v_spans[first + head].start
                wanted = list(range(start + part.start, start + part.end, 8))
                assert columns(rest[head], part.width) == wanted


@pytest.mark.parametrize(
    ("spans", "width"),
    [
        (([(0, 64)], [(0, 64)]), 64),  # joint
        (([(0, 64)], [(64, 128)]), 128),  # disjoint
        (([(0, 64)], [(32, 112)]), 112),  # overlapping
        (([(16, 48)], [(0, 96)]), 96),  # nested
        (([(0, 32)], [(96, 128)]), 64),  # with a gap, which is not loaded
    ],
)
def test_columns_that_are_loaded(spans: tuple[list, list], width: int) -> None:
    plan = cuda_plan.plan(layer_of(64, 1, *spans), H100, 1)
    assert plan is not None
    assert plan.tile_width == width


def test_pieces_fill_the_device() -> None:
    plan = cuda_plan.plan(layer_of(128, 1, [(0, 128)] * 8, [(0, 128)] * 8), H100, 1)
    assert plan is not None
    for batch in (1, 2, 8, 16):
        bounds = cuda_plan.batch_bounds(plan, H100, batch, 32768)
        assert bounds is not None
        running = bounds.at_once * plan.blocks
        slots = 132 * plan.blocks_per_multiprocessor
        assert slots - plan.blocks < running <= slots
        assert bounds.capacity > bounds.at_once
    assert cuda_plan.batch_bounds(plan, H100, 1, 32) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("positions", [3, 31, 33, 4097])
def test_rotations_compose(positions: int, dtype: torch.dtype) -> None:
    angle = torch.arange(positions).double()[:, None] / 10000 ** (torch.arange(24) / 24)
    table = 1.2 * torch.cat((angle.cos(), angle.sin()), dim=1).to(dtype)
    tables = cuda_layout.rotation_tables(table, 64, torch.device("cpu"))
    assert tables is not None
    base, local = (torch.view_as_complex(t) for t in tables)
    position = torch.arange(positions)
    for tile in (16, 32):
        got = base[position // tile * (tile // 16)] * local[position % tile]
        expected = 1.2 * torch.polar(torch.ones_like(angle), angle)
        tolerance = 1e-3 if dtype == torch.float32 else 2.0**-6
        assert (got[:, :24] - expected).abs().max() < tolerance
        assert torch.equal(got[:, 24:], torch.ones_like(got[:, 24:]))


def test_table_with_one_wrong_row_is_found() -> None:
    angle = torch.arange(4096)[:, None] / 10000 ** (torch.arange(32) / 32)
    table = torch.cat((angle.cos(), angle.sin()), dim=1)
    table[3001, 5] += 0.1
    assert cuda_layout.rotation_tables(table, 64, torch.device("cpu")) is None
