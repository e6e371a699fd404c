"""Tensor-parallel shards: together they hold every head, and each reads what the whole would."""

from dataclasses import replace

import pytest
import torch

from recalkv_vllm.checkpoint import AttentionGeometry, LatentLayout
from recalkv_vllm.serving.sharding import shard_latent

GEOMETRY = AttentionGeometry(1, 64, 8, 4, 16)
DISJOINT = LatentLayout(
    128, 1, tuple((16 * g, 16 * g + 16) for g in range(4)), ((64, 96), (96, 128)), (0, 1, 2, 3)
)
PER_HEAD_JOINT = LatentLayout(
    64,
    1,
    tuple((16 * g, 16 * g + 16) for g in range(4)),
    tuple((16 * g, 16 * g + 16) for g in range(4)),
    (0, 1, 2, 3),
)
SHARED_VALUES = LatentLayout(96, 2, ((0, 32), (32, 64)), ((64, 96),), (0, 1, 2, 3))
JOINT = LatentLayout(64, 4, ((0, 48),), ((0, 64),), (0, 1, 2, 3))
OVERLAPPING = LatentLayout(64, 2, ((0, 32), (32, 64)), ((0, 64),), (0, 1, 2, 3))


def keys_and_values(latent, layout_k, layout_v, k_up, v_up):
    keys = [latent[a:b] @ up.T for up, (a, b) in zip(k_up, layout_k, strict=True)]
    per_group = len(v_up) // len(layout_v)
    values = [latent[slice(*layout_v[head // per_group])] @ up.T for head, up in enumerate(v_up)]
    return torch.cat(keys), torch.cat(values)


@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize(
    "layout", [DISJOINT, PER_HEAD_JOINT, SHARED_VALUES, OVERLAPPING, JOINT], ids=range(5)
)
def test_shards_rebuild_the_whole(layout, tp_size):
    torch.manual_seed(0)
    shapes = layout.factor_shapes(GEOMETRY)
    latent = torch.randn(layout.rank)
    k_up, v_up = torch.randn(shapes["k_up"]), torch.randn(shapes["v_up"])
    keys, values = keys_and_values(latent, layout.k_spans, layout.v_spans, k_up, v_up)

    parts = []
    for tp_rank in range(tp_size):
        shard = shard_latent(layout, GEOMETRY, tp_rank, tp_size)
        heads = slice(shard.kv_heads.start, shard.kv_heads.stop)
        own_k_up = k_up.unflatten(1, (-1, GEOMETRY.head_dim)).flatten(0, 1)[heads]
        parts.append(
            keys_and_values(
                latent[list(shard.columns)],
                shard.k_spans,
                shard.v_spans,
                own_k_up.reshape(len(shard.k_spans), -1, k_up.shape[-1]),
                v_up[heads],
            )
        )
    torch.testing.assert_close(torch.cat([k for k, _ in parts]), keys)
    torch.testing.assert_close(torch.cat([v for _, v in parts]), values)


def test_shared_latents_are_replicated_and_others_are_not():
    assert [shard_latent(SHARED_VALUES, GEOMETRY, r, 2).rank for r in range(2)] == [64, 64]
    assert [shard_latent(PER_HEAD_JOINT, GEOMETRY, r, 4).rank for r in range(4)] == [16] * 4
    assert [shard_latent(JOINT, GEOMETRY, r, 4).rank for r in range(4)] == [64] * 4


def test_more_ranks_than_kv_heads_share_heads():
    whole = [shard_latent(DISJOINT, GEOMETRY, r, 4) for r in range(4)]
    doubled = [shard_latent(DISJOINT, GEOMETRY, r, 8) for r in range(8)]
    assert doubled == [shard for shard in whole for _ in range(2)]


def test_ranks_hold_the_key_scales_of_their_heads():
    of_heads = replace(GEOMETRY, key_norm="head")
    shards = [shard_latent(DISJOINT, of_heads, r, 2) for r in range(2)]
    assert [shard.key_scales for shard in shards] == [2, 2]
    assert shard_latent(DISJOINT, of_heads, 0, 8).key_scales == 1
    assert shard_latent(DISJOINT, GEOMETRY, 0, 1).key_scales == 0
    of_all = replace(GEOMETRY, key_norm="token")
    assert shard_latent(DISJOINT, of_all, 0, 1).key_scales == 1
    with pytest.raises(ValueError, match="keys are normed over all heads, found 2"):
        shard_latent(DISJOINT, of_all, 0, 2)


def test_what_does_not_divide_is_refused_with_both_numbers():
    with pytest.raises(ValueError, match="a divisor or a multiple of the 4 KV heads, found 3"):
        shard_latent(SHARED_VALUES, GEOMETRY, 0, 3)
    six = AttentionGeometry(1, 64, 6, 6, 16)
    spans = ((0, 32), (32, 64))
    with pytest.raises(ValueError, match="3 ranks of 2 KV heads and 2 V groups of 3"):
        shard_latent(LatentLayout(64, 6, ((0, 64),), spans, tuple(range(6))), six, 0, 3)
    with pytest.raises(ValueError, match="3 ranks of 2 KV heads and 2 K groups of 3"):
        shard_latent(LatentLayout(64, 3, spans, ((0, 64),), tuple(range(6))), six, 0, 3)
