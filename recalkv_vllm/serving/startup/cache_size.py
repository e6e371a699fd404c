"""A KV cache whose size is given, and too small: refused before an engine starts."""

from __future__ import annotations

from vllm.config import VllmConfig

from recalkv_vllm.checkpoint import AttentionGeometry, CheckpointError, RecalkvConfig
from recalkv_vllm.serving.capacity import latent_bytes_per_token
from recalkv_vllm.serving.latent_dtype import model_dtype


def check_cache_size(
    config: VllmConfig, recalkv: RecalkvConfig, geometry: AttentionGeometry
) -> None:
    """Whether ``--kv-cache-memory-bytes`` holds one request of ``--max-model-len`` tokens.

    vLLM asks the same once an engine has loaded the model, and ends it with a traceback. A size
    that it works out itself, from memory that is left, only it can check.

    Args:
        config: of the engine.
        recalkv: of the checkpoint, with the latent format that is served.
        geometry: of the model.

    Raises:
        CheckpointError: it does not.
    """
    cache, model, parallel = config.cache_config, config.model_config, config.parallel_config
    given = cache.kv_cache_memory_bytes
    if (
        given is None
        or cache.num_gpu_blocks_override is not None
        or model.original_max_model_len == -1  # vLLM chooses the length that fits
        or parallel.pipeline_parallel_size > 1  # a rank caches some layers
        or geometry.decoder_layers is not None  # layers without attention have a state each
        or getattr(model.hf_text_config, "sliding_window", None)  # some layers cache few tokens
    ):
        return
    per_token = latent_bytes_per_token(
        recalkv, geometry, model_dtype(model).itemsize, parallel.tensor_parallel_size
    )
    # One block is never used: it stands for padding.
    blocks = -(-model.max_model_len // cache.block_size) + 1
    needed = blocks * cache.block_size * per_token
    if given < needed:
        raise CheckpointError(
            f"--kv-cache-memory-bytes: expected {needed} or more, for one request of "
            f"--max-model-len {model.max_model_len} tokens of {per_token} bytes, found {given}; "
            f"what fits is told by: recalkv plan {model.model} --max-model-len "
            f"{model.max_model_len} --block-size {cache.block_size} --kv-cache-memory-bytes {given}"
        )
