"""Packages, the C++ and the CUDA extension; everything else is in pyproject.toml."""

import os
from pathlib import Path

import torch
from setuptools import Extension, find_packages, setup
from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension

ROOT = Path(__file__).parent
CPU_HEADERS = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc" / "cpu").glob("*.h"))
CPU_SOURCES = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc" / "cpu").glob("*.cpp"))
CUDA_ROOT = ROOT / "csrc" / "cuda"

#: RECALKV_SANITIZE=1 builds the C++ extension for "make test-asan": an error ends the process.
SANITIZE = os.environ.get("RECALKV_SANITIZE") == "1"
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]


def cuda_extensions() -> list[Extension]:
    """The CUDA kernels, where nvcc and a CUDA build of torch are there to build them."""
    if torch.version.cuda is None or CUDA_HOME is None or not Path(CUDA_HOME, "bin/nvcc").is_file():
        return []

    def files(*patterns: str) -> list[str]:
        return sorted(str(p.relative_to(ROOT)) for name in patterns for p in CUDA_ROOT.glob(name))

    return [
        CUDAExtension(
            "recalkv_vllm._cuda",
            files("*.cu", "*.cpp"),
            depends=files("*.h", "*.cuh"),
            # Neither Python's nor torch's ABI: one build serves several releases of both.
            py_limited_api=True,
            extra_compile_args={
                "cxx": ["-O3", "-std=c++17", "-DUSE_CUDA"],
                "nvcc": [
                    "-O3",
                    "-std=c++17",
                    "-gencode=arch=compute_80,code=[sm_80,compute_80]",
                    "-gencode=arch=compute_90a,code=sm_90a",
                ],
            },
        )
    ]


setup(
    packages=[
        *find_packages(include=["recalkv_vllm*"]),
        "recalkv_vllm.kernels",
        "recalkv_vllm.benchmarks",
    ],
    # Top-level modules called "kernels" or "benchmarks" would shadow another project's.
    package_dir={"recalkv_vllm.kernels": "kernels", "recalkv_vllm.benchmarks": "benchmarks"},
    ext_modules=[
        *cuda_extensions(),
        CppExtension(
            "recalkv_vllm._cpu",
            CPU_SOURCES,
            depends=CPU_HEADERS,
            # -fopenmp only compiles; linking with it would load a second OpenMP runtime, and with
            # it a second pool of threads, beside the one that torch brings. Instruction sets are
            # chosen per file by #pragma, so no -m flag here.
            extra_compile_args=[
                *("-O3", "-fopenmp", "-std=c++20", "-Wno-maybe-uninitialized"),
                *([*SANITIZERS, "-O1", "-g1", "-fno-omit-frame-pointer"] if SANITIZE else ()),
            ],
            extra_link_args=SANITIZERS if SANITIZE else [],
        ),
    ],
    cmdclass={"build_ext": BuildExtension},
)
