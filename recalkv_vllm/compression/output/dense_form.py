"""The compressed model in dense form, which any tool loads as the stock architecture."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import torch

from recalkv_vllm.architectures import language_name
from recalkv_vllm.compression.layer import LayerFactors, reorder_rows
from recalkv_vllm.compression.output.copy_weights import Change

#: The same names in all supported families; ``qkv`` is Phi-3's.
ATTENTION_TENSOR = re.compile(
    r"model\.layers\.(?P<layer>\d+)\.self_attn\.(?P<projection>q|k|v|o|qkv)_proj\.(?P<parameter>\w+)"
)

#: A logit per query head.
SINKS = re.compile(r"model\.layers\.(?P<layer>\d+)\.self_attn\.sinks")

#: Weights of norms, of a head or of all.
NORM_WEIGHT = re.compile(r"model\.layers\.(?P<layer>\d+)\.self_attn\.[qk]_norm\.weight")


def dense_form(
    factors: Sequence[LayerFactors], dtype: torch.dtype, convert: bool, layers: Sequence[int]
) -> Change:
    """How base weights become those of a plain model that computes what is served.

    ``k_proj`` and ``v_proj`` become the products of the (rounded) factors, also where they were
    quantized. Query heads, output columns, all biases, sinks and weights of norms over all heads
    move with their KV heads; quantized ones cannot, and come with heads in natural order. Other
    tensors stay as they are.

    Args:
        factors: rounded, one per layer with attention.
        dtype: of the products.
        convert: whether all other floating-point tensors become ``dtype`` too.
        layers: index of each of these layers in the decoder.
    """
    factors_of = dict(zip(layers, factors, strict=True))

    def change(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        if convert and tensor.is_floating_point():
            tensor = tensor.to(dtype)
        own_name = language_name(name)
        if of_norm := NORM_WEIGHT.fullmatch(own_name):
            layer = factors_of[int(of_norm["layer"])]
            of_one_head = tensor.numel() == layer.v_up.shape[1]
            yield name, tensor if of_one_head else reorder_rows(tensor, layer.layout.head_order)
            return
        if of_sinks := SINKS.fullmatch(own_name):
            yield name, reorder_rows(tensor, factors_of[int(of_sinks["layer"])].layout.head_order)
            return
        found = ATTENTION_TENSOR.fullmatch(own_name)
        if found is None:
            yield name, tensor
            return
        layer = factors_of[int(found["layer"])]
        order = layer.layout.head_order
        match found["projection"], found["parameter"]:
            case "qkv", "weight":
                keys, values = (product.to(dtype) for product in layer.products())
                queries = tensor[: -2 * len(keys)] if layer.query is None else layer.query
                queries = reorder_rows(queries, order)
                yield name, torch.cat((queries, keys, values))
            case "k" | "v", "weight" | "weight_packed" | "qweight":
                keys, values = layer.products()
                name = f"{name.rpartition('.')[0]}.weight"
                yield name, (keys if found["projection"] == "k" else values).to(dtype)
            case "q", "weight":
                yield name, reorder_rows(tensor if layer.query is None else layer.query, order)
            case "q" | "k" | "v", "bias":
                yield name, reorder_rows(tensor, order)
            case "k" | "v", _:
                return  # scales and zero points of what is dense now
            case "o", "weight":
                if layer.output is not None:
                    tensor = layer.output
                # Columns are heads; o_proj's bias is not per head.
                yield name, reorder_rows(tensor.T, order).T
            case _:
                yield name, tensor

    return change
