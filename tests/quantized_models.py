"""Quantized copies of small models, packed here by hand as each format says.

Nothing of the libraries that read these formats is used, so that they can be checked.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

GROUP = 32
LINEAR = re.compile(r"(model\.layers\.\d+\..*_proj)\.weight")
#: AutoAWQ puts the 8 numbers of an int32 in this order, lowest bits first.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class Rounded:
    """``weight ≈ (numbers - zeros) · scales`` in groups along the input axis, unsigned numbers.

    Args:
        numbers: ``[out, in]``.
        zeros: ``[out, groups]``.
        scales: ``[out, groups]``, in the dtype in which they are stored.
    """

    numbers: torch.Tensor
    zeros: torch.Tensor
    scales: torch.Tensor

    def dense(self, group_of: torch.Tensor | None = None) -> torch.Tensor:
        """The weight in float64; ``group_of: [in]`` where groups are not neighbors."""
        if group_of is None:
            group_of = torch.arange(self.numbers.shape[1]) // GROUP
        zeros, scales = self.zeros.double()[:, group_of], self.scales.double()[:, group_of]
        return (self.numbers.double() - zeros) * scales


def round_to(weight: torch.Tensor, bits: int, symmetric: bool) -> Rounded:
    """Round a weight to nearest in groups of :data:`GROUP` inputs."""
    groups = weight.float().unflatten(1, (-1, GROUP))
    top, middle = (1 << bits) - 1, 1 << (bits - 1)
    if symmetric:
        scales = (groups.abs().amax(-1) / (middle - 1)).to(weight.dtype)
        zeros = torch.full_like(scales, middle)
    else:
        least, most = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        scales = ((most - least) / top).to(weight.dtype)
        zeros = (-least / scales.float()).round().clamp(0, top)
    numbers = (groups / scales.float()[..., None]).round() + zeros[..., None]
    return Rounded(numbers.clamp(0, top).flatten(1).long(), zeros.long(), scales)


def pack(numbers: torch.Tensor, bits: int, axis: int, order: tuple[int, ...] | None = None):
    """Numbers in int32 words along ``axis``, the first of a word (of ``order``) lowest."""
    per_word = 32 // bits
    words = numbers.movedim(axis, -1).unflatten(-1, (-1, per_word))
    words = words[..., list(order or range(per_word))]
    packed = sum(words[..., i] << (bits * i) for i in range(per_word))
    packed = torch.where(packed >= 1 << 31, packed - (1 << 32), packed)
    return packed.to(torch.int32).movedim(-1, axis).contiguous()


def compressed_tensors(format_name: str, weights: dict, activations: dict | None = None) -> dict:
    """A ``quantization_config`` for all linear layers of the decoder."""
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    return {
        "quant_method": "compressed-tensors",
        "format": format_name,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


def weight_only(bits, symmetric=True):
    def quantize(weight):
        rounded = round_to(weight, bits, symmetric)
        parts = {
            "weight_packed": pack(rounded.numbers, bits, 1),
            "weight_scale": rounded.scales,
            "weight_shape": torch.tensor(weight.shape),
        }
        if not symmetric:
            parts["weight_zero_point"] = pack(rounded.zeros, bits, 0)
        return parts, rounded.dense()

    settings = {
        "num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": "group",
        "group_size": GROUP, "dynamic": False,
    }  # fmt: skip
    return quantize, compressed_tensors("pack-quantized", settings)


def int8(weight):
    scale = (weight.float().abs().amax(1, keepdim=True) / 127).to(weight.dtype)
    numbers = (weight.float() / scale.float()).round().clamp(-128, 127).to(torch.int8)
    return {"weight": numbers, "weight_scale": scale}, numbers.double() * scale.double()


def fp8(weight):
    scale = (weight.float().abs().amax(1, keepdim=True) / 448).to(weight.dtype)
    numbers = (weight.float() / scale.float()).to(torch.float8_e4m3fn)
    return {"weight": numbers, "weight_scale": scale}, numbers.double() * scale.double()


def awq(weight):
    rounded = round_to(weight, 4, symmetric=False)
    return {
        "qweight": pack(rounded.numbers.T, 4, 1, AWQ_ORDER),
        "qzeros": pack(rounded.zeros.T, 4, 1, AWQ_ORDER),
        "scales": rounded.scales.T.half().contiguous(),
    }, Rounded(rounded.numbers, rounded.zeros, rounded.scales.half()).dense()


def gptq(weight):
    rounded = round_to(weight, 4, symmetric=True)
    return {
        "qweight": pack(rounded.numbers.T, 4, 0),
        "qzeros": pack(rounded.zeros.T - 1, 4, 1),
        "scales": rounded.scales.T.half().contiguous(),
        "g_idx": (torch.arange(weight.shape[1]) // GROUP).int(),
    }, Rounded(rounded.numbers, rounded.zeros, rounded.scales.half()).dense()


_INT8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
_TOKEN = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
#: What a format stores of a weight ``[out, in]``, with the weight that this is; its configuration.
FORMATS = {
    "int4": weight_only(4),
    "int4 with zeros": weight_only(4, symmetric=False),
    "int8 weights": weight_only(8),
    "int8": (int8, compressed_tensors("int-quantized", _INT8, _TOKEN)),
    "fp8": (
        fp8,
        compressed_tensors(
            "float-quantized", {**_INT8, "type": "float"}, {**_TOKEN, "type": "float"}
        ),
    ),
    "awq": (
        awq,
        {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True,
         "version": "gemm", "modules_to_not_convert": None},
    ),
    "gptq": (
        gptq,
        {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": True, "desc_act": False,
         "checkpoint_format": "gptq"},
    ),
}  # fmt: skip


def write_dense(source: Path, directory: Path, dense: dict[str, torch.Tensor]) -> Path:
    """A copy of a model in float32 with other weights."""
    shutil.copytree(source, directory, ignore=shutil.ignore_patterns("model*.safetensors*"))
    tensors = {**load_file(source / "model.safetensors"), **dense}
    tensors = {name: tensor.float().contiguous() for name, tensor in tensors.items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    edit_config(directory, dtype="float32")
    return directory


def edit_config(directory: Path, **changes) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def quantize_model(source: Path, directory: Path, name: str) -> dict[str, torch.Tensor]:
    """Write a copy of a model whose decoder layers' linear weights are quantized.

    Args:
        source: a model directory with one file of weights.
        directory: to create.
        name: of one of :data:`FORMATS`.

    Returns:
        The dense weight of every quantized layer by its name, float64.
    """
    quantize, config = FORMATS[name]
    shutil.copytree(source, directory, ignore=shutil.ignore_patterns("model*.safetensors*"))
    tensors, dense = {}, {}
    for key, tensor in load_file(source / "model.safetensors").items():
        if found := LINEAR.fullmatch(key):
            parts, dense[key] = quantize(tensor)
            tensors |= {f"{found[1]}.{part}": value for part, value in parts.items()}
            if name == "gptq":  # AutoGPTQ stores biases of zeros where a model has none
                tensors.setdefault(f"{found[1]}.bias", torch.zeros(len(tensor)).half())
        else:
            tensors[key] = tensor
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    edit_config(directory, quantization_config=config)
    return dense
