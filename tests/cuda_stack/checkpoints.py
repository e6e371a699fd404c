"""Small checkpoints of given ranks: configuration, factors and a tokenizer, no base weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import Gemma3TextConfig, LlamaConfig, PretrainedConfig

from recalkv_vllm.architectures import SUPPORTED
from recalkv_vllm.band_format import Band, bands_of
from recalkv_vllm.checkpoint import (
    FACTORS_FILE,
    AttentionGeometry,
    LatentLayout,
    RecalkvConfig,
    factor_name,
    save_factors,
)
from recalkv_vllm.latent_format import LatentFormat
from recalkv_vllm.span import Span
from tests.tiny_models import train_tokenizer

SIZES = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 1024,
    "dtype": "bfloat16",
}
WINDOW = 128


@dataclass(frozen=True)
class Checkpoint:
    """What a small checkpoint is like.

    Args:
        ranks: of its layers.
        latent_dtype: a dtype of ``LatentFormat``, ``bands``, or None for plain elements.
        full: layers without a sliding window; None if no layer has one.
    """

    ranks: tuple[int, ...]
    latent_dtype: str | None = None
    full: tuple[int, ...] | None = None

    def hf_config(self) -> PretrainedConfig:
        count = len(self.ranks)
        if self.full is None:
            return LlamaConfig(**SIZES, num_hidden_layers=count)
        kinds = ["sliding_attention", "full_attention"]
        layer_types = [kinds[layer in self.full] for layer in range(count)]
        return Gemma3TextConfig(
            **SIZES, num_hidden_layers=count, layer_types=layer_types, sliding_window=WINDOW
        )

    def recalkv_config(self) -> RecalkvConfig:
        heads = SIZES["num_key_value_heads"]
        layers = tuple(
            LatentLayout(
                rank,
                heads,
                (Span(0, rank),),
                (Span(0, rank),),
                tuple(range(heads)),
                bands=self._bands(rank),
            )
            for rank in self.ranks
        )
        uniform = self.latent_dtype not in (None, "bands")
        return RecalkvConfig(
            "supposed",
            0.5,
            layers,
            latent_quantization=LatentFormat(self.latent_dtype) if uniform else None,
        )

    def _bands(self, rank: int) -> tuple[Band, ...] | None:
        if self.latent_dtype != "bands":
            return None
        blocks = rank // 32
        return tuple(bands_of([(6, 4, 3, 2)[4 * i // blocks] for i in range(blocks)]))

    def save(self, directory: Path) -> Path:
        """Write it, all but the base model's weights."""
        model, recalkv = self.hf_config(), self.recalkv_config()
        model.recalkv = {**recalkv.to_dict(), "format_version": 2 if recalkv.layers[0].bands else 1}
        model.architectures = [SUPPORTED[model.model_type].served_name]
        model.save_pretrained(directory)
        train_tokenizer().save_pretrained(directory)
        geometry = AttentionGeometry.from_hf_config(model.to_dict())
        torch.manual_seed(0)
        save_factors(
            directory / FACTORS_FILE,
            {
                factor_name(i, name): torch.randn(shape, dtype=torch.bfloat16)
                for i, layout in enumerate(recalkv.layers)
                for name, shape in layout.factor_shapes(geometry).items()
            },
        )
        return directory


PLAIN = Checkpoint((64, 64, 64))
MIXED = Checkpoint((64, 32, 96))
INT4 = Checkpoint((64, 32, 96), "int4")
BANDS = Checkpoint((64, 128, 96), "bands")
#: As ``kfac`` makes them of Gemma 3: five windows to one layer without, no two ranks alike.
GEMMA = Checkpoint((64, 96, 128, 80, 112, 48, 160, 144, 32, 176, 192, 208), full=(5, 11))
EVERY = {"plain": PLAIN, "mixed": MIXED, "int4": INT4, "bands": BANDS, "gemma": GEMMA}
