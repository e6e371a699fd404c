"""The base model as one object: what it is, and how to load it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from recalkv_vllm.architectures import SUPPORTED, Architecture, has_fused_qkv, language_config
from recalkv_vllm.base_digest import base_digest, local_files
from recalkv_vllm.checkpoint import AttentionGeometry, read_hf_config
from recalkv_vllm.compression.base_model.attention import CausalLM, split_fused_projections
from recalkv_vllm.compression.base_model.devices import SPREAD
from recalkv_vllm.compression.base_model.find import find_model
from recalkv_vllm.compression.base_model.language_model import class_and_shapes, load_language_model
from recalkv_vllm.compression.base_model.support import supported_architecture
from recalkv_vllm.compression.base_model.weight_files import (
    content_digest,
    read_tensors,
    tensor_shapes,
    weight_files,
)
from recalkv_vllm.compression.base_model.weight_formats import WeightFormat, weight_format_of
from recalkv_vllm.compression.errors import InputError
from recalkv_vllm.names import WEIGHT_DTYPES

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in WEIGHT_DTYPES}
#: How ``accelerate`` spreads a model.
DEVICE_MAP = "auto"


class BaseModel:
    """A model directory in Hugging Face's form, each part read when first asked for.

    A compressed checkpoint is one too, by its dense form.

    Args:
        directory: with ``config.json``, weights and tokenizer.
        name: what to call it in a checkpoint; the directory's own if not given.
    """

    def __init__(self, directory: Path, name: str | None = None):
        self.directory = directory
        self.name = directory.resolve().name if name is None else name

    @classmethod
    def find(cls, model: str) -> BaseModel:
        """A model given as a directory or as a hub name. Raises as :func:`find_model`."""
        return cls(find_model(model), None if Path(model).exists() else model)

    @cached_property
    def config(self) -> dict[str, Any]:
        """``config.json``. Raises :class:`CheckpointError` where there is none.

        That of a language model within it is complete: defaults may be left out in the file. So are
        the kinds of a hybrid model's layers, which some files tell in other ways.
        """
        config = read_hf_config(self.directory)
        entry = SUPPORTED.get(config.get("model_type", ""))
        if entry is not None and entry.multimodal:
            text_config = self._transformers_config.get_text_config().to_dict()
            return {**config, "text_config": text_config}
        if entry is not None and entry.hybrid and "recalkv" not in config:
            return {**config, "layer_types": list(self._transformers_config.layer_types)}
        return config

    @cached_property
    def architecture(self) -> Architecture:
        """Raises :class:`InputError` for a model that is not supported, or compressed already."""
        return supported_architecture(self.config)

    @cached_property
    def weight_format(self) -> WeightFormat | None:
        """How the weights are quantized; None if they are not.

        Raises:
            InputError: weights that no dense form is made of.
        """
        return weight_format_of(self.config)

    @cached_property
    def geometry(self) -> AttentionGeometry:
        """Raises :class:`CheckpointError` for sizes that are missing."""
        return AttentionGeometry.from_hf_config(self.config)

    @cached_property
    def dtype(self) -> torch.dtype:
        """The dtype that the configuration names; float32 if none."""
        return self._transformers_config.dtype or torch.float32

    @property
    def _transformers_config(self) -> Any:
        return AutoConfig.from_pretrained(self.directory, local_files_only=True)

    def key_value_digest(self) -> str:
        """Tells whether factors fit the model (:mod:`recalkv_vllm.base_digest`)."""
        return base_digest(local_files(self.directory), self.geometry.layer_indices)

    def digest(self) -> str:
        """Tells models apart by their weights and configuration."""
        return content_digest(self.directory)

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all tensors as stored, by name."""
        return tensor_shapes(self.directory)

    def tokenizer(self) -> Any:
        """Load the tokenizer. Raises :class:`InputError` where there is none."""
        try:
            return AutoTokenizer.from_pretrained(self.directory, local_files_only=True)
        except Exception as error:
            raise InputError(
                f"model {self.directory}: no usable tokenizer ({_reason(error)})"
            ) from error

    def load(self, dtype: torch.dtype, device: str) -> CausalLM:
        """Load the causal language model, without dropout, from safetensors only.

        Of a model of several modalities, the language model by itself.

        Quantized weights are loaded in their dense form, so that they give gradients; activations
        that the model quantizes are not quantized here.

        Args:
            dtype: of the weights.
            device: where to put them, or :data:`SPREAD`.

        Raises:
            InputError: missing or broken weights, quantized ones without a dense form, or weights
                that cannot be spread.
        """
        spread = device == SPREAD
        multimodal = language_config(self.config) is not self.config
        if spread and (
            multimodal
            or self.weight_format is not None
            or has_fused_qkv(self.config.get("model_type"))
        ):
            raise InputError(
                f"--device {SPREAD}: model {self.directory}: expected weights that are neither "
                "fused nor quantized, of a language model alone; name one device"
            )
        options: dict[str, Any] = {"local_files_only": True}
        if hasattr(self._transformers_config, "attention_dropout"):
            # Activation checkpointing needs training mode, in which dropout must not act.
            options["attention_dropout"] = 0.0
        if spread:
            options["device_map"] = DEVICE_MAP
        weight_format = self.weight_format
        try:
            if multimodal:
                text_config = AutoConfig.for_model(**language_config(self.config))
                loaded: Any = load_language_model(text_config, _all_tensors(self.directory), dtype)
            elif weight_format is None:
                loaded = AutoModelForCausalLM.from_pretrained(
                    self.directory,
                    dtype=dtype,
                    use_safetensors=True,
                    output_loading_info=True,
                    **options,
                )
            else:
                loaded = _load_dense_form(self.directory, weight_format, dtype, options)
        except Exception as error:  # safetensors, JSON and shape errors all have their own classes
            reason = _reason(error)
            if isinstance(error, KeyError):  # a part of a quantized weight
                reason += " is missing"
            raise InputError(f"model {self.directory}: cannot be loaded ({reason})") from error
        model, found = loaded
        if missing := sorted(found["missing_keys"]):
            raise InputError(f"model {self.directory}: cannot be loaded ({missing[0]} is missing)")
        split_fused_projections(model)
        return model if spread else model.to(device)


def _load_dense_form(
    directory: Path, weight_format: WeightFormat, dtype: torch.dtype, options: dict[str, Any]
) -> Any:
    """What ``from_pretrained`` gives of the same model before it was quantized."""
    config = AutoConfig.from_pretrained(directory, **options)
    del config.quantization_config
    model_class, shapes = class_and_shapes(config)
    tensors = weight_format.dense(directory, dict(_all_tensors(directory)), dtype)
    # What else a quantized model has (scales of activations) is no parameter.
    parameters = {
        n: t for n, t in tensors.items() if n in shapes or n.endswith((".weight", ".bias"))
    }
    for name, tensor in parameters.items():
        if tensor.dtype not in DTYPES.values():
            raise ValueError(f"{name}: no scale for its {tensor.dtype} values")
    return model_class.from_pretrained(
        None, config=config, dtype=dtype, state_dict=parameters, output_loading_info=True
    )


def _all_tensors(directory: Path) -> Iterator[tuple[str, torch.Tensor]]:
    for path in weight_files(directory):
        yield from read_tensors(path)


def _reason(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
