"""Quantised latents in plain ``transformers``: what a checkpoint's cache gives back."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from recalkv_vllm.checkpoint import (
    FACTORS_FILE,
    AttentionGeometry,
    FactorReader,
    RecalkvConfig,
    read_hf_config,
)
from recalkv_vllm.compression.architectures import CausalLM, attention_modules
from recalkv_vllm.latent_format import LatentFormat


class RoundedProjection(nn.Module):
    """Keys or values out of latents that went through the cache.

    Args:
        form: how latents are stored.
        down: ``[rank, H]``.
        up: ``[h_kv, d, width]``.
        spans: of the heads' groups.
        bias: ``[h_kv · d]`` or None.
    """

    def __init__(
        self,
        form: LatentFormat,
        down: torch.Tensor,
        up: torch.Tensor,
        spans: tuple[tuple[int, int], ...],
        bias: torch.Tensor | None,
    ):
        super().__init__()
        heads_per_span = up.shape[0] // len(spans)
        self.spans = [spans[head // heads_per_span] for head in range(up.shape[0])]
        self.form, self.down, self.up, self.bias = form, down, up, bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = self.form.round_trip(x @ self.down.T)
        heads = [z[..., a:b] @ up.T for up, (a, b) in zip(self.up, self.spans, strict=True)]
        out = torch.cat(heads, dim=-1)
        return out if self.bias is None else out + self.bias


def round_latents(model: CausalLM, directory: Path) -> None:
    """Make ``model``, loaded from ``directory``, see keys and values as its served form does.

    Does nothing to a base model, or to a checkpoint whose latents are not quantised.
    """
    hf_config = read_hf_config(directory)
    if "recalkv" not in hf_config:
        return
    config = RecalkvConfig.from_hf_config(hf_config)
    form = config.latent_quantization
    if form is None:
        return
    geometry = AttentionGeometry.from_hf_config(hf_config)
    with FactorReader(directory / FACTORS_FILE, config, geometry) as reader:
        for i, attention in enumerate(attention_modules(model)):
            like, layout = attention.k_proj.weight, config.layers[i]
            down, k_up, v_up = (reader.read(i, n).to(like) for n in ("down", "k_up", "v_up"))
            k_up = k_up.reshape(geometry.num_kv_heads, geometry.head_dim, -1)
            for name, up, spans in (("k", k_up, layout.k_spans), ("v", v_up, layout.v_spans)):
                bias = getattr(attention, f"{name}_proj").bias
                rounded = RoundedProjection(form, down, up, spans, bias)
                setattr(attention, f"{name}_proj", rounded)
