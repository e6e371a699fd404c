"""What is known of a batch before its layers run: built once, read by all of them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.utils import split_decodes_and_prefills

from recalkv_vllm.ops import Batch
from recalkv_vllm.ops.dispatch import candidates
from recalkv_vllm.serving.attention.prefills import Prefills


@dataclass(slots=True)
class LatentMetadata(AttentionMetadata):
    """One batch, the same for all layers.

    Args:
        batch: what the kernels are told of it.
        num_actual_tokens: its tokens without padding.
        prefills: its sequences that are not decodes, if there are any that kernels take apart, and
            the host knows their lengths.
    """

    batch: Batch
    num_actual_tokens: int
    prefills: Prefills | None = None


class LatentMetadataBuilder(AttentionMetadataBuilder[LatentMetadata]):
    """Builds :class:`LatentMetadata`, once per batch for all builders.

    vLLM makes a builder per distinct cache spec, which with a rank of its own is one per layer;
    what they build differs by the block table of their cache group only.
    """

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: Any):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        # Decodes, verification of speculated tokens among them, come first in the batch. Kernels
        # for a CPU ask for no order, and vLLM's search for one takes .1 ms a step.
        ordered = candidates(torch.device(device).type) != ("cpu",)
        self._init_reorder_batch_threshold(1 if ordered else None, supports_spec_as_decode=True)

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        """Decodes of one length: grids of the GPU kernels follow from the sizes of a batch alone.

        The reference reads lengths on the host.
        """
        if os.environ.get("RECALKV_KERNEL") == "reference":
            return AttentionCGSupport.NEVER
        return AttentionCGSupport.UNIFORM_BATCH

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> LatentMetadata:
        common: Any = common_attn_metadata  # to keep what is built on it
        # A drafter, which asks for a fast build, changes the object from step to step, and what its
        # tensors hold: work lists are not for its next step.
        built = None if fast_build else getattr(common, "_recalkv_metadata", None)
        if built is None or not (
            built.batch.block_table is common.block_table_tensor
            and built.batch.query_start_loc is common.query_start_loc
            and built.batch.seq_lens is common.seq_lens
            and built.batch.max_seq_len == common.max_seq_len
            and built.num_actual_tokens == common.num_actual_tokens
        ):
            num_decodes = num_decode_tokens = 0
            threshold = self.reorder_batch_threshold
            if threshold is not None:
                num_decodes, _, num_decode_tokens, _ = split_decodes_and_prefills(common, threshold)
            batch = Batch(
                block_table=common.block_table_tensor,
                seq_lens=common.seq_lens,
                query_start_loc=common.query_start_loc,
                num_decodes=num_decodes,
                num_decode_tokens=num_decode_tokens,
                max_decode_query_len=threshold or 1,
                max_seq_len=common.max_seq_len,
                work_lists={},
            )
            prefills = None
            lengths_cpu = common.seq_lens_cpu_upper_bound
            if threshold is not None and num_decodes < batch.num_seqs and lengths_cpu is not None:
                # vLLM's bound is exact but for decodes.
                prefills = Prefills(batch, common.query_start_loc_cpu, lengths_cpu)
            built = LatentMetadata(batch, common.num_actual_tokens, prefills)
            common._recalkv_metadata = built
        return built
