"""What setup.py must know of the machine to build the CUDA kernels: why not, and how."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path

import torch
from torch.utils import cpp_extension

#: H100, with the instructions that only it has.
HOPPER = "-gencode=arch=compute_90a,code=sm_90a"
#: Where no GPU is to be seen and none is asked for: A100, and newer ones from the PTX; H100.
ARCHITECTURES = [
    "-gencode=arch=compute_80,code=[sm_80,compute_80]",
    HOPPER,
]
OLDEST_ARCHITECTURE = 80


def reason_against_cuda() -> str | None:
    """Why the CUDA kernels cannot be built here, in one line, or None."""
    if torch.version.cuda is None:
        return "torch is a build without CUDA"
    home = cpp_extension.CUDA_HOME
    if home is None or not (nvcc := Path(home, "bin", "nvcc")).is_file():
        return f"no nvcc (CUDA_HOME={home})"
    try:
        told = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        return f"{nvcc} does not run ({error})"
    release = re.search(r"release (\d+)\.\d+", told.stdout)
    major = torch.version.cuda.split(".")[0]
    if release is None or release[1] != major:
        found = release[0] if release else " ".join(told.stdout.split())
        return f"{nvcc}: expected CUDA {major}, as torch's, found {found}"
    if not architecture_flags():
        listed = os.environ.get("TORCH_CUDA_ARCH_LIST")
        found = f"TORCH_CUDA_ARCH_LIST={listed}" if listed else "older GPUs only"
        return f"expected compute capability 8.0 or newer, found {found}"
    return None


def architecture_flags() -> list[str]:
    """nvcc's options for ``TORCH_CUDA_ARCH_LIST``, else for the GPUs of this machine.

    Architectures too old for the kernels are left out: lists of container images have some. For
    sm_90, sm_90a is built.

    Raises:
        ValueError: ``TORCH_CUDA_ARCH_LIST`` names an architecture that torch does not know.
    """
    unlisted = os.environ.get("TORCH_CUDA_ARCH_LIST", "native") in ("", "native")
    if unlisted and not torch.cuda.is_available():
        return ARCHITECTURES
    flags = [
        HOPPER if x.endswith("code=sm_90") else x for x in cpp_extension._get_cuda_arch_flags()
    ]
    return [x for x in flags if int(re.findall(r"compute_(\d+)", x)[0]) >= OLDEST_ARCHITECTURE]


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
