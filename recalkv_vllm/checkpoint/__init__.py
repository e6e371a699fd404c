"""The compressed checkpoint: the only thing the offline tool and the server share.

A checkpoint is an ordinary Hugging Face directory whose ``config.json`` carries a ``recalkv``
object (:class:`RecalkvConfig`) and whose factors lie in ``recalkv.safetensors``. Readers validate
everything before a tensor is used; nothing is ever unpickled.
"""

from recalkv_vllm.checkpoint.config import FORMAT_VERSION, RecalkvConfig, read_hf_config
from recalkv_vllm.checkpoint.errors import CheckpointError
from recalkv_vllm.checkpoint.factors import (
    FACTOR_DTYPES,
    FactorReader,
    factor_name,
    file_sha256,
    save_factors,
)
from recalkv_vllm.checkpoint.files import CONFIG_FILE, FACTORS_FILE, INDEX_FILE, WEIGHTS_FILE
from recalkv_vllm.checkpoint.geometry import AttentionGeometry
from recalkv_vllm.checkpoint.layout import SPAN_MULTIPLE, LatentLayout
from recalkv_vllm.checkpoint.size import compression_reached, kv_bytes_per_token, rank_budget

__all__ = [
    "CONFIG_FILE",
    "FACTORS_FILE",
    "FACTOR_DTYPES",
    "FORMAT_VERSION",
    "INDEX_FILE",
    "SPAN_MULTIPLE",
    "WEIGHTS_FILE",
    "AttentionGeometry",
    "CheckpointError",
    "FactorReader",
    "LatentLayout",
    "RecalkvConfig",
    "compression_reached",
    "factor_name",
    "file_sha256",
    "kv_bytes_per_token",
    "rank_budget",
    "read_hf_config",
    "save_factors",
]
