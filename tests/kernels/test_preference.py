"""Which kernel the launch rules let decode."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from recalkv_vllm.benchmarks.compile_report import Case
from recalkv_vllm.benchmarks.geometries import GEOMETRIES
from recalkv_vllm.benchmarks.inputs import latent_layer
from recalkv_vllm.cost import GPUS
from recalkv_vllm.cost.gpu import fastest_kernel
from recalkv_vllm.kernels import heuristics
from recalkv_vllm.kernels.heuristics import AttentionShape, Target
from recalkv_vllm.ops.cuda.cost import layer_cost
from recalkv_vllm.ops.triton.attention import TritonAttention

FLAGSHIP = Case("llama-3.1-8b", 0.5, 1, "split")
#: Triton's wgmma would need more registers than there are for 256 + 256 columns.
WIDE = Case("llama-3.1-8b", 0.5, 4, "split")


def shape_of(case: Case, target: Target) -> AttentionShape:
    layer = latent_layer(GEOMETRIES[case.geometry], case.latent, 1024, torch.bfloat16)
    return TritonAttention(layer, target).planner.shape(GEOMETRIES[case.geometry].num_heads)


@pytest.mark.parametrize("case", [FLAGSHIP, WIDE], ids=str)
@pytest.mark.parametrize("arch", [80, 86, 89, 120])
def test_cuda_decodes_where_neither_has_wide_instructions(arch: int, case: Case) -> None:
    target = Target(arch, 100)
    assert heuristics.prefers_cuda(shape_of(case, target), target, 1)


@pytest.mark.parametrize("spans", ["split", "joint", "shared-v"])
@pytest.mark.parametrize("group_size", [1, 2])
@pytest.mark.parametrize("queries", [1, 4])
@pytest.mark.parametrize("arch", [90, 100, 103])
def test_triton_decodes_from_sm_90_on(arch: int, queries: int, group_size: int, spans: str) -> None:
    target = Target(arch, 132)
    shape = shape_of(Case("llama-3.1-8b", 0.5, group_size, spans), target)
    assert not heuristics.prefers_cuda(shape, target, queries)


def test_but_not_in_narrow_tiles() -> None:
    target = Target(90, 132)
    shape = shape_of(WIDE, target)
    assert heuristics.attention_config(shape, target, 1).tile == 32
    assert heuristics.prefers_cuda(shape, target, 1)


@pytest.mark.parametrize(
    ("case", "queries", "fastest"),
    [
        (Case("llama-3.1-8b", 0.5, 1, "joint"), 1, "cuda"),
        (Case("llama-3.1-8b", 0.5, 1, "joint", "bands"), 1, "cuda"),
        (Case("llama-3.1-8b", 0.5, 2, "nested", "bands"), 1, "cuda"),
        (Case("llama-3.1-8b", 0.5, 2, "joint"), 1, "triton"),
        (Case("llama-3.1-8b", 0.5, 1, "joint"), 16, "triton"),
    ],
    ids=str,
)
def test_predicted_time_decides_on_hopper(case: Case, queries: int, fastest: str) -> None:
    geometry = GEOMETRIES[case.geometry]
    layer = latent_layer(
        geometry, case.latent, 1024, torch.bfloat16, latent_format=case.latent_format
    )
    cost = replace(layer_cost(layer), num_heads=geometry.num_heads, queries=queries)
    assert fastest_kernel(cost, GPUS["h100"]) == fastest
