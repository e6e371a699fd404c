"""Options of ``recalkv compress``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from recalkv_vllm.compression.base_model.devices import choose_device
from recalkv_vllm.names import CPU_SAMPLES, DEFAULT_DATASETS, GPU_SAMPLES


@dataclass(frozen=True, slots=True)
class CompressOptions:
    """Options of ``recalkv compress``; the command line documents each."""

    model: str
    out: Path
    compression: float | None = None
    method: str = "kfac"
    k_group_size: int | None = None
    v_groups: int | None = None
    rank_allocation: str | None = None
    spans: str | None = None
    target: str = "auto"
    output_refit: bool | None = None
    latent_dtype: str = "auto"
    datasets: tuple[str, ...] = DEFAULT_DATASETS
    text_column: str = "text"
    num_samples: int = CPU_SAMPLES["num_samples"]
    seq_len: int = CPU_SAMPLES["seq_len"]
    seed: int = 42
    device: str = "auto"
    dtype: str = "auto"
    factors_only: bool = False
    heal: int = 0
    max_loss: float | None = None


def default_samples(device: str) -> dict[str, int]:
    """``num_samples`` and ``seq_len`` of the calibration text, by where it runs."""
    return CPU_SAMPLES if choose_device(device).startswith("cpu") else GPU_SAMPLES
