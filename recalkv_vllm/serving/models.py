"""vLLM's model classes with latent attention; everything else in them stays vLLM's.

The classes themselves are made when asked for, from the table in ``registration``: importing all of
vLLM's models to serve one would cost seconds in every process.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from vllm.config import VllmConfig
from vllm.model_executor.models.utils import WeightsMapper

from recalkv_vllm.checkpoint import AttentionGeometry, FactorReader, RecalkvConfig
from recalkv_vllm.serving.factors import SEPARATE_FACTORS, locate_factors
from recalkv_vllm.serving.latent_dtype import served_format
from recalkv_vllm.serving.registration import ARCHITECTURES
from recalkv_vllm.serving.self_attention import FACTORS, LatentSelfAttention

_FACTOR_NAME = re.compile(rf"layers\.\d+\.({'|'.join(FACTORS)})$")
#: Weights and biases with an axis of heads.
_HEADS_NAME = re.compile(
    r"layers\.(\d+)\.self_attn\.(q_proj\.weight|o_proj\.weight|[qkv]_proj\.bias)$"
)
_FUSED_NAME = re.compile(r"\.self_attn\.qkv_proj\.weight$")
_KV_BIAS_NAME = re.compile(r"\.self_attn\.[kv]_proj\.bias$")


@contextmanager
def _stock_attention_backend(vllm_config: VllmConfig) -> Iterator[None]:
    """Let the attention layers that we replace be built with whatever vLLM prefers.

    Our backend rightly refuses to run a stock layer, and stock backends may refuse a cache dtype
    that latents can have; these never run.
    """
    attention_config, cache_config = vllm_config.attention_config, vllm_config.cache_config
    backend, cache_dtype = attention_config.backend, cache_config.cache_dtype
    attention_config.backend, cache_config.cache_dtype = None, "auto"
    try:
        yield
    finally:
        attention_config.backend, cache_config.cache_dtype = backend, cache_dtype


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

    def __init_subclass__(cls) -> None:
        cls.hf_to_vllm_mapper = _without_kv_projections(cls.hf_to_vllm_mapper)
        cls.packed_modules_mapping = {
            fused: parts for fused, parts in cls.packed_modules_mapping.items()
            if fused != "qkv_proj"
        }  # fmt: skip

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        with _stock_attention_backend(vllm_config):
            super().__init__(vllm_config=vllm_config, prefix=prefix)
        hf_config = vllm_config.model_config.hf_config.to_dict()
        self.recalkv_config = RecalkvConfig.from_hf_config(hf_config)
        self.recalkv_geometry = AttentionGeometry.from_hf_config(hf_config)
        self.recalkv_model_config = vllm_config.model_config
        if mapper := getattr(self.model, "hf_to_vllm_mapper", None):
            self.model.hf_to_vllm_mapper = _without_kv_projections(mapper)
        latent_format = served_format(
            self.recalkv_config.latent_quantization,
            vllm_config.cache_config.cache_dtype,
            vllm_config.model_config.dtype,
        )
        for i in range(self.model.start_layer, self.model.end_layer):
            layer = self.model.layers[i]
            layer.self_attn = LatentSelfAttention(
                layer.self_attn,
                self.recalkv_config.layers[i],
                self.recalkv_geometry,
                vllm_config,
                latent_format,
            )

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load the base weights that vLLM found and our factors; returns the names loaded.

        The factors are read by our own strict reader: vLLM passes their file by when the weights
        have an index, and does not notice a missing parameter of a linear layer.
        """
        loaded = super().load_weights(self._base_weights(weights))
        path = locate_factors(self.recalkv_model_config)
        with FactorReader(path, self.recalkv_config, self.recalkv_geometry) as reader:
            for i in range(self.model.start_layer, self.model.end_layer):
                names = self.model.layers[i].self_attn.load_factors(reader, i)
                loaded |= {f"model.layers.{i}.self_attn.{name}" for name in names}
        return loaded

    def _base_weights(
        self, weights: Iterable[tuple[str, torch.Tensor]]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """The base model's weights, heads in the factors' order.

        Of a fused ``qkv_proj`` only the queries' rows. A checkpoint with factors of its own has its
        heads in order already; those of an untouched base model are moved here. Biases that the
        model does not have (AutoGPTQ stores them, all zero) are passed by, as vLLM does.
        """
        biased = self.model.layers[self.model.start_layer].self_attn.k_bias is not None
        query_rows = self.recalkv_geometry.num_heads * self.recalkv_geometry.head_dim
        natural = hasattr(self.recalkv_model_config.hf_config, SEPARATE_FACTORS)
        for name, weight in weights:
            if _FACTOR_NAME.match(name) or (_KV_BIAS_NAME.search(name) and not biased):
                continue
            if _FUSED_NAME.search(name):
                name, weight = name.replace(".qkv_proj.", ".q_proj."), weight[:query_rows]
            found = _HEADS_NAME.search(name)
            if natural and found is not None:
                order = self.recalkv_config.layers[int(found[1])].head_order
                axis = 1 if found[2] == "o_proj.weight" else 0
                heads = weight.unflatten(axis, (len(order), -1))
                weight = heads.index_select(axis, torch.tensor(order)).flatten(axis, axis + 1)
            yield name, weight


def __getattr__(name: str) -> type:
    """The served class ``name``: latent attention in the class of vLLM that the table names."""
    if name not in ARCHITECTURES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, stock = ARCHITECTURES[name].split(":")
    base = getattr(importlib.import_module(module), stock)
    cls = type(name, (LatentAttentionMixin, base), {"__module__": __name__})
    globals()[name] = cls
    return cls
