"""The package as pip installs it: from an sdist or a wheel, outside the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BUILD_SDIST = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
PIP = ("--no-index", "--no-deps", "--no-build-isolation", "--no-cache-dir")

#: An op of one layer; prints where the package is.
RUN_OP = """
import torch, recalkv_vllm
from recalkv_vllm.ops import LatentLayer, bind
layer = LatentLayer(k_up=torch.ones(1, 32, 16), v_up=torch.ones(1, 32, 16), k_spans=((0, 16),),
                    v_spans=((0, 16),), head_dim=32, scale=1.0)
assert bind(layer).value_up(torch.ones(1, 1, 16)).eq(16).all()
print(recalkv_vllm.__file__)
"""
#: A checkpoint's tokens.
SERVE = """
import sys
from vllm import LLM, SamplingParams
llm = LLM(sys.argv[1], attention_backend="recalkv", enforce_eager=True, max_model_len=64,
          kv_cache_memory_bytes=1 << 24)
(output,) = llm.generate("The sea", SamplingParams(max_tokens=8, ignore_eos=True))
print("tokens:", len(output.outputs[0].token_ids))
"""


def modules() -> set[str]:
    """Paths below the installed package of all that is not compiled."""
    folders = {"recalkv_vllm": ".", "kernels": "kernels", "benchmarks": "benchmarks"}
    return {"py.typed", "report/templates/report.html"} | {
        str(Path(installed) / path.relative_to(ROOT / folder))
        for folder, installed in folders.items()
        for path in (ROOT / folder).rglob("*.py")
    }


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built in a copy of the checkout, where it leaves its metadata."""
    folder = tmp_path_factory.mktemp("sdist")
    unwanted = shutil.ignore_patterns(".*", "build", "*.egg-info", "*.so", "__pycache__")
    shutil.copytree(ROOT, folder / "checkout", ignore=unwanted)
    run([sys.executable, "-c", BUILD_SDIST, folder], folder / "checkout")
    (path,) = folder.glob("*.tar.gz")
    return path


class Environment:
    """A virtual environment that has everything of this one but the package."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], folder)
        self.python = folder / "venv" / "bin" / "python"
        (self.packages,) = (folder / "venv" / "lib").glob("python*/site-packages")
        (self.packages / "others.pth").write_text(sysconfig.get_path("purelib"))

    def pip(self, *arguments: str | Path, **environment: str) -> str:
        """What ``pip`` printed."""
        done = self.run("-m", "pip", *arguments, **environment)
        return done.stdout + done.stderr

    def run(
        self, *arguments: str | Path, status: int = 0, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Python outside the checkout."""
        return run([self.python, *arguments], self.folder, status, **environment)

    def installed(self) -> set[str]:
        """Paths of the package's files below its folder."""
        root = self.packages / "recalkv_vllm"
        paths = (path for path in root.rglob("*") if path.is_file() and path.suffix != ".pyc")
        return {str(path.relative_to(root)) for path in paths}


def run(
    command: list[str | Path], folder: Path, status: int = 0, **environment: str
) -> subprocess.CompletedProcess[str]:
    """A command that ends with ``status``; ``PYTHONPATH`` would show it the checkout."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        command, cwd=folder, env={**inherited, **environment}, capture_output=True, text=True
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    return Environment(tmp_path)


def test_sdist_is_complete(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        found = {name.partition("/")[2] for name in archive.getnames()}
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    sources += [
        path
        for name in ("recalkv_vllm", "kernels", "benchmarks")
        for path in (ROOT / name).rglob("*.py")
    ]
    expected = {str(path.relative_to(ROOT)) for path in sources}
    expected |= {"recalkv_vllm/report/templates/report.html"}
    expected |= {"recalkv_vllm/py.typed", "setup.py", "cuda_build.py", "pyproject.toml"}
    expected |= {"README.md", "LICENSE"}
    assert expected <= found
    assert not [name for name in found if name.startswith(("tests", "build"))]


def test_sdist_without_a_compiler(sdist: Path, environment: Environment) -> None:
    """All but the kernels is there, and their absence is said by name, with what to do."""
    told = environment.pip("install", "--verbose", "--ignore-installed", *PIP, sdist, CXX="missing")
    assert "C++ and CUDA kernels are not built: no C++ compiler (CXX=missing)" in told
    assert environment.installed() == modules()
    assert "compress" in run([environment.python.parent / "recalkv", "--help"], sdist.parent).stdout
    done = environment.run("-c", RUN_OP, RECALKV_KERNEL="reference")
    assert Path(done.stdout.strip()).parent == environment.packages / "recalkv_vllm"
    told = environment.run("-c", RUN_OP, status=1).stderr.splitlines()[-1]
    assert "KernelUnavailableError: no kernel for float32 on cpu" in told
    assert "not built; it takes a C++20 compiler" in told
    assert "--no-build-isolation" in told


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    """Built in the checkout, where what is compiled for it is already."""
    build = ["build", "--build-lib", tmp_path / "lib"]
    command = ["bdist_wheel", "--skip-build", "--bdist-dir", tmp_path / "bdist", "-d", tmp_path]
    run([sys.executable, "setup.py", "--quiet", *build, *command], ROOT, CUDA_HOME="/missing")
    (path,) = tmp_path.glob("*.whl")
    return path


def test_wheel(wheel: Path, environment: Environment, tiny: Path) -> None:
    """Installed without compiler or checkout, it compresses a model and vLLM serves that."""
    pytest.importorskip("vllm")
    assert "-cp310-abi3-linux_" in wheel.name
    environment.pip("install", "--ignore-installed", *PIP[:2], wheel, CXX="missing")
    assert environment.installed() - modules() == {"_cpu.abi3.so"}
    done = environment.run("-c", RUN_OP, RECALKV_KERNEL="cpu")
    assert Path(done.stdout.strip()).parent == environment.packages / "recalkv_vllm"
    text = ("--dataset", "builtin", "--num-samples", "8", "--seq-len", "64")
    command = [environment.python.parent / "recalkv", "compress", tiny, "-o", "out", *text]
    run([*command, "--compression", "0.75"], environment.folder)
    assert "tokens: 8" in environment.run("-c", SERVE, "out").stdout.splitlines()
