"""Packages and the C++ extension; everything else is in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

ROOT = Path(__file__).parent
CPU_SOURCES = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc" / "cpu").glob("*.cpp"))

setup(
    packages=[
        *find_packages(include=["recalkv_vllm*"]),
        "recalkv_vllm.kernels",
        "recalkv_vllm.benchmarks",
    ],
    # Top-level modules called "kernels" or "benchmarks" would shadow another project's.
    package_dir={"recalkv_vllm.kernels": "kernels", "recalkv_vllm.benchmarks": "benchmarks"},
    ext_modules=[
        CppExtension(
            "recalkv_vllm._cpu",
            CPU_SOURCES,
            extra_compile_args=["-O3", "-fopenmp", "-std=c++17"],
            extra_link_args=["-fopenmp"],
        )
    ]
    if CPU_SOURCES
    else [],
    cmdclass={"build_ext": BuildExtension},
)
