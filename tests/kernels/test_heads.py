"""Head outputs in Triton's interpreter: value latents are merged and projected in one launch."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch

from recalkv_vllm.ops import triton as ops
from recalkv_vllm.ops.triton.launch import Launch
from tests.kernels.pieces import cut_into
from tests.ops.cases import CASES, QUANTIZED_CASES, AttentionCase, build, spanned
from tests.ops.checks import assert_within
from tests.ops.rounding import allowed_heads_error
from tests.ops.sinks import (
    check_a_sink_is_a_token_of_no_value,
    check_a_sink_of_all,
    check_a_sink_of_nothing,
)
from tests.ops.test_attend_heads import heads_in_torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BY_NAME = {case.name: case for case in CASES + QUANTIZED_CASES}
#: Decodes of up to three queries first, then others, then rows of no sequence.
HINTED = spanned(
    "decodes-first",
    (8, 2, 64),
    1,
    32,
    2,
    32,
    batch=((1, 45), (3, 50), (0, 0), (2, 2), (20, 20), (13, 47)),
    padding_rows=2,
)
HINTS = {"num_decodes": 4, "num_decode_tokens": 6, "max_decode_query_len": 3, "max_seq_len": 64}


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each kernel was launched."""
    counts: Counter[str] = Counter()
    run = Launch.run

    def counting(launch: Launch) -> None:
        counts[launch.kernel.__name__] += 1
        run(launch)

    monkeypatch.setattr(Launch, "run", counting)
    return counts


def check(case: AttentionCase, dtype: torch.dtype, **hints: Any) -> None:
    _, exact, _ = heads_in_torch(case, dtype, bias=True)
    inputs = build(case, dtype, DEVICE).change(**hints)
    bias = torch.randn(inputs.layer.v_up.shape[:2], generator=torch.Generator().manual_seed(1))
    inputs = inputs.change(v_bias=bias.to(DEVICE, dtype))
    rows = sum(queries for queries, _ in case.batch)
    tokens, num_heads, head_dim = inputs.q.shape
    # The middle of something wider, and not a number where nothing is written.
    whole = torch.full((tokens, num_heads + 2, head_dim), torch.nan, dtype=dtype, device=DEVICE)
    out = whole[:, 1:-1]
    heads = ops.bind(inputs.layer).attend_heads(*inputs.call, out=out)
    assert heads is out
    allowed = allowed_heads_error(inputs, dtype)
    assert_within(heads[:rows].cpu(), exact[:rows], allowed[:rows].cpu(), str(case))
    assert heads[rows:].isfinite().all()
    assert whole[:, 0].isnan().all()
    assert whole[:, -1].isnan().all()


@pytest.mark.parametrize(
    ("name", "dtype", "pieces"),
    [
        ("decode-lengths", torch.float32, 9),  # most saw no token, and were not written
        ("mixed", torch.float32, 3),
        ("mixed", torch.bfloat16, 1),
        ("one-v-group-many-k", torch.bfloat16, 2),
        ("odd-joint-int8-16", torch.bfloat16, 2),
        ("sinks", torch.float32, 4),
        ("sinks", torch.bfloat16, 1),
    ],
    ids=str,
)
def test_pieces(
    name: str, dtype: torch.dtype, pieces: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_into(pieces, monkeypatch)
    check(BY_NAME[name], dtype)


@pytest.mark.parametrize("pieces", [1, 3])
def test_decodes_first(
    pieces: int, launched: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_into(pieces, monkeypatch)
    check(HINTED, torch.bfloat16, **HINTS)
    cuts = {} if pieces == 1 else {"cut_batch": 2}
    assert launched == {"latent_attention": 2, "project_values": 2} | cuts


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("pieces", [1, 3])
def test_decode_takes_two_launches(
    pieces: int, sinks: bool, launched: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And one that cuts the batch, for all layers of a step."""
    cut_into(pieces, monkeypatch)
    case = replace(BY_NAME["decode-lengths"], name="decodes", sinks=sinks)
    hints: dict[str, Any] = {"num_decodes": 6, "num_decode_tokens": 6, "work_lists": {}}
    for _ in range(2):
        check(case, torch.bfloat16, **hints)
    cuts = {} if pieces == 1 else {"cut_batch": 1}
    assert launched == {"latent_attention": 2, "project_values": 2} | cuts


@pytest.mark.parametrize("pieces", [1, 3])
def test_sinks(pieces: int, monkeypatch: pytest.MonkeyPatch) -> None:
    cut_into(pieces, monkeypatch)
    check_a_sink_of_nothing(ops.bind, torch.float32, DEVICE)
    check_a_sink_of_all(ops.bind, torch.float32, DEVICE)
    check_a_sink_is_a_token_of_no_value(ops.bind, torch.float32, DEVICE)


def test_nan_in_the_cache_reaches_the_heads_that_see_it(monkeypatch: pytest.MonkeyPatch) -> None:
    cut_into(3, monkeypatch)
    inputs = build(BY_NAME["decode-long"], torch.float32, DEVICE)
    block = inputs.batch.block_table[0, 2]
    inputs.kv_cache[block, 3, inputs.layer.v_spans[1].start] = torch.nan
    heads = ops.bind(inputs.layer).attend_heads(*inputs.call)
    assert heads[:, 2:].isnan().all()
    assert heads[:, :2].isfinite().all()
