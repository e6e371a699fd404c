"""In which format a served checkpoint's latents are cached."""

from __future__ import annotations

from dataclasses import replace

import torch
from vllm.config import ModelConfig

from recalkv_vllm.checkpoint import RecalkvConfig
from recalkv_vllm.latent_format import LatentFormat

#: What ``--kv-cache-dtype fp8`` makes of a checkpoint whose latents are not quantized.
FP8_LATENTS = LatentFormat("fp8", 32)
FP8_NAMES = ("fp8", "fp8_e4m3")


def model_dtype(config: ModelConfig) -> torch.dtype:
    """The dtype that a model computes in; vLLM has resolved names by the time we see it."""
    assert isinstance(config.dtype, torch.dtype)
    return config.dtype


def served_config(
    of_checkpoint: RecalkvConfig, cache_dtype: str, model_dtype: torch.dtype
) -> RecalkvConfig:
    """The checkpoint's configuration with latents as ``--kv-cache-dtype cache_dtype`` wants them.

    Raises:
        ValueError: latents of this checkpoint cannot be cached so.
    """
    accepted: tuple[str, ...]
    latent_dtype, served = of_checkpoint.latent_dtype, of_checkpoint
    if latent_dtype is None:
        plain = ("auto", str(model_dtype).removeprefix("torch."))
        accepted = (*plain, *FP8_NAMES)
        if cache_dtype in FP8_NAMES:
            served = replace(of_checkpoint, latent_quantization=FP8_LATENTS)
        what = "a checkpoint of unquantized latents"
    else:
        accepted = ("auto", *FP8_NAMES) if latent_dtype == "fp8" else ("auto",)
        what = f"a checkpoint of {latent_dtype} latents"
    if cache_dtype not in accepted:
        raise ValueError(
            f"--kv-cache-dtype: expected {' or '.join(accepted)} for {what}, found {cache_dtype}"
        )
    return served
