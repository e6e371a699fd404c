"""Reading a compressed checkpoint back, whole and strictly."""

from __future__ import annotations

from pathlib import Path

from recalkv_vllm.checkpoint import (
    FACTORS_FILE,
    AttentionGeometry,
    CheckpointError,
    FactorReader,
    RecalkvConfig,
    read_hf_config,
)


def check_factors(directory: Path) -> tuple[RecalkvConfig, AttentionGeometry, int]:
    """Validate a checkpoint's configuration and every factor.

    Returns:
        The configuration, the geometry, and bytes per cached element (the factors' dtype).

    Raises:
        CheckpointError: naming file, field or tensor, expected and found.
    """
    config = read_hf_config(directory)
    if "recalkv" not in config:
        raise CheckpointError(
            f"{directory}: expected a compressed checkpoint, found a model whose config.json has "
            "no recalkv object; make a checkpoint with recalkv compress"
        )
    recalkv = RecalkvConfig.from_hf_config(config, where=str(directory / "config.json"))
    geometry = AttentionGeometry.from_hf_config(config)
    with FactorReader(directory / FACTORS_FILE, recalkv, geometry) as reader:
        reader.check()
        return recalkv, geometry, reader.dtype.itemsize
