"""The attention backend ``RECALKV``: what vLLM asks about it, and its per-batch metadata."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.attention.backends.utils import split_decodes_and_prefills
from vllm.v1.kv_cache_interface import KVCacheLayout

from recalkv_vllm.ops import Batch
from recalkv_vllm.serving.registration import BACKEND_NAME

SUPPORTED_DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SUPPORTED_KV_CACHE_DTYPES = ["auto", "float32", "bfloat16", "float16", "fp8", "fp8_e4m3"]


class RecalkvBackend(AttentionBackend):
    """Attention over a paged cache of latents."""

    forward_includes_kv_cache_update = False
    supported_dtypes: ClassVar[list[torch.dtype]] = SUPPORTED_DTYPES
    supported_kv_cache_dtypes: ClassVar[list[Any]] = SUPPORTED_KV_CACHE_DTYPES

    @staticmethod
    def get_name() -> str:
        return BACKEND_NAME

    @staticmethod
    def get_impl_cls() -> type:
        from recalkv_vllm.serving.attention import LatentAttentionImpl

        return LatentAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[LatentMetadataBuilder]:
        return LatentMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        return [MultipleOf(16)]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        # Kernels index by stride; with one latent "head", both mean a token's latent is contiguous.
        return (KVCacheLayout.LBNHC, KVCacheLayout.LBHNC)

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def validate_configuration(cls, *args: Any, **kwargs: Any) -> list[str]:
        """Reasons against serving a stock attention layer: our own layers never ask.

        vLLM asks this for layers of models without factors, on platforms whose selector checks.
        """
        return [
            "this model has no low-rank factors; compress it first: "
            "recalkv compress MODEL -o OUT --compression 0.5"
        ]


@dataclass(slots=True)
class LatentMetadata(AttentionMetadata):
    """One batch, the same for all layers.

    Args:
        batch: what the kernels are told of it.
        num_actual_tokens: its tokens without padding.
    """

    batch: Batch
    num_actual_tokens: int


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
        common = common_attn_metadata
        built = getattr(common, "_recalkv_metadata", None)
        # A drafter changes the object from step to step.
        if built is None or not (
            built.batch.block_table is common.block_table_tensor
            and built.batch.query_start_loc is common.query_start_loc
            and built.batch.seq_lens is common.seq_lens
            and built.batch.max_seq_len == common.max_seq_len
            and built.num_actual_tokens == common.num_actual_tokens
        ):
            threshold = self.reorder_batch_threshold
            num_decodes, _, num_decode_tokens, _ = split_decodes_and_prefills(common, threshold)
            batch = Batch(
                block_table=common.block_table_tensor,
                seq_lens=common.seq_lens,
                query_start_loc=common.query_start_loc,
                num_decodes=num_decodes,
                num_decode_tokens=num_decode_tokens,
                max_decode_query_len=threshold,
                max_seq_len=common.max_seq_len,
            )
            built = LatentMetadata(batch, common.num_actual_tokens)
            common._recalkv_metadata = built
        return built
