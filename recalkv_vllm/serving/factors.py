"""Where a served model's factors are."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import hf_hub_download
from vllm.config import ModelConfig

from recalkv_vllm.checkpoint import FACTORS_FILE


def locate_factors(model_config: ModelConfig) -> Path:
    """Path of ``recalkv.safetensors`` for a local directory or a hub id (downloaded to its cache).

    Raises:
        huggingface_hub.errors.HfHubHTTPError: when the hub has no such model or file.
    """
    directory = Path(model_config.model)
    if directory.is_dir():
        return directory / FACTORS_FILE
    return Path(hf_hub_download(model_config.model, FACTORS_FILE, revision=model_config.revision))
