"""What setup.py must know of the machine to build the CUDA kernels: why not, and how."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from pathlib import Path


def package_folders() -> list[Path]:
    """Folders of the namespace package ``nvidia``, where pip puts the CUDA libraries of torch."""
    spec = importlib.util.find_spec("nvidia")
    return [Path(folder) for folder in (spec and spec.submodule_search_locations) or ()]


def packaged_runtime(cuda_home: Path, packages: Iterable[Path], major: str) -> Path | None:
    """The CUDA runtime to name to the linker where ``-lcudart`` finds none.

    pip's packages have only ``libcudart.so.13``, without the link ``libcudart.so`` that the linker
    looks for; so has a ``CUDA_HOME`` inside them. It is what torch loads at run time.

    Args:
        cuda_home: the toolkit, whose own libraries come first.
        packages: see :func:`package_folders`.
        major: of torch's CUDA, such as ``"13"``.

    Returns:
        The library's path, or None: the toolkit has one, or there is none.
    """
    if any((cuda_home / folder / "libcudart.so").exists() for folder in ("lib64", "lib")):
        return None
    # cu13/lib from CUDA 13 on, cuda_runtime/lib before.
    name = f"*/lib/libcudart.so.{major}"
    return next((path for folder in packages for path in sorted(folder.glob(name))), None)
