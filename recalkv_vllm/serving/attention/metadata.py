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

from recalkv_vllm.ops import BatchHints


@dataclass(slots=True)
class LatentMetadata(AttentionMetadata):
    """One batch, the same for all layers.

    Args:
        query_start_loc: ``[num_reqs + 1]`` int32.
        seq_lens: ``[num_reqs]`` int32, cached tokens including this step's.
        block_table: ``[num_reqs, max_blocks]`` int32.
        num_actual_tokens: tokens of the batch without padding.
        hints: what the host knows of the batch.
    """

    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    num_actual_tokens: int
    hints: BatchHints


class LatentMetadataBuilder(AttentionMetadataBuilder[LatentMetadata]):
    """Builds :class:`LatentMetadata`, once per batch for all builders.

    vLLM makes a builder per distinct cache spec, which with a rank of its own is one per layer;
    what they build differs by the block table of their cache group only.
    """

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: Any):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        # Decodes, verification of speculated tokens among them, come first in the batch.
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)

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
        built = getattr(common, "_recalkv_metadata", None)
        # A drafter changes the object from step to step.
        if built is None or not (
            built.block_table is common.block_table_tensor
            and built.query_start_loc is common.query_start_loc
            and built.seq_lens is common.seq_lens
            and built.num_actual_tokens == common.num_actual_tokens
            and built.hints.max_seq_len == common.max_seq_len
        ):
            threshold = self.reorder_batch_threshold
            assert threshold is not None
            num_decodes, _, num_decode_tokens, _ = split_decodes_and_prefills(common, threshold)
            built = LatentMetadata(
                query_start_loc=common.query_start_loc,
                seq_lens=common.seq_lens,
                block_table=common.block_table_tensor,
                num_actual_tokens=common.num_actual_tokens,
                hints=BatchHints(num_decodes, num_decode_tokens, threshold, common.max_seq_len),
            )
            common._recalkv_metadata = built
        return built
