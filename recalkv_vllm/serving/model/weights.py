"""From the tensors of a checkpoint, or of a weight update, to those that a served model loads."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from types import GeneratorType
from typing import Any, TypeAlias

import torch
from torch import nn
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.utils import WeightsMapper

from recalkv_vllm.checkpoint import (
    AttentionGeometry,
    CheckpointError,
    FactorReader,
    RecalkvConfig,
)

Weights: TypeAlias = Iterable[tuple[str, torch.Tensor]]

FACTORS = ("down", "k_up", "v_up")
_FACTOR_NAME = re.compile(rf"layers\.(\d+)\.({'|'.join(FACTORS)})$")
#: Weights, biases and sinks with an axis of heads; a norm's has one if it is over all of them.
_HEADS_NAME = re.compile(
    r"layers\.(\d+)\.self_attn\."
    r"(q_proj\.weight|o_proj\.weight|[qkv]_proj\.bias|[qk]_norm\.weight|sinks)$"
)
_FUSED_NAME = re.compile(r"\.self_attn\.qkv_proj\.weight$")
_QUERY_NAME = re.compile(r"layers\.(\d+)\.self_attn\.q_proj\.(\w+)$")
_KV_BIAS_NAME = re.compile(r"\.self_attn\.[kv]_proj\.bias$")
_KV_WEIGHT_NAME = re.compile(r"\.self_attn\.(k|v|qkv)_proj\.(?!bias$)")


def without_kv_projections(mapper: WeightsMapper) -> WeightsMapper:
    """Names of a layer without fused qkv: ``q_proj`` is itself, k and v leave but their bias."""
    return replace(
        mapper,
        orig_to_new_regex={
            **mapper.orig_to_new_regex,
            re.compile(r"\.self_attn\.(k|v)_proj\.bias$"): r".self_attn.\1_bias.weight",
            re.compile(r"\.self_attn\.(k|v)_proj\."): None,
        },
        orig_to_new_stacked={
            old: new
            for old, new in mapper.orig_to_new_stacked.items()
            if not new[0].endswith(".qkv_proj")
        },
    )


def forget_fused_projections(owner: Any) -> None:
    """Of a class or a model: queries, keys and values are not one ``qkv_proj`` any more."""
    if mapper := getattr(owner, "hf_to_vllm_mapper", None):
        owner.hf_to_vllm_mapper = without_kv_projections(mapper)
    if packed := getattr(owner, "packed_modules_mapping", None):
        owner.packed_modules_mapping = {
            fused: parts for fused, parts in packed.items() if fused != "qkv_proj"
        }


def come_from_files(weights: Weights) -> bool:
    """Whether a reload's ``weights`` are read by one of vLLM's loaders; else somebody sends them.

    A checkpoint has keys and values twice: as factors, and as dense projections for readers that
    know no factors. Whoever sends projections means them to be served.
    """
    frame = weights.gi_frame if isinstance(weights, GeneratorType) else None
    module = "" if frame is None else frame.f_globals["__name__"]
    return module.startswith("vllm.model_executor.model_loader.")


def base_weights(weights: Weights, geometry: AttentionGeometry, biased: bool) -> Iterator:
    """Weights of a checkpoint's files but its factors; of a fused ``qkv_proj`` the queries' rows.

    Biases that the model does not have (AutoGPTQ stores them, all zero) are passed by, as vLLM
    does.
    """
    query_rows = geometry.num_heads * geometry.head_dim
    for name, weight in weights:
        if _FACTOR_NAME.match(name) or (_KV_BIAS_NAME.search(name) and not biased):
            continue
        if _FUSED_NAME.search(name):
            name, weight = name.replace(".qkv_proj.", ".q_proj."), weight[:query_rows]
        yield name, weight


def without_queries(
    weights: Weights, projections: Mapping[int, tuple[str, nn.Module]], loaded: set[str]
) -> Iterator:
    """The other weights; those of ``q_proj`` are loaded here.

    For classes whose own loader would give them to a fused projection.

    Args:
        weights: as a checkpoint names them.
        projections: of this rank's layers, by their names in the model.
        loaded: gets the names of what was loaded.
    """
    for name, weight in weights:
        found = _QUERY_NAME.search(name)
        if found is None:
            yield name, weight
        elif int(found[1]) in projections:
            module, projection = projections[int(found[1])]
            param = projection.get_parameter(found[2])
            getattr(param, "weight_loader", default_weight_loader)(param, weight)
            loaded.add(f"{module}.{found[2]}")


def file_factors(reader: FactorReader, layers: Mapping[int, int], dtype: torch.dtype) -> Iterator:
    """Factors of ``layers`` in ``dtype``, under their parameters' names.

    ``layers`` maps layers of the decoder to their place among those with attention.

    They are read by our own strict reader: vLLM passes their file by when the weights have an
    index.
    """
    with reader:
        for layer, place in layers.items():
            for factor in FACTORS:
                yield _parameter_name(layer, factor), reader.read(place, factor).to(dtype)


def sent_weights(weights: Weights, config: RecalkvConfig, geometry: AttentionGeometry) -> Iterator:
    """Weights of an update; factors have the names and shapes of ``recalkv.safetensors``.

    Raises:
        CheckpointError: a dense projection of keys or values, or a factor of another shape.
    """
    for name, weight in weights:
        if _KV_WEIGHT_NAME.search(name):
            raise CheckpointError(
                f"recalkv: {name}: keys and values are served from factors; expected "
                f"layers.N.{', layers.N.'.join(FACTORS)} in its place"
            )
        if found := _FACTOR_NAME.match(name):
            layer, factor = int(found[1]), found[2]
            expected = config.layers[layer].factor_shapes(geometry)[factor]
            if tuple(weight.shape) != expected:
                raise CheckpointError(
                    f"recalkv: {name}: expected shape {list(expected)}, found {list(weight.shape)}"
                )
            name = _parameter_name(geometry.layer_indices[layer], factor)
        yield name, weight


def in_factors_order(
    weights: Weights, config: RecalkvConfig, geometry: AttentionGeometry
) -> Iterator:
    """Weights of an untouched base model, heads in the order that its separate factors mean."""
    heads_of = (layout.head_order for layout in config.layers)
    orders = dict(zip(geometry.layer_indices, heads_of, strict=True))
    for name, weight in weights:
        found = _HEADS_NAME.search(name)
        of_one_head = found and "norm" in found[2] and geometry.key_norm == "head"
        if found and not of_one_head:
            order = orders[int(found[1])]
            axis = 1 if found[2] == "o_proj.weight" else 0
            heads = weight.unflatten(axis, (len(order), -1))
            index = torch.tensor(order, device=weight.device)
            weight = heads.index_select(axis, index).flatten(axis, axis + 1)
        yield name, weight


def _parameter_name(layer: int, factor: str) -> str:
    return f"model.layers.{layer}.self_attn.{factor}.weight"
