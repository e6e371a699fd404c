"""What serving compiles before the first request is all that requests ask for."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from recalkv_vllm.ops import BatchLimits
from recalkv_vllm.ops import triton as ops
from recalkv_vllm.ops.triton import warm_up
from tests.ops.cases import CASES, QUANTIZED_CASES, build

LIMITS = BatchLimits(num_heads=4, num_seqs=8, decode_query_len=2, seq_len=512, num_tokens=64)


def test_requests_compile_nothing() -> None:
    """Every launch of batches of many sizes has the key of one that warming up made, and each of
    those is asked for.

    Keys are those of Triton itself, which its interpreter has none of.
    """
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.warm_up_keys"],
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(results) == 39
    for result in results:
        assert result["compiled"] > 5, result
        assert result["cold"] == [], result
        assert result["in vain"] == [], result


@pytest.mark.parametrize("name", ["decode-long", "odd-split-int8-0"])
def test_launches_leave_the_cache_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They run as they are, and change nothing in a cache that is in use."""
    monkeypatch.setattr(warm_up, "INTERPRETED", False)
    case = next(case for case in (*CASES, *QUANTIZED_CASES) if case.name == name)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    inputs = build(case, torch.float32, device)
    before = inputs.kv_cache.clone()
    assert ops.bind(inputs.layer).warm_up(inputs.kv_cache, LIMITS) > 10
    torch.testing.assert_close(inputs.kv_cache, before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about the interpreter")
def test_the_interpreter_has_nothing_to_compile() -> None:
    inputs = build(CASES[0], torch.float32)
    assert ops.bind(inputs.layer).warm_up(inputs.kv_cache, LIMITS) == 0
