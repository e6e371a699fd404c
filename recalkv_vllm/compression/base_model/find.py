"""A model named on the command line: a directory, or a name on the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

from recalkv_vllm.checkpoint import CONFIG_FILE
from recalkv_vllm.compression.errors import InputError

HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")
HUB_FILES = ["*.json", "*.jinja", "*.model", "*.safetensors"]


def find_model(model: str) -> Path:
    """The directory of a model given as a directory or as a hub name ``owner/name``.

    Raises:
        InputError: neither, a directory without ``config.json``, or an unreachable hub.
    """
    directory = Path(model)
    if directory.is_dir():
        if not (directory / CONFIG_FILE).is_file():
            raise InputError(f"model {model}: no {CONFIG_FILE} in it; expected a model directory")
        return directory
    if directory.exists():
        raise InputError(f"model {model}: is a file; expected a model directory")
    if not HUB_NAME.fullmatch(model):
        raise InputError(
            f"model {model}: no such directory; expected a model directory or a hub name owner/name"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=HUB_FILES))
    except Exception as error:  # the hub's client raises whatever its transport raises
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise InputError(
            f"model {model}: no such directory, and the hub gave no such model ({reason})"
        ) from error
