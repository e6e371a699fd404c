"""Where a served model's factors are: in its own directory, or beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError
from vllm.config import ModelConfig

from recalkv_vllm.base_digest import DIGEST_KEY, base_digest, local_files
from recalkv_vllm.checkpoint import (
    CONFIG_FILE,
    FACTORS_FILE,
    AttentionGeometry,
    CheckpointError,
    RecalkvConfig,
    read_hf_config,
)

#: Set in the Hugging Face config of a base model that is served with factors from elsewhere.
SEPARATE_FACTORS = "recalkv_factors"


def locate_factors(model_config: ModelConfig) -> Path:
    """Path of ``recalkv.safetensors`` for a local directory or a hub id (downloaded to its cache).

    Raises:
        CheckpointError: the hub has no such model, or does not answer.
    """
    if separate := getattr(model_config.hf_config, SEPARATE_FACTORS, None):
        return Path(separate)
    directory = Path(model_config.model)
    if not directory.is_dir():
        directory = _download(model_config.model, model_config.revision, model_config.hf_token)
    return directory / FACTORS_FILE


def _download(repo_id: str, revision: str | None, token: bool | str | None) -> Path:
    """Directory of the configuration and the factors of one commit of a hub's model."""
    files = [CONFIG_FILE, FACTORS_FILE]
    try:
        found = snapshot_download(repo_id, revision=revision, token=token, allow_patterns=files)
        return Path(found)
    # No name of a model, no such model or revision, no answer: each has an error of its own.
    except (OSError, ValueError) as error:
        which = f" at revision {revision}" if revision else ""
        raise CheckpointError(
            f"{repo_id}: expected a directory, or a model of the Hugging Face hub{which}; "
            f"found neither ({type(error).__name__})"
        ) from error


def names_separate_factors(model_config: ModelConfig) -> bool:
    """Whether the config's ``recalkv`` object only says where the factors are."""
    raw = getattr(model_config.hf_config, "recalkv", None)
    return isinstance(raw, Mapping) and {"factors"} <= set(raw) <= {"factors", "revision"}


def adopt_separate_factors(model_config: ModelConfig) -> None:
    """Put the ``recalkv`` object that lies beside separate factors into the base's config.

    Raises:
        CheckpointError: no factors there, or those of another base model or revision.
    """
    hf_config = model_config.hf_config
    source, revision = hf_config.recalkv["factors"], hf_config.recalkv.get("revision")
    if not isinstance(source, str) or not isinstance(revision, str | None):
        raise CheckpointError(
            f"--hf-overrides: recalkv: expected strings, found {hf_config.recalkv}"
        )
    named = Path(source)
    if not named.is_dir():
        named = _download(source, revision, model_config.hf_token)
    theirs = read_hf_config(named)
    where = f"{named / CONFIG_FILE}"
    RecalkvConfig.from_hf_config(theirs, where)
    base = hf_config.to_dict()
    expected, found = (
        AttentionGeometry.from_hf_config(theirs),
        AttentionGeometry.from_hf_config(base),
    )
    if expected != found:
        raise CheckpointError(
            f"{where}: factors of another base model: expected {expected}, found {found}"
        )
    check_base(model_config, theirs, found.layer_indices, where)
    hf_config.recalkv = theirs["recalkv"]
    setattr(hf_config, SEPARATE_FACTORS, str(named / FACTORS_FILE))


def check_base(
    model_config: ModelConfig, theirs: Mapping[str, Any], layers: Sequence[int], where: str
) -> None:
    """Whether separate factors were made of the weights that ``model_config`` names.

    Args:
        model_config: of the base model.
        theirs: the configuration beside the factors, read from the file ``where``.
        layers: with attention, by their index in the decoder.
        where: for the error message.

    Raises:
        CheckpointError: they were not.
    """
    digest = base_digest(_files(model_config), layers)
    if theirs.get(DIGEST_KEY) != digest:
        raise CheckpointError(
            f"{where}: {DIGEST_KEY}: factors of another base model or revision: expected the "
            f"weights {theirs.get(DIGEST_KEY)}, found {digest} in {model_config.model}"
        )


def _files(model_config: ModelConfig) -> Callable[[str], Path | None]:
    if Path(model_config.model).is_dir():
        return local_files(Path(model_config.model))

    def find(name: str) -> Path | None:
        try:
            return Path(
                hf_hub_download(
                    model_config.model,
                    name,
                    revision=model_config.revision,
                    token=model_config.hf_token,
                )
            )
        except EntryNotFoundError:
            return None

    return find
