"""The ``recalkv`` command: one module per sub-command."""

from recalkv_vllm.cli.main import main

__all__ = ["main"]
