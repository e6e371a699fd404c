"""In which format a served checkpoint's latents are cached."""

from __future__ import annotations

import torch
from vllm.config import ModelConfig

from recalkv_vllm.latent_format import LatentFormat

#: What ``--kv-cache-dtype fp8`` makes of a checkpoint whose latents are not quantized.
FP8_LATENTS = LatentFormat("fp8", 32)
FP8_NAMES = ("fp8", "fp8_e4m3")


def model_dtype(config: ModelConfig) -> torch.dtype:
    """The dtype that a model computes in; vLLM has resolved names by the time we see it."""
    assert isinstance(config.dtype, torch.dtype)
    return config.dtype


def served_format(
    of_checkpoint: LatentFormat | None, cache_dtype: str, model_dtype: torch.dtype
) -> LatentFormat | None:
    """Format for ``--kv-cache-dtype cache_dtype``; None: plain elements in the model's dtype.

    Raises:
        ValueError: latents of this checkpoint cannot be cached so.
    """
    accepted: tuple[str, ...]
    if of_checkpoint is None:
        plain = ("auto", str(model_dtype).removeprefix("torch."))
        accepted = (*plain, *FP8_NAMES)
        served = FP8_LATENTS if cache_dtype in FP8_NAMES else None
        what = "a checkpoint of unquantized latents"
    else:
        accepted = ("auto", *FP8_NAMES) if of_checkpoint.dtype == "fp8" else ("auto",)
        served = of_checkpoint
        what = f"a checkpoint of {of_checkpoint.dtype} latents"
    if cache_dtype not in accepted:
        raise ValueError(
            f"--kv-cache-dtype: expected {' or '.join(accepted)} for {what}, found {cache_dtype}"
        )
    return served
