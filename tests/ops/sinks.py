"""What sinks do by their definition, checked on any implementation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from recalkv_vllm.ops import LatentLayer
from recalkv_vllm.ops.contract import BoundLayer
from tests.ops.cases import AttentionInputs, build, spanned

Bind = Callable[[LatentLayer], BoundLayer]
#: Few and many queries, so that values are summed as latents and reconstructed; no two rows alike.
CASE = spanned(
    "sinks", (6, 2, 64), 1, 32, 2, 96, batch=((1, 45), (90, 130), (3, 3)), sinks=True
)  # fmt: skip


def _inputs(dtype: torch.dtype, device: torch.device | str) -> AttentionInputs:
    inputs = build(CASE, dtype, device)
    generator = torch.Generator().manual_seed(2)
    bias = torch.randn(inputs.layer.v_up.shape[:2], generator=generator)
    return inputs.change(v_bias=bias.to(device, dtype))


def check_a_sink_of_nothing(
    bind: Bind, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> None:
    """One of minus infinity leaves every bit of the heads as it is."""
    inputs = _inputs(dtype, device)
    sinks = inputs.layer.sinks
    assert sinks is not None
    without = bind(replace(inputs.layer, sinks=None)).attend_heads(*inputs.call)
    nothing = replace(inputs.layer, sinks=torch.full_like(sinks, -torch.inf))
    assert torch.equal(bind(nothing).attend_heads(*inputs.call), without)
    assert not torch.equal(bind(inputs.layer).attend_heads(*inputs.call), without)


def check_a_sink_of_all(bind: Bind, dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
    """One that outweighs all tokens leaves nothing of a head, its bias included."""
    inputs = _inputs(dtype, device)
    sinks = inputs.layer.sinks
    assert sinks is not None
    of_one = sinks.clone()
    of_one[2] = 3e4
    heads = bind(replace(inputs.layer, sinks=of_one)).attend_heads(*inputs.call)
    assert heads[:, 2].eq(0).all()
    others = bind(inputs.layer).attend_heads(*inputs.call)
    others[:, 2] = 0
    assert torch.equal(heads, others)


def check_a_sink_is_a_token_of_no_value(
    bind: Bind, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> None:
    """A latent of zeros has a logit of zero and a value of zero, and so has a sink of zero."""
    case = replace(CASE, rot_dim=0, batch=tuple((count, n + 1) for count, n in CASE.batch))
    longer = build(replace(case, sinks=False), dtype, device)
    first = longer.batch.block_table[:, 0].long()
    longer.kv_cache[first, 0] = 0
    with_token = bind(longer.layer).attend_heads(*longer.call)
    # The same sequences without their first token: what was at position n + 1 is at n.
    shorter = build(replace(case, batch=CASE.batch), dtype, device)
    for i, (_, length) in enumerate(CASE.batch):
        for position in range(length):
            source, target = (
                divmod(position + 1, CASE.block_size),
                divmod(position, CASE.block_size),
            )
            shorter.kv_cache[shorter.batch.block_table[i, target[0]], target[1]] = longer.kv_cache[
                longer.batch.block_table[i, source[0]], source[1]
            ]
    assert shorter.layer.sinks is not None
    layer = replace(longer.layer, sinks=torch.zeros_like(shorter.layer.sinks))
    with_sink = bind(layer).attend_heads(longer.q, shorter.kv_cache, shorter.batch)
    torch.testing.assert_close(with_sink, with_token, rtol=1e-4, atol=1e-4)
