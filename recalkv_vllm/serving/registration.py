"""What vLLM learns from us when it loads its plugins; imports nothing heavy."""

from __future__ import annotations

import logging
import sys

import vllm
from vllm.model_executor.models.registry import ModelRegistry
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from recalkv_vllm.serving.names import (
    ARCHITECTURES,
    BACKEND_CLASS,
    BACKEND_NAME,
    MODEL_MODULE,
)
from recalkv_vllm.serving.vllm_version import untried

logger = logging.getLogger(__name__)


def _registered_backend_path() -> str:
    register_plugin()
    return BackendPath(BACKEND_CLASS)


class BackendPath(str):
    """The backend's class path, which registers the backend when it is unpickled.

    vLLM pickles its configuration to the processes that it spawns, and an enum member unpickles by
    value before plugins are loaded there. Can go when vLLM loads plugins before it unpickles, or
    when it pickles enum members by name.
    """

    __slots__ = ()

    def __reduce__(self):
        return _registered_backend_path, ()


def register_plugin() -> None:
    """Register backend, model classes and start-up checks; calling it again does nothing."""
    # Our records go where vLLM's go, and are shown from the same level on.
    logging.getLogger("recalkv_vllm").parent = logging.getLogger("vllm")
    if BACKEND_NAME not in AttentionBackendEnum.__members__:
        register_backend(BACKEND_NAME, BackendPath(BACKEND_CLASS))
        for architecture in ARCHITECTURES:
            ModelRegistry.register_model(architecture, f"{MODEL_MODULE}:{architecture}")
    # Only a process that parses arguments has this module, and only it can still refuse them.
    if arguments := sys.modules.get("vllm.engine.arg_utils"):
        # Not above: most processes register and never parse.
        from recalkv_vllm.serving.startup.engine_args import check_engine_config

        if check_engine_config(arguments.EngineArgs) and (warning := untried(vllm.__version__)):
            logger.warning(warning)
