"""Low-rank KV-cache compression for vLLM (ReCalKV, arXiv 2505.24357)."""

from recalkv_vllm.version import __version__

__all__ = ["__version__"]
