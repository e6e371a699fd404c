"""What ``make gpu`` runs, in order; see :mod:`.gpu`. Needs the standard library only: the first
stage installs the rest."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
#: What stages import, besides torch and Triton, which are never installed or changed here.
REQUIREMENTS = (
    *("setuptools>=77", "wheel", "ninja", "numpy", "safetensors>=0.5", "matplotlib>=3.8"),
    *("pytest", "hypothesis", "rich>=13", "filelock", "transformers>=5", "accelerate>=1"),
    *("compressed-tensors>=0.17", "datasets>=3"),
)
TESTS = ("tests/ops", "tests/kernels", "tests/cuda")
KERNEL = ("bench", "kernel", "--seconds", "0.3")
LLAMA = ("--geometry", "llama-3.1-8b", "--group-size", "1", "2", "--spans", "split", "joint")
LONG = ("--context", "32768", "--batch", "8")
#: Options of ``recalkv bench kernel``, by the name of their rows.
BENCHMARKS = {
    "llama": (
        *(*LLAMA, "--compression", "0.5", "0.75"),
        *("--context", "1024", "8192", "32768", "131072", "--batch", "1", "8", "32"),
    ),
    "quantized": (*LLAMA, "--compression", "0.5", "--latent-dtype", "int8", "int4", "bands", *LONG),
    "all": (
        *("--geometry", "all", "--compression", "0.5", "0.7", "--spans", "split", "joint"),
        *LONG,
    ),
    "triton": (*LLAMA, "--compression", "0.5", "0.75", *LONG),
}


@dataclass(frozen=True, slots=True)
class Stage:
    """One step, done once its command ends with 0; run again, the command goes on or is quick."""

    name: str
    command: tuple[str, ...]


def stages_of(output: Path, model: Path | None) -> Iterator[Stage]:
    """All stages.

    Args:
        output: folder of results.
        model: a small model's directory, to compress on the device; no such stage if not there.
    """
    python = (sys.executable, "-m")
    recalkv = (
        *(sys.executable, "-c"),
        "import sys; from recalkv_vllm.cli import main; sys.exit(main())",
    )
    pip = (*python, "pip", "install", "--no-build-isolation")
    if missing := missing_requirements():
        yield Stage("requirements", (*pip, *missing))
    # No dependencies: torch, and vLLM if there is one, stay as they are.
    yield Stage("install", (*pip, "--verbose", "--no-deps", "--editable", str(ROOT)))
    yield Stage("smoke", (*python, "recalkv_vllm.benchmarks.smoke"))
    if model is not None and (model / "config.json").is_file():
        made = ("-o", str(output / "compressed"), "--dataset", "builtin")
        yield Stage("compress", (*recalkv, "compress", str(model), *made, "--compression", "0.75"))
    for folder in TESTS:
        for file in sorted((ROOT / folder).glob("test_*.py")):
            name = f"test-{file.parent.name}-{file.stem.removeprefix('test_')}"
            yield Stage(name, (*python, "pytest", "-q", str(file.relative_to(ROOT))))
    for name, options in BENCHMARKS.items():
        rows = ("--rows", str(output / f"{name}.jsonl"))
        command = (*recalkv, *KERNEL, *options, *rows)
        if name == "triton":
            command = ("env", "RECALKV_KERNEL=triton", *command)
        yield Stage(f"bench-{name}", command)
    for name in BENCHMARKS:
        files = (str(output / f"{name}.jsonl"), str(output / f"{name}.png"))
        yield Stage(f"plot-{name}", (*python, "recalkv_vllm.benchmarks.kernel_plot", *files))


def missing_requirements() -> list[str]:
    """Requirements of which no version, or an older one, is installed."""
    return [requirement for requirement in REQUIREMENTS if not _installed(requirement)]


def _installed(requirement: str) -> bool:
    name, _, least = requirement.partition(">=")
    try:
        found = version(name)
    except PackageNotFoundError:
        return False

    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(".")[:2] if part.isdecimal()]

    return not least or numbers(found) >= numbers(least)
