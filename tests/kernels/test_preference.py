"""Which kernel the launch rules let decode."""

from __future__ import annotations

import pytest
import torch

from recalkv_vllm.benchmarks.compile_report import Case
from recalkv_vllm.benchmarks.geometries import GEOMETRIES
from recalkv_vllm.benchmarks.inputs import latent_layer
from recalkv_vllm.kernels import heuristics
from recalkv_vllm.kernels.heuristics import AttentionShape, Target
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
    assert heuristics.prefers_cuda(shape_of(case, target), target, 1, False)


@pytest.mark.parametrize("spans", ["split", "joint", "shared-v"])
@pytest.mark.parametrize("group_size", [1, 2])
@pytest.mark.parametrize("queries", [1, 4])
@pytest.mark.parametrize("arch", [90, 100, 103])
def test_triton_decodes_from_sm_90_on(arch: int, queries: int, group_size: int, spans: str) -> None:
    target = Target(arch, 132)
    shape = shape_of(Case("llama-3.1-8b", 0.5, group_size, spans), target)
    assert not heuristics.prefers_cuda(shape, target, queries, False)


def test_but_not_in_narrow_tiles() -> None:
    target = Target(90, 132)
    shape = shape_of(WIDE, target)
    assert heuristics.attention_config(shape, target, 1).tile == 32
    assert heuristics.prefers_cuda(shape, target, 1, False)


@pytest.mark.parametrize("group_size", [1, 2])
def test_the_kernel_for_hopper_decodes_groups_of_one_head(group_size: int) -> None:
    target = Target(90, 132)
    shape = shape_of(Case("llama-3.1-8b", 0.5, group_size, "joint"), target)
    assert heuristics.prefers_cuda(shape, target, 1, True) == (group_size == 1)
