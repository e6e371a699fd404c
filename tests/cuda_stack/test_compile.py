"""The launches that served checkpoints reach, compiled for sm_90 by this stack's Triton."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
import triton

from recalkv_vllm.benchmarks.compile_report import Case, CompileOnlyDriver, compile_row
from recalkv_vllm.ops import Batch, Pieces
from recalkv_vllm.ops.triton.attention import TritonAttention
from recalkv_vllm.ops.triton.launch import Launch
from recalkv_vllm.ops.triton.plan import Part
from recalkv_vllm.serving.attention.page_width import own_slots
from tests.cuda_stack.worker import Worker, on_gpu

ARCH = 90
#: Of a prompt's chunk.
PREFILL_TOKENS = 64
#: Only names the rows.
CASE = Case("small", 0.5, 1, "joint")


@pytest.fixture
def compile_only(monkeypatch: pytest.MonkeyPatch) -> None:
    # Not by reset_active(): that would ask for the real driver.
    monkeypatch.setattr(triton.runtime.driver, "_active", CompileOnlyDriver(ARCH))


def prefill_launches(layer: object) -> Iterator[Launch]:
    """Of one layer, for one sequence."""
    bound = layer.impl._ops._bound
    attention: TritonAttention = getattr(bound, "triton", None) or bound.attention
    with on_gpu():
        q = torch.zeros(PREFILL_TOKENS, layer.num_heads, layer.head_dim)
        o_lat = torch.zeros(*q.shape[:2], attention.planner.v_width, dtype=torch.float32)
        index = torch.zeros(2, dtype=torch.int32)
        batch = Batch(index[None], index[:1], index, max_seq_len=PREFILL_TOKENS)
        part = Part.rest(batch, PREFILL_TOKENS)
        cache = own_slots(layer.kv_cache, layer.slot_width)
        yield from attention.launches(part, q, cache, batch, o_lat, o_lat[..., 0])
        heads, _, head_dim = bound.values.up.shape
        dense = torch.zeros(PREFILL_TOKENS, heads, head_dim)
        pieces = Pieces(index[None], index[:1], index, PREFILL_TOKENS)
        yield bound._reconstruction.launch(cache, pieces, dense, dense)


def with_memory(launch: Launch) -> Launch:
    """The same for the compiler, which reads an address off each tensor."""
    arguments = {
        name: torch.zeros(1, dtype=x.dtype) if isinstance(x, torch.Tensor) else x
        for name, x in launch.arguments.items()
    }
    return replace(launch, arguments=arguments)


@pytest.mark.parametrize("name", ["mixed", "int4", "bands"])
def test_launches_compile_without_faults(
    name: str, worker: Callable[[str], Worker], launches: list[Launch], compile_only: None
) -> None:
    served = worker(name)
    served.forward(8, 1)
    wanted = list(launches)
    for layer in served.layers.values():
        wanted += prefill_launches(layer)
    assert sum(launch.kernel.__name__ == "latent_attention" for launch in wanted) >= 3
    for launch in wanted:
        row = compile_row(CASE, "", ARCH, with_memory(launch))
        assert not row.faults(), (launch.kernel.__name__, row)
