"""Low-rank KV-cache compression for vLLM (ReCalKV, arXiv 2505.24357)."""

from recalkv_vllm.version import __version__

__all__ = ["__version__", "register"]


def register() -> None:
    """Entry point ``vllm.general_plugins``: make vLLM know our backend and model classes.

    vLLM calls it in every process it starts, sometimes more than once.
    """
    from recalkv_vllm.serving.registration import register_plugin

    register_plugin()
