"""Packages, the C++ and the CUDA extension; everything else is in pyproject.toml."""

import os
import shlex
import shutil
import sys
from pathlib import Path

import setuptools
import torch
from setuptools import Extension, find_packages, setup
from torch.utils.cpp_extension import (
    CUDA_HOME,
    BuildExtension,
    CppExtension,
    CUDAExtension,
    get_cxx_compiler,
)

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT))  # pip does not
from cuda_build import (  # noqa: E402
    architecture_flags,
    package_folders,
    packaged_runtime,
    reason_against_cuda,
)

# Without build isolation, pip does not look; older ones fail on pyproject.toml, by no clear name.
if int(setuptools.__version__.partition(".")[0]) < 77:
    sys.exit(f"recalkv_vllm: expected setuptools 77 or later, found {setuptools.__version__}")

CPU_HEADERS = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc" / "cpu").glob("*.h"))
CPU_SOURCES = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc" / "cpu").glob("*.cpp"))
CUDA_ROOT = ROOT / "csrc" / "cuda"

#: RECALKV_SANITIZE=1 builds the C++ extension for "make test-asan": an error ends the process.
SANITIZE = os.environ.get("RECALKV_SANITIZE") == "1"
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
#: What was built against another torch looks up to date, and would be installed again.
BUILD = Path("build") / f"torch-{torch.__version__}{'-sanitized' if SANITIZE else ''}"


class Build(BuildExtension):
    """Compiles in one folder; pip gives editable installations another one each time."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.build_temp = str(BUILD / "objects")


def extensions() -> list[Extension]:
    """What can be built. A compiler that fails is an error, none at all is not: it may be a GPU."""
    compiler = get_cxx_compiler()
    if shutil.which([*shlex.split(compiler), ""][0]) is None:
        print(
            f"recalkv_vllm: C++ and CUDA kernels are not built: no C++ compiler (CXX={compiler})",
            file=sys.stderr,
        )
        return []
    return [*cuda_extensions(), cpp_extension()]


def cpp_extension() -> Extension:
    """The C++ kernels, which serve a CPU."""
    return CppExtension(
        "recalkv_vllm._cpu",
        CPU_SOURCES,
        depends=CPU_HEADERS,
        py_limited_api=True,
        # -fopenmp only compiles; linking with it would load a second OpenMP runtime, and with it a
        # second pool of threads, beside the one that torch brings. Instruction sets are chosen per
        # file by #pragma, so no -m flag here.
        extra_compile_args=[
            *("-O3", "-fopenmp", "-std=c++20", "-Wno-maybe-uninitialized"),
            *([*SANITIZERS, "-O1", "-g1", "-fno-omit-frame-pointer"] if SANITIZE else ()),
        ],
        extra_link_args=SANITIZERS if SANITIZE else [],
    )


def cuda_extensions() -> list[Extension]:
    """The CUDA kernels, where they can be built; Triton's serve a GPU without them."""
    if reason := reason_against_cuda():
        print(f"recalkv_vllm: CUDA kernels are not built: {reason}", file=sys.stderr)
        return []

    def files(*patterns: str) -> list[str]:
        return sorted(str(p.relative_to(ROOT)) for name in patterns for p in CUDA_ROOT.glob(name))

    extension = CUDAExtension(
        "recalkv_vllm._cuda",
        files("*.cu", "*.cpp"),
        depends=files("*.h", "*.cuh"),
        # Neither Python's nor torch's ABI: one build serves several releases of both.
        py_limited_api=True,
        extra_compile_args={
            "cxx": ["-O3", "-std=c++17", "-DUSE_CUDA"],
            "nvcc": ["-O3", "-std=c++17", *architecture_flags()],
        },
    )
    major = torch.version.cuda.split(".")[0]
    if runtime := packaged_runtime(Path(CUDA_HOME), package_folders(), major):
        extension.libraries.remove("cudart")
        extension.extra_link_args.append(str(runtime))
    return [extension]


setup(
    packages=[
        *find_packages(include=["recalkv_vllm*"]),
        "recalkv_vllm.report.templates",
        "recalkv_vllm.kernels",
        "recalkv_vllm.kernels.heuristics",
        "recalkv_vllm.benchmarks",
        "recalkv_vllm.benchmarks.peers",
    ],
    # Top-level modules called "kernels" or "benchmarks" would shadow another project's.
    package_dir={"recalkv_vllm.kernels": "kernels", "recalkv_vllm.benchmarks": "benchmarks"},
    ext_modules=extensions(),
    options={
        "build": {"build_base": str(BUILD)},
        # The extensions use no more of Python's C API than 3.10 has.
        "bdist_wheel": {"py_limited_api": "cp310"},
    },
    cmdclass={"build_ext": Build},
)
