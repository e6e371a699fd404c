"""Dense keys and values in Triton's interpreter, through the matrix of layers."""

from __future__ import annotations

import itertools

import pytest
import torch

from recalkv_vllm.ops import Pieces, reference
from recalkv_vllm.ops import triton as ops
from tests.ops.band_cases import BAND_CASES
from tests.ops.cases import CASES, QUANTIZED_CASES, AttentionCase, AttentionInputs, build

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
#: Two roundings of factors or latents in a sum of squares near one, and a rotation's.
ALLOWED = {torch.float32: 2e-5, torch.bfloat16: 0.06}


def pieces_of(inputs: AttentionInputs, case: AttentionCase) -> Pieces:
    """Of each sequence the last two thirds, none of one token."""
    positions = [length // 3 for _, length in case.batch]
    counts = [length - first for first, (_, length) in zip(positions, case.batch, strict=True)]
    counts = [0 if count == 1 else count for count in counts]
    start_loc = [0, *itertools.accumulate(counts)]

    def on_device(numbers: list[int]) -> torch.Tensor:
        return torch.tensor(numbers, dtype=torch.int32, device=DEVICE)

    table = inputs.batch.block_table
    return Pieces(table, on_device(positions), on_device(start_loc), start_loc[-1])


def check(case: AttentionCase, dtype: torch.dtype) -> None:
    inputs = build(case, dtype, DEVICE)
    bias = torch.randn(inputs.layer.v_up.shape[:2], generator=torch.Generator().manual_seed(1))
    layer = inputs.change(v_bias=bias.to(DEVICE, dtype)).layer
    pieces = pieces_of(inputs, case)
    shape = (pieces.num_tokens + 3, layer.num_kv_heads, layer.head_dim)
    found = [torch.full(shape, torch.nan, dtype=dtype, device=DEVICE) for _ in range(2)]
    exact = [torch.full(shape, torch.nan, dtype=torch.float64, device=DEVICE) for _ in range(2)]
    ops.bind(layer).reconstruct(inputs.kv_cache, pieces, *found)
    reference.reconstruct(layer, inputs.kv_cache, pieces, *exact, compute_dtype=torch.float64)
    for mine, true in zip(found, exact, strict=True):
        assert mine[pieces.num_tokens :].isnan().all()
        scale = true[: pieces.num_tokens].abs().amax()
        torch.testing.assert_close(
            mine.double(), true, rtol=0, atol=ALLOWED[dtype] * float(scale), equal_nan=True
        )


@pytest.mark.parametrize("case", [*CASES, *QUANTIZED_CASES[::3], *BAND_CASES[::3]], ids=str)
def test_matrix(case: AttentionCase) -> None:
    check(case, torch.float32)


@pytest.mark.parametrize("case", [CASES[0], CASES[-1], QUANTIZED_CASES[0], BAND_CASES[0]], ids=str)
def test_bfloat16(case: AttentionCase) -> None:
    check(case, torch.bfloat16)


def test_no_tokens_are_no_launch() -> None:
    inputs = build(CASES[0], torch.float32, DEVICE)
    zeros = torch.zeros(len(CASES[0].batch) + 1, dtype=torch.int32, device=DEVICE)
    pieces = Pieces(inputs.batch.block_table, zeros[1:], zeros, 0)
    keys = inputs.q.new_empty(0, inputs.layer.num_kv_heads, inputs.layer.head_dim)
    ops.bind(inputs.layer).reconstruct(inputs.kv_cache, pieces, keys, keys)
