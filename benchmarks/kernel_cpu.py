"""The CPU side of the kernel benchmark: our C++ attention against vLLM's CPU attention kernel.

Both read a cache of ``layers`` layers in turn, as a decode step does, so that data come from where
they come from when a model is served.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable

import torch

from recalkv_vllm import ops
from recalkv_vllm.band_format import CacheFormat
from recalkv_vllm.compression.errors import InputError
from recalkv_vllm.ops import Batch, reference
from recalkv_vllm.ops.cpu.plan import instruction_set

from .geometries import Geometry, Latent
from .inputs import latent_cache, latent_layer
from .runs import Runs

BLOCK_SIZE = 128
#: Layers take turns up to this much memory per kernel.
CACHE_BYTES = 1 << 30


def largest_cache_bytes() -> int:
    """Largest uncompressed cache of one layer that is measured."""
    return 4 << 30


def clean_up() -> None:
    """Nothing is left behind by a combination."""


def build(
    geometry: Geometry,
    latent: Latent,
    latent_format: CacheFormat | None,
    context: int,
    num_seqs: int,
    queries: int,
    dtype: torch.dtype,
) -> Runs:
    """Random inputs of one configuration.

    Raises:
        InputError: vLLM's CPU kernels cannot be imported.
    """
    blocks = -(-context // BLOCK_SIZE)
    layers = max(1, CACHE_BYTES // geometry.cache_bytes(context, num_seqs, dtype))
    layers = min(layers, geometry.layers)
    batch = Batch(
        block_table=torch.randperm(blocks * num_seqs, dtype=torch.int32).view(num_seqs, blocks),
        seq_lens=torch.full((num_seqs,), context, dtype=torch.int32),
        query_start_loc=torch.arange(num_seqs + 1, dtype=torch.int32) * queries,
    )
    q = torch.randn(num_seqs * queries, geometry.num_heads, geometry.head_dim).to(dtype)

    layer = latent_layer(geometry, latent, context, dtype, latent_format=latent_format)
    ours, slow = ops.bind(layer), reference.bind(layer)
    # One random layer, copied: only where the bytes lie matters.
    one = latent_cache(blocks * num_seqs, BLOCK_SIZE, latent.rank, q, layer, ours)
    caches = itertools.cycle([one.clone() for _ in range(layers)])
    return Runs(
        kernel=f"cpu {instruction_set(dtype)}",
        calls=1,
        ours=lambda: ours.attend_heads(q, next(caches), batch),
        stock={"vLLM CPU_ATTN": _stock(geometry, q, layers, batch)},
        reference=lambda: slow.attend_heads(q, next(caches), batch),
    )


def _stock(geometry: Geometry, q: torch.Tensor, layers: int, batch: Batch) -> Callable[[], object]:
    # vLLM logs to stdout, which belongs to the result.
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    try:
        from vllm import _custom_ops
    except ImportError as error:
        raise InputError(
            f"vllm: expected its CPU build (the extra 'cpu') as the baseline, found {error}"
        ) from error

    heads, head_dim = geometry.num_kv_heads, geometry.head_dim
    # As vLLM's own backend chooses for blocks of a multiple of 32 (cpu_attn.py, _get_attn_isa).
    amx = torch.cpu._is_amx_tile_supported() and q.dtype == torch.bfloat16
    isa = "amx" if amx else "vec"
    metadata = _custom_ops.cpu_attn_get_scheduler_metadata(
        num_reqs=batch.num_seqs,
        num_heads=geometry.num_heads,
        num_kv_heads=heads,
        head_dim=head_dim,
        seq_lens=batch.seq_lens,
        dtype=q.dtype,
        query_start_loc=batch.query_start_loc,
        causal=True,
        sliding_window_size=-1,
        isa=isa,
        enable_kv_split=True,
    )
    one = torch.randn(batch.block_table.numel(), heads, 2 * BLOCK_SIZE, head_dim).to(q.dtype)
    caches = itertools.cycle([one.clone().chunk(2, dim=2) for _ in range(layers)])
    output = torch.empty_like(q)

    def run() -> None:
        keys, values = next(caches)
        _custom_ops.cpu_attention_with_kv_cache(
            query=q,
            key_cache=keys,
            value_cache=values,
            output=output,
            query_start_loc=batch.query_start_loc,
            seq_lens=batch.seq_lens,
            scale=head_dim**-0.5,
            causal=True,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=batch.block_table,
            softcap=0,
            scheduler_metadata=metadata,
            s_aux=None,
        )

    return run
