"""The attention backend ``RECALKV``: what vLLM asks about it."""

from __future__ import annotations

from functools import cache
from typing import Any, ClassVar

import torch
from vllm.v1.attention.backend import AttentionBackend, MultipleOf
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec, KVCacheLayout

from recalkv_vllm.serving.attention.implementation import (
    FORWARD_UPDATES_CACHE,
    LatentAttentionImpl,
)
from recalkv_vllm.serving.attention.metadata import LatentMetadataBuilder
from recalkv_vllm.serving.names import BACKEND_NAME

SUPPORTED_DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SUPPORTED_KV_CACHE_DTYPES = ["auto", "float32", "bfloat16", "float16", "fp8", "fp8_e4m3"]


class RecalkvBackend(AttentionBackend):
    """Attention over a paged cache of latents."""

    forward_includes_kv_cache_update = FORWARD_UPDATES_CACHE
    supported_dtypes: ClassVar[list[torch.dtype]] = SUPPORTED_DTYPES
    supported_kv_cache_dtypes: ClassVar[list[Any]] = SUPPORTED_KV_CACHE_DTYPES

    @staticmethod
    def get_name() -> str:
        return BACKEND_NAME

    @staticmethod
    def get_impl_cls() -> type[LatentAttentionImpl]:
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


def page_sizes(width: int, dtype: torch.dtype) -> dict[str, Any]:
    """What vLLM's specs of a cache are told of slots of ``width`` elements of ``dtype``."""
    # vLLM counts head_size + head_size_v elements per head; ours is one head of all of a slot.
    half = width // 2
    return {
        "num_kv_heads": 1,
        "head_size": width - half,
        "head_size_v": half,
        "dtype": dtype,
        "max_tp_shards": 1,
    }


@cache
def with_pages(width: int, dtype: torch.dtype) -> type[RecalkvBackend]:
    """The backend of layers with slots of ``width`` elements of ``dtype``.

    Beside layers without attention, vLLM asks the backend how large a block of the cache is, makes
    blocks as long as such a layer's state needs, and the state's page as large as a block.
    """

    class PagedBackend(RecalkvBackend):
        @classmethod
        def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
            return FullAttentionSpec(block_size=spec.block_size, **page_sizes(width, dtype))

    return PagedBackend
