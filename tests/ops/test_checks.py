"""The tolerance of the test matrix: it lets rounding pass, and no mistake."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.ops.cases import (
    AttentionInputs,
    attend,
    attend_in_torch,
    build,
    quantized,
    spanned,
)
from tests.ops.checks import assert_close_to_oracle, assert_matches_oracle, expected_of
from tests.ops.cpu_versions import DTYPES

ROWS = {"batch": ((1, 45), (3, 50), (13, 47)), "key_bias": True, "rot_dim": 48}
#: Where everything that a mistake may touch is there.
CASE = spanned("mistakes", (6, 2, 64), 1, 48, 1, 64, 16, sliding_window=40, soft_cap=5.0, **ROWS)
NORMED = replace(CASE, key_norm=True)
(QUANTIZED,) = quantized([CASE], "int4", 32)


def with_one(tensor: torch.Tensor, index: tuple[int, ...], factor: float) -> torch.Tensor:
    """A copy with one element changed."""
    changed = tensor.clone()
    changed[index] *= factor
    return changed


def swapped_blocks(inputs: AttentionInputs) -> torch.Tensor:
    table = inputs.batch.block_table.clone()
    table[2, [0, 1]] = table[2, [1, 0]]
    return table


#: What a kernel with a mistake would have computed, as the arguments that make a right one do so.
MISTAKES: dict[str, Callable[[AttentionInputs], dict[str, Any]]] = {
    "two blocks swapped": lambda x: {"block_table": swapped_blocks(x)},
    "newest token unseen": lambda x: {"seq_lens": x.batch.seq_lens - torch.tensor([0, 0, 1]).int()},
    "keys one position late": lambda x: {"cos_sin_cache": x.layer.cos_sin_cache.roll(-1, 0)},
    "window one too long": lambda x: {"sliding_window": x.layer.sliding_window + 1},
    "window one too short": lambda x: {"sliding_window": x.layer.sliding_window - 1},
    "no soft cap": lambda x: {"soft_cap": None},
    "soft cap off by 5 %": lambda x: {"soft_cap": x.layer.soft_cap * 1.05},
    "scale off by 5 %": lambda x: {"scale": x.layer.scale * 1.05},
    "pairs of the other kind": lambda x: {"is_neox": not x.layer.is_neox},
    "no key bias": lambda x: {"k_bias": None},
    "one column of a factor lost": lambda x: {"k_up": with_one(x.layer.k_up, (1, ..., 7), 0)},
    "rows of a factor negated": lambda x: {"k_up": with_one(x.layer.k_up, (0, slice(0, 4)), -1)},
    "keys of other columns": lambda x: {"k_spans": [(s + 16, e + 16) for s, e in x.layer.k_spans]},
    "values of other columns": lambda x: {
        "v_spans": [(s - 16, e - 16) for s, e in x.layer.v_spans]
    },
}


def check_one(inputs: AttentionInputs, dtype: torch.dtype, **changes: Any) -> None:
    result = attend(inputs.change(**changes))
    assert_close_to_oracle(result, *expected_of(inputs, dtype), rows=len(inputs.q))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [CASE, NORMED, QUANTIZED], ids=["plain", "norm", "int4"])
@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_found(name: str, case: Any, dtype: torch.dtype) -> None:
    inputs = build(case, dtype)
    with pytest.raises(AssertionError, match=r"error .* allowed"):
        check_one(inputs, dtype, **MISTAKES[name](inputs))


@pytest.mark.parametrize(
    ("dtype", "bits"), [(torch.float32, 10), (torch.bfloat16, 5), (torch.float16, 5)], ids=str
)
def test_rounding_coarser_than_the_operands_is_found(dtype: torch.dtype, bits: int) -> None:
    """Keys out of factors with fewer bits of mantissa; float32 sums err by themselves."""
    inputs = build(CASE, dtype)
    k_up = inputs.layer.k_up.float()
    step = 2.0 ** (k_up.abs().log2().floor() + bits) * torch.finfo(dtype).eps
    with pytest.raises(AssertionError, match=r"error .* allowed"):
        check_one(inputs, dtype, k_up=((k_up / step).round() * step).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_element_of_the_result_is_enough(dtype: torch.dtype) -> None:
    inputs = build(CASE, dtype)
    o_lat, lse = attend(inputs)
    assert_matches_oracle((o_lat, lse), CASE, dtype)
    with pytest.raises(AssertionError, match="o_lat: error inf"):
        assert_matches_oracle((with_one(o_lat, (5, 2, 9), torch.nan), lse), CASE, dtype)
    with pytest.raises(AssertionError, match="lse: error"):
        assert_matches_oracle((o_lat, with_one(lse, (0, 3), 1.05)), CASE, dtype)


@pytest.mark.parametrize("seed", range(20))
def test_the_same_bound_holds_for_every_draw(seed: int) -> None:
    """A single cached token: three elements, whose errors in one draw say nothing of the next."""
    case = spanned("one-token", (3, 3, 96), 1, 16, 1, 112, batch=((1, 1),), key_bias=True)
    inputs = build(case, torch.bfloat16, seed=seed)
    check_one(inputs, torch.bfloat16)
    # Plain torch rounds logits too, which fast versions do not: twice the error at most.
    plain = attend_in_torch(inputs, torch.bfloat16)
    oracle, (o_lat, lse) = expected_of(inputs, torch.bfloat16)
    assert_close_to_oracle(plain, oracle, (2 * o_lat, 2 * lse), rows=1)
