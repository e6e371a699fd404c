"""Stock GPU attention kernels on an uncompressed cache: the baselines of the kernel benchmark.

Each maker takes a :class:`Problem` and returns a function that attends one layer's cache, chosen by
index, and raises :class:`UnavailableError` where its library is not there.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.functional import scaled_dot_product_attention

from recalkv_vllm.ops import Batch

from .geometries import Geometry

#: Names vLLM's FlashAttention 3 extension (``vllm_flash_attn/_vllm_fa3_C.abi3.so`` of its wheel) on
#: a machine with torch but without vLLM. Its ABI is stable, and loading it registers its ops.
FA3_LIBRARY = "RECALKV_FA3_LIBRARY"
Attend = Callable[[int], torch.Tensor]


class UnavailableError(Exception):
    """A stock kernel cannot run here; the message says why."""


@dataclass(frozen=True, slots=True)
class Problem:
    """Decode or verification over ``layers`` uncompressed caches of one geometry.

    Args:
        q: ``[num_seqs · queries, h_q, d]``.
        cache: ``[layers, 2, num_blocks, block_size, h_kv, d]``, keys and values.
        batch: sequences of ``context`` tokens each.
    """

    geometry: Geometry
    q: torch.Tensor
    cache: torch.Tensor
    batch: Batch
    context: int
    queries: int

    @property
    def scale(self) -> float:
        return self.geometry.head_dim**-0.5

    def contiguous(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values ``[num_seqs, capacity, h_kv, d]`` for kernels without block tables: the
        same memory, blocks taken in their own order."""
        keys, values = self.cache[layer].flatten(1, 2).unflatten(1, (self.batch.num_seqs, -1))
        return keys, values


def flash_attention(problem: Problem) -> Attend:
    """What vLLM's FLASH_ATTN backend calls: FlashAttention 3 on Hopper, 2 elsewhere."""
    try:
        from vllm.vllm_flash_attn import flash_attn_varlen_func
    except ImportError as error:
        raise UnavailableError(f"vLLM's FlashAttention cannot be imported ({error})") from error
    version = 3 if torch.cuda.get_device_capability()[0] == 9 else 2

    def attend(layer: int) -> torch.Tensor:
        keys, values = problem.cache[layer]
        return flash_attn_varlen_func(
            q=problem.q,
            k=keys,
            v=values,
            max_seqlen_q=problem.queries,
            cu_seqlens_q=problem.batch.query_start_loc,
            max_seqlen_k=problem.context,
            seqused_k=problem.batch.seq_lens,
            softmax_scale=problem.scale,
            causal=True,
            block_table=problem.batch.block_table,
            fa_version=version,
        )

    return attend


def flash_attention_library(problem: Problem) -> Attend:
    """The same FlashAttention 3 kernel out of the file that ``$RECALKV_FA3_LIBRARY`` names."""
    path = os.environ.get(FA3_LIBRARY)
    if path is None:
        raise UnavailableError(f"{FA3_LIBRARY} is not set")
    try:
        torch.ops.load_library(path)
    except OSError as error:
        raise UnavailableError(f"{FA3_LIBRARY}={path}: {error}") from error
    forward = torch.ops._vllm_fa3_C.fwd

    def attend(layer: int) -> torch.Tensor:
        keys, values = problem.cache[layer]
        # By position: its arguments have no defaults (vLLM 0.32).
        return forward(
            problem.q,
            keys,
            values,
            *(None,) * 4,  # k_new, v_new, q_v, out
            problem.batch.query_start_loc,
            *(None,) * 3,  # cu_seqlens_k, cu_seqlens_k_new, seqused_q
            problem.batch.seq_lens,
            problem.queries,
            problem.context,
            problem.batch.block_table,
            *(None,) * 8,  # kv_batch_idx, leftpad_k, rotary (3), descale of q, k, v
            problem.scale,
            True,  # causal
            -1,
            -1,  # window
            0.0,  # soft cap
            True,  # rotary_interleaved
            None,  # scheduler_metadata
            0,  # num_splits: the kernel chooses
            None,  # pack_gqa
            0,  # sm_margin
            None,  # sinks
            1,
            0,
            None,  # context parallelism
        )[0]

    return attend


def xformers_attention(problem: Problem) -> Attend:
    """xformers' memory-efficient attention, the best of its kernels for the shape."""
    try:
        from xformers.ops import memory_efficient_attention_forward
        from xformers.ops.fmha.attn_bias import BlockDiagonalCausalWithOffsetPaddedKeysMask
    except (ImportError, OSError) as error:
        raise UnavailableError(f"xformers cannot be imported ({error})") from error
    heads, kv_heads, d = problem.q.shape[1], problem.geometry.num_kv_heads, problem.q.shape[2]
    grouped = (1, -1, kv_heads, heads // kv_heads, d)
    mask = BlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens(
        q_seqlen=[problem.queries] * problem.batch.num_seqs,
        kv_padding=problem.contiguous(0)[0].shape[1],
        kv_seqlen=[problem.context] * problem.batch.num_seqs,
        device=problem.q.device,
    )

    def attend(layer: int) -> torch.Tensor:
        keys, values = (
            x.reshape(1, -1, kv_heads, 1, d).expand(-1, -1, -1, heads // kv_heads, -1)
            for x in problem.contiguous(layer)
        )
        out = memory_efficient_attention_forward(
            problem.q.view(grouped), keys, values, attn_bias=mask, scale=problem.scale
        )
        return out.view_as(problem.q)

    return attend


def torch_attention(problem: Problem) -> Attend:
    """torch's scaled_dot_product_attention; for single queries, where it needs no mask."""
    if problem.queries != 1:
        raise UnavailableError("needs a dense mask for several queries per sequence")

    def attend(layer: int) -> torch.Tensor:
        keys, values = (x[:, : problem.context].transpose(1, 2) for x in problem.contiguous(layer))
        out = scaled_dot_product_attention(
            problem.q.unsqueeze(2), keys, values, scale=problem.scale, enable_gqa=True
        )
        return out.squeeze(2)

    return attend


MAKERS: dict[str, Callable[[Problem], Attend]] = {
    "vLLM FLASH_ATTN": flash_attention,
    "vLLM FA3 library": flash_attention_library,
    "xformers": xformers_attention,
    "torch SDPA": torch_attention,
}
