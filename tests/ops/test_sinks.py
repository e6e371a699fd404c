"""Attention sinks: the reference by their definition, and what every version makes of them."""

from __future__ import annotations

import pytest
import torch

from recalkv_vllm.ops import cpu, reference
from tests.ops.cases import BLOCK, build, spanned
from tests.ops.cpu_versions import VERSIONS
from tests.ops.sinks import (
    Bind,
    check_a_sink_is_a_token_of_no_value,
    check_a_sink_of_all,
    check_a_sink_of_nothing,
)

WIDE = torch.float64


def test_the_reference_is_a_softmax_over_one_more_logit() -> None:
    case = spanned("one", (6, 2, 64), 1, 32, 2, 32, batch=((7, 40),), sinks=True)
    inputs = build(case, WIDE)
    layer, q = inputs.layer, inputs.q
    z, _ = reference.cached_tokens(layer, inputs.kv_cache, inputs.batch.block_table[0], 40)
    keys = reference.reconstruct_keys(layer, z, torch.arange(40))
    logits = reference.causal_logits(layer, q, keys)
    assert layer.sinks is not None
    sinks = layer.sinks[:, None, None].expand(-1, 7, 1)
    weights = torch.cat((logits, sinks), dim=-1).softmax(dim=-1)[..., :-1]
    values = reference.reconstruct_values(layer, z).repeat_interleave(3, dim=1)
    expected = torch.einsum("hqn,nhd->qhd", weights, values)
    heads = reference.paged_latent_heads(layer, *inputs.call, compute_dtype=WIDE)
    torch.testing.assert_close(heads, expected)


BINDS: list[tuple[Bind, torch.dtype]] = [
    (reference.bind, torch.float32),
    (reference.bind, torch.bfloat16),
    (cpu.bind, torch.float32),
    (cpu.bind, torch.bfloat16),
]
IDS = [f"{bind.__module__.rpartition('.')[2]}-{dtype}" for bind, dtype in BINDS]


@pytest.mark.parametrize(("bind", "dtype"), BINDS, ids=IDS)
def test_a_sink_of_nothing(bind: Bind, dtype: torch.dtype) -> None:
    check_a_sink_of_nothing(bind, dtype)


@pytest.mark.parametrize(("bind", "dtype"), BINDS, ids=IDS)
def test_a_sink_of_all(bind: Bind, dtype: torch.dtype) -> None:
    check_a_sink_of_all(bind, dtype)


@pytest.mark.parametrize(
    ("bind", "isa"),
    [
        pytest.param(reference.bind, "", id="reference"),
        *(pytest.param(cpu.bind, isa, id=isa) for isa, dtype in VERSIONS if dtype == torch.float32),
    ],
)
def test_a_sink_is_a_token_of_no_value(
    bind: Bind, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RECALKV_CPU_ISA", isa)
    check_a_sink_is_a_token_of_no_value(bind, torch.float32)


def test_attention_itself_knows_no_sinks() -> None:
    case = spanned("one", (4, 2, 64), 1, 32, 2, 32, batch=((1, BLOCK + 1),), sinks=True)
    inputs = build(case, torch.float32)
    without = cpu.bind(inputs.change(sinks=None).layer).attend(*inputs.call)
    for got, expected in zip(cpu.bind(inputs.layer).attend(*inputs.call), without, strict=True):
        assert torch.equal(got, expected)


def test_queries_of_other_heads_are_refused() -> None:
    case = spanned("one", (4, 2, 64), 1, 32, 2, 32, batch=((1, 20),), sinks=True)
    inputs = build(case, torch.float32)
    with pytest.raises(ValueError, match="q: expected as many heads as sinks, found 2"):
        cpu.bind(inputs.layer).attend_heads(inputs.q[:, :2], inputs.kv_cache, inputs.batch)
