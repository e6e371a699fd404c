"""Models that vLLM saved rank by rank (``sharded_state``): factors are among the parameters."""

from __future__ import annotations

import re
from pathlib import Path

from safetensors import SafetensorError, safe_open

from recalkv_vllm.checkpoint import AttentionGeometry, CheckpointError, RecalkvConfig
from recalkv_vllm.serving.sharding import shard_latent

#: ``--load-format`` of those that vLLM reads into parameters as they are.
SHARDED_STATE = ("sharded_state", "runai_streamer_sharded")
_FACTOR = re.compile(r"layers\.(\d+)\.(?:self_)?attn\.(down|k_up|v_up)\.weight$")


def check_sharded_state(
    directory: Path, config: RecalkvConfig, geometry: AttentionGeometry, tp_size: int
) -> None:
    """Whether the factors in ``directory`` have the shapes that ``config`` says.

    vLLM warns of a tensor of another shape, and loads it into a part of the parameter. What is
    missing it refuses itself.

    Raises:
        CheckpointError: a factor has another shape, or a file cannot be read.
    """
    for path in sorted(directory.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as tensors:
                shapes = {
                    name: tuple(tensors.get_slice(name).get_shape())
                    for name in tensors.keys()  # noqa: SIM118
                    if _FACTOR.search(name)
                }
        except SafetensorError as error:
            raise CheckpointError(f"{path}: not a readable safetensors file ({error})") from error
        for name, found in shapes.items():
            expected = _parameter_shape(name, config, geometry, tp_size)
            if found != expected:
                raise CheckpointError(
                    f"{path}: {name}: expected shape {list(expected)} on each of {tp_size} ranks, "
                    f"found {list(found)}"
                )


def _parameter_shape(
    name: str, config: RecalkvConfig, geometry: AttentionGeometry, tp_size: int
) -> tuple[int, ...]:
    """Of a factor's parameter, alike on all ranks."""
    found = _FACTOR.search(name)
    assert found is not None
    layer, factor = geometry.position(int(found[1])), found[2]
    if layer is None:
        raise CheckpointError(f"{name}: expected {len(config.layers)} layers")
    layout = config.layers[layer]
    shard = shard_latent(layout, geometry, 0, tp_size)
    if factor == "down":
        return shard.rank, geometry.hidden_size
    width = layout.k_width if factor == "k_up" else layout.v_width
    return len(shard.kv_heads), geometry.head_dim, width
