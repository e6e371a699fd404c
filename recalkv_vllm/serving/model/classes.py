"""vLLM's model classes with latent attention; everything else in them stays vLLM's.

The classes themselves are made when asked for, from the table of architectures: importing all of
vLLM's models to serve one would cost seconds in every process.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import VllmConfig
from vllm.distributed import (
    get_pp_group,
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
)
from vllm.distributed.utils import get_pp_indices
from vllm.model_executor.models.utils import WeightsMapper

from recalkv_vllm.architectures import SUPPORTED, language_config
from recalkv_vllm.band_format import slot_width, stored_format
from recalkv_vllm.checkpoint import AttentionGeometry, FactorReader, RecalkvConfig
from recalkv_vllm.serving.attention.backend import with_pages
from recalkv_vllm.serving.attention.page_width import slot_widths
from recalkv_vllm.serving.factor_files import SEPARATE_FACTORS, locate_factors
from recalkv_vllm.serving.latent_dtype import model_dtype, served_config
from recalkv_vllm.serving.model.reload import config_beside, old_weights_kept, reloading
from recalkv_vllm.serving.model.self_attention import HiddenStatesFirst, LatentSelfAttention
from recalkv_vllm.serving.model.stock_attention import StockParts, stock_parts
from recalkv_vllm.serving.model.transformers_backend import (
    RotaryTable,
    TransformersSelfAttention,
    of_transformers,
    transformers_parts,
)
from recalkv_vllm.serving.model.weights import (
    base_weights,
    come_from_files,
    file_factors,
    forget_fused_projections,
    in_factors_order,
    sent_weights,
    without_kv_projections,
    without_queries,
)
from recalkv_vllm.serving.names import ARCHITECTURES, MULTIMODAL
from recalkv_vllm.serving.sharding import shard_latent


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


def page_widths(
    served: RecalkvConfig, geometry: AttentionGeometry, dtype: torch.dtype
) -> tuple[int, ...]:
    """``LatentAttention.page_width`` of every layer, those of other pipeline stages too."""
    size, rank = get_tensor_model_parallel_world_size(), get_tensor_model_parallel_rank()
    shards = [shard_latent(layout, geometry, rank, size) for layout in served.layers]
    own = [
        slot_width(
            stored_format(shard.bands, served.latent_quantization),
            shard.rank,
            dtype,
            shard.key_scales,
        )
        for shard in shards
    ]
    return slot_widths(own, geometry.kinds_differ, hybrid=geometry.decoder_layers is not None)


if TYPE_CHECKING:  # any of vLLM's causal language models
    from vllm.model_executor.models.llama import LlamaForCausalLM as _Stock
else:
    _Stock = object


class LatentAttentionMixin(_Stock):
    """Put before one of vLLM's causal language models to give it latent attention."""

    model: Any

    def __init_subclass__(cls) -> None:
        forget_fused_projections(cls)

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        with _stock_attention_backend(vllm_config):
            super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.serve_latents(vllm_config)

    def serve_latents(self, vllm_config: VllmConfig) -> None:
        """Exchange the attention modules that vLLM has built."""
        hf_config = vllm_config.model_config.hf_config.to_dict()
        self.recalkv_config = RecalkvConfig.from_hf_config(hf_config)
        self.recalkv_geometry = AttentionGeometry.from_hf_config(hf_config)
        self.recalkv_vllm_config = vllm_config
        # Some classes make these for each model.
        forget_fused_projections(self)
        forget_fused_projections(self.model)
        dtype = model_dtype(vllm_config.model_config)
        cache_dtype = vllm_config.cache_config.cache_dtype
        served = served_config(self.recalkv_config, cache_dtype, dtype)
        widths = page_widths(served, self.recalkv_geometry, dtype)
        self.recalkv_architecture = SUPPORTED[language_config(hf_config)["model_type"]]
        attention, parts_of = self._attention()
        for i, place in self._served_layers().items():
            stock = getattr(self.model.layers[i], self.recalkv_architecture.attention)
            replacement = attention(
                stock,
                parts_of(stock),
                served.layers[place],
                self.recalkv_geometry,
                vllm_config,
                served.latent_quantization,
            )
            cached = replacement.attn
            cached.page_width = widths[place]
            if self.recalkv_architecture.hybrid:
                cached.attn_backend = with_pages(cached.page_width, cached.element_dtype)
            setattr(self.model.layers[i], self.recalkv_architecture.attention, replacement)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load a checkpoint, or weights that are sent to a running engine.

        Raises:
            CheckpointError: they are not for the model that was built.
        """
        model_config = self.recalkv_vllm_config.model_config
        name = self.recalkv_architecture.attention
        attentions = {i: getattr(self.model.layers[i], name) for i in self._served_layers()}
        layers = [*attentions.values()]
        running = any(layer.attn.impl.bound for layer in layers)
        with old_weights_kept(self, model_config):
            factors: Iterable = ()
            if not running or come_from_files(weights):
                # Before the first weight is loaded: what is wrong with them shows here.
                reader = self._open_factors()
                factors = file_factors(reader, self._served_layers(), model_dtype(model_config))
            else:
                weights = sent_weights(weights, self.recalkv_config, self.recalkv_geometry)
            weights = base_weights(
                weights, self.recalkv_geometry, biased=layers[0].k_bias is not None
            )
            if hasattr(model_config.hf_config, SEPARATE_FACTORS):
                weights = in_factors_order(weights, self.recalkv_config, self.recalkv_geometry)
            queries: set[str] = set()
            if self.recalkv_architecture.fuses_when_loading:
                weights = without_kv_projections(WeightsMapper()).apply(weights)
                projections = {
                    i: (f"model.layers.{i}.{name}.q_proj", attention.q_proj)
                    for i, attention in attentions.items()
                }
                weights = without_queries(weights, projections, queries)
            loaded = super().load_weights(chain(weights, factors)) | queries
        if running and not reloading(self):
            # A patch of weights in place, of which vLLM tells nobody.
            for layer in layers:
                layer.bind_factors(model_dtype(model_config))
        return loaded

    def _attention(self) -> tuple[type[LatentSelfAttention], Callable[[Any], StockParts]]:
        """The class that replaces attention modules, and what finds the parts of a stock one."""
        head_dim = self.recalkv_geometry.head_dim
        if not of_transformers(self.model):
            attention = LatentSelfAttention
            if self.recalkv_architecture.hidden_states_first:
                attention = HiddenStatesFirst
            return attention, partial(stock_parts, head_dim=head_dim)
        rotary = RotaryTable(self.model, self.recalkv_vllm_config.model_config.max_model_len)
        return TransformersSelfAttention, partial(
            transformers_parts, head_dim=head_dim, rotary=rotary
        )

    def _served_layers(self) -> dict[int, int]:
        """This rank's layers with attention: from the decoder's index to that among these."""
        geometry = self.recalkv_geometry
        if of_transformers(self.model):
            group = get_pp_group()
            num_layers = geometry.num_layers
            own = range(*get_pp_indices(num_layers, group.rank_in_group, group.world_size))
        else:
            own = range(self.model.start_layer, self.model.end_layer)
        places = ((i, geometry.position(i)) for i in own)
        return {i: place for i, place in places if place is not None}

    def _open_factors(self) -> FactorReader:
        """Reader of the checkpoint that the engine's configuration names by now."""
        model_config = self.recalkv_vllm_config.model_config
        path = locate_factors(model_config)
        self.recalkv_config = config_beside(path, self.recalkv_config, model_config)
        return FactorReader(path, self.recalkv_config, self.recalkv_geometry)


class LatentLanguageModelMixin(_Stock):
    """Put before one of vLLM's models of several modalities: latent attention in its language
    model, all else as it is."""

    language_model: Any

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        with _stock_attention_backend(vllm_config):
            super().__init__(vllm_config=vllm_config, prefix=prefix)
        # It was built as one of vLLM's own, whichever way the model asks for one.
        self.language_model.__class__ = _served_class(type(self.language_model))
        self.language_model.serve_latents(vllm_config)


def _served_class(base: type) -> type:
    """Latent attention in a class of a language model."""
    return type(f"Recalkv{base.__name__}", (LatentAttentionMixin, base), {"__module__": __name__})


def __getattr__(name: str) -> type:
    """The served class ``name``: latent attention in the class of vLLM that the table names."""
    if name not in ARCHITECTURES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, stock = ARCHITECTURES[name].split(":")
    base = getattr(importlib.import_module(module), stock)
    mixin = LatentLanguageModelMixin if name in MULTIMODAL else LatentAttentionMixin
    cls = type(name, (mixin, base), {"__module__": __name__})
    globals()[name] = cls
    return cls
