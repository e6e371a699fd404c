"""The reference itself, against torch's dense attention where the two must agree."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from recalkv_vllm.ops import Batch, LatentLayer, reference
from tests.ops.cases import CASES, attend_in_torch, build, split_spans


def test_identity_factors_are_plain_attention() -> None:
    """Full rank with L = I: keys and values are slices of the latent."""
    heads, d, length, queries = 3, 32, 40, 7
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(length, 2 * heads * d, generator=generator, dtype=torch.float64)
    q = torch.randn(queries, heads, d, generator=generator, dtype=torch.float64)
    cache = torch.full((4, 16, 2 * heads * d), torch.nan, dtype=torch.float64)
    blocks = [2, 0, 3]
    for position in range(length):
        cache[blocks[position // 16], position % 16] = z[position]
    identity = torch.eye(d, dtype=torch.float64).expand(heads, d, d)
    layer = LatentLayer(
        k_up=identity,
        v_up=identity,
        k_spans=split_spans(heads, d),
        v_spans=split_spans(heads, d, heads * d),
        head_dim=d,
        scale=d**-0.5,
    )
    batch = Batch(
        block_table=torch.tensor([[*blocks, 1]], dtype=torch.int32),
        seq_lens=torch.tensor([length], dtype=torch.int32),
        query_start_loc=torch.tensor([0, queries], dtype=torch.int32),
    )
    o_lat, lse = reference.paged_latent_attention(
        layer, q, cache, batch, compute_dtype=torch.float64
    )
    keys, values = z.view(length, 2, heads, d).permute(1, 2, 0, 3)
    visible = torch.ones(queries, length, dtype=torch.bool).tril(length - queries)
    dense = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None], keys[None], values[None], attn_mask=visible
    )
    torch.testing.assert_close(o_lat, dense[0].transpose(0, 1))
    logits = (q.transpose(0, 1) @ keys.transpose(1, 2)) * d**-0.5
    expected = logits.masked_fill(~visible, -torch.inf).logsumexp(-1).T
    torch.testing.assert_close(lse, expected)


def test_rope_keeps_length_and_relative_angle() -> None:
    x = torch.randn(5, 2, 64, dtype=torch.float64)
    case = next(case for case in CASES if case.name == "interleaved")
    table = build(case, torch.float64).layer.cos_sin_cache.double()
    for is_neox in (True, False):
        at = [reference.apply_rope(x, torch.full((5,), p), table, is_neox) for p in (0, 3, 10, 13)]
        torch.testing.assert_close(at[0], x)
        torch.testing.assert_close(at[2].norm(dim=-1), x.norm(dim=-1), rtol=1e-6, atol=0)
        near = (at[0] * at[1]).sum(-1)
        far = (at[2] * at[3]).sum(-1)
        torch.testing.assert_close(near, far, rtol=1e-4, atol=1e-4)


def test_bound_reference_is_the_reference() -> None:
    inputs = build(CASES[5], torch.float32)
    results = reference.bind(inputs.layer).attend(*inputs.call)
    for bound, direct in zip(results, attend_in_torch(inputs, torch.float32), strict=True):
        torch.testing.assert_close(bound, direct, rtol=0, atol=0, equal_nan=True)
