"""vLLM's model classes with latent attention; everything else in them stays vLLM's."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from vllm.config import VllmConfig
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.mistral import MistralForCausalLM
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.model_executor.models.utils import WeightsMapper

from recalkv_vllm.checkpoint import AttentionGeometry, FactorReader, RecalkvConfig
from recalkv_vllm.serving.factors import locate_factors
from recalkv_vllm.serving.self_attention import FACTORS, LatentSelfAttention

_FACTOR_NAME = re.compile(rf"layers\.\d+\.({'|'.join(FACTORS)})$")


@contextmanager
def _stock_attention_backend(vllm_config: VllmConfig) -> Iterator[None]:
    """Let the attention layers that we replace be built with whatever vLLM prefers.

    Our backend rightly refuses to run a stock layer; these never run.
    """
    attention_config = vllm_config.attention_config
    chosen, attention_config.backend = attention_config.backend, None
    try:
        yield
    finally:
        attention_config.backend = chosen


def _without_kv_projections(mapper: WeightsMapper) -> WeightsMapper:
    """Names of a layer without fused qkv: ``q_proj`` is itself, k and v leave but their bias."""
    return replace(
        mapper,
        orig_to_new_regex={
            **mapper.orig_to_new_regex,
            re.compile(r"\.self_attn\.(k|v)_proj\.bias$"): r".self_attn.\1_bias",
            re.compile(r"\.self_attn\.(k|v)_proj\."): None,
        },
        orig_to_new_stacked={
            old: new for old, new in mapper.orig_to_new_stacked.items() if new[0] != ".qkv_proj"
        },
    )


class LatentAttentionMixin:
    """Put before one of vLLM's causal language models to give it latent attention."""

    packed_modules_mapping = {"gate_up_proj": ["gate_proj", "up_proj"]}  # noqa: RUF012

    def __init_subclass__(cls) -> None:
        cls.hf_to_vllm_mapper = _without_kv_projections(cls.hf_to_vllm_mapper)

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        with _stock_attention_backend(vllm_config):
            super().__init__(vllm_config=vllm_config, prefix=prefix)
        hf_config = vllm_config.model_config.hf_config.to_dict()
        self.recalkv_config = RecalkvConfig.from_hf_config(hf_config)
        self.recalkv_geometry = AttentionGeometry.from_hf_config(hf_config)
        self.recalkv_model_config = vllm_config.model_config
        self.model.hf_to_vllm_mapper = _without_kv_projections(self.model.hf_to_vllm_mapper)
        for i in range(self.model.start_layer, self.model.end_layer):
            layer = self.model.layers[i]
            layer.self_attn = LatentSelfAttention(
                layer.self_attn, self.recalkv_config.layers[i], self.recalkv_geometry, vllm_config
            )

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load the base weights that vLLM found and our factors; returns the names loaded.

        The factors are read by our own strict reader: vLLM passes their file by when the weights
        have an index, and does not notice a missing parameter of a linear layer.
        """
        loaded = super().load_weights(
            (name, weight) for name, weight in weights if not _FACTOR_NAME.match(name)
        )
        path = locate_factors(self.recalkv_model_config)
        with FactorReader(path, self.recalkv_config, self.recalkv_geometry) as reader:
            for i in range(self.model.start_layer, self.model.end_layer):
                names = self.model.layers[i].self_attn.load_factors(reader, i)
                loaded |= {f"model.layers.{i}.self_attn.{name}" for name in names}
        return loaded


class RecalkvLlamaForCausalLM(LatentAttentionMixin, LlamaForCausalLM):
    """Llama; also SmolLM2 and other models of the same architecture."""


class RecalkvMistralForCausalLM(LatentAttentionMixin, MistralForCausalLM):
    """Mistral."""


class RecalkvQwen2ForCausalLM(LatentAttentionMixin, Qwen2ForCausalLM):
    """Qwen2 and Qwen2.5, with their QKV bias."""
