"""Which extensions an installation builds."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cuda_build
from cuda_build import packaged_runtime

ROOT = Path(__file__).parents[2]
SCRIPT = """
import os, sys, torch
from torch.utils import cpp_extension
torch.version.cuda = sys.argv[1] or None
cpp_extension.CUDA_HOME = os.environ["CUDA_HOME"]
torch.__version__ = os.environ.get("TORCH_VERSION", torch.__version__)
from setuptools import distutils
setup = distutils.core.run_setup("setup.py", ["--quiet", "--name"], stop_after="init")
built = setup.ext_modules
print(*(each.name for each in built))
if "TORCH_VERSION" in os.environ:
    build = setup.get_command_obj("build")
    build.ensure_finalized()
    print(build.build_lib, build.build_temp)
for each in built:
    if each.name.endswith("._cuda"):
        print(*(f"-L{folder}" for folder in each.library_dirs))
        print(*(f"-l{name}" for name in each.libraries if name == "cudart"), *each.extra_link_args)
"""
NVCC_13 = "Cuda compilation tools, release 13.1, V13.1.80"


@pytest.mark.parametrize(
    ("torch_cuda", "nvcc", "expected", "told"),
    [
        ("13.0", NVCC_13, {"_cpu", "_cuda"}, ""),
        ("12.8", NVCC_13, {"_cpu"}, "expected CUDA 12"),
        ("12.8", "something else", {"_cpu"}, "found something else"),
        ("12.8", "'; exit 1; '", {"_cpu"}, "does not run"),
        ("12.8", None, {"_cpu"}, "no nvcc"),
        ("", NVCC_13, {"_cpu"}, "without CUDA"),
    ],
    ids=["same", "other-major", "unknown", "broken", "none", "cpu-torch"],
)
def test_cuda_kernels_are_built_where_they_can_be(
    torch_cuda: str, nvcc: str | None, expected: set[str], told: str, tmp_path: Path
) -> None:
    """An nvcc that does not fit torch costs the CUDA kernels, not the installation."""
    done = run_setup(torch_cuda, nvcc, tmp_path)
    built = {name.rpartition(".")[2] for name in done.stdout.splitlines()[0].split()}
    assert built == expected
    lines = [line for line in done.stderr.splitlines() if "CUDA kernels are not built" in line]
    assert len(lines) == (0 if "_cuda" in expected else 1)
    assert told in "".join(lines)


def run_setup(
    torch_cuda: str, nvcc: str | None, home: Path, packages: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """``setup.py`` with a torch of CUDA ``torch_cuda``, and an nvcc in ``home`` that says this."""
    if nvcc is not None:
        write_nvcc(home, nvcc)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, torch_cuda],
        cwd=ROOT,
        env={**os.environ, "CUDA_HOME": str(home), "PYTHONPATH": str(packages or "")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done


def write_nvcc(home: Path, told: str) -> None:
    """An ``nvcc`` in the toolkit ``home`` that prints this."""
    tool = home / "bin" / "nvcc"
    tool.parent.mkdir(parents=True)
    tool.write_text(f"#!/bin/sh\necho '{told}'\n")
    tool.chmod(0o755)


def test_gpus_older_than_the_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_nvcc(tmp_path, NVCC_13)
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(cuda_build.cpp_extension, "CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(cuda_build, "architecture_flags", list)
    reason = cuda_build.reason_against_cuda()
    assert reason == "expected compute capability 8.0 or newer, found older GPUs only"


def test_list_of_an_unknown_architecture_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;11.7")
    with pytest.raises(ValueError, match=r"11\.7"):
        cuda_build.architecture_flags()


def test_driver_without_nvcc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No toolkit is found anywhere; a ``bin/nvcc`` where pip was started is not one."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(cuda_build.cpp_extension, "CUDA_HOME", None)
    assert cuda_build.reason_against_cuda() == "no nvcc (CUDA_HOME=None)"


@pytest.mark.parametrize("compiler", ["missing -m64", ""])
def test_no_cpp_compiler(compiler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It costs all that is compiled, nvcc's too, but not the installation."""
    monkeypatch.setenv("CXX", compiler)
    done = run_setup("13.0", NVCC_13, tmp_path)
    assert done.stdout == "\n"
    lines = [line for line in done.stderr.splitlines() if line.startswith("recalkv_vllm:")]
    expected = f"C++ and CUDA kernels are not built: no C++ compiler (CXX={compiler})"
    assert lines == [f"recalkv_vllm: {expected}"]


def test_cpp_compiler_with_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "c++ -m64")
    assert run_setup("", None, tmp_path).stdout.split() == ["recalkv_vllm._cpu"]


def test_cpp_compiler_that_fails_is_an_error(tmp_path: Path) -> None:
    """An installation never loses its speed silently."""
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\n[ $# = 1 ] && exec c++ $1\necho cannot compile >&2; exit 1\n")
    compiler.chmod(0o755)
    done = subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build", "--build-base", tmp_path / "build"],
        cwd=ROOT,
        env={**os.environ, "CXX": str(compiler), "CUDA_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "cannot compile" in done.stdout + done.stderr


def test_each_torch_has_its_own_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else an installation would find what another torch's left, and call it up to date."""
    folders = set()
    for version in ("2.13.0+cpu", "2.13.0+cu130"):
        monkeypatch.setenv("TORCH_VERSION", version)
        folders |= set(run_setup("", None, tmp_path).stdout.splitlines()[1].split())
    assert len(folders) == 4


def compile_shared(output: Path, *arguments: str) -> None:
    """An empty shared library."""
    command = ["g++", "-shared", "-x", "c++", "/dev/null", "-x", "none", *arguments]
    done = subprocess.run([*command, "-o", output], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_cuda_kernels_link_with_the_runtime_of_torchs_packages(tmp_path: Path) -> None:
    """pip's packages, nvcc among them, have ``libcudart.so.13`` and no ``libcudart.so``."""
    home = tmp_path / "nvidia" / "cu13"
    runtime = home / "lib" / "libcudart.so.13"
    runtime.parent.mkdir(parents=True)
    compile_shared(runtime, "-Wl,-soname,libcudart.so.13")
    _, folders, libraries = run_setup("13.0", NVCC_13, home, tmp_path).stdout.splitlines()
    assert f"-L{home}/lib" in folders.split()
    compile_shared(tmp_path / "_cuda.so", *folders.split(), *libraries.split())


def test_where_the_cuda_runtime_is_found(tmp_path: Path) -> None:
    home, packages = tmp_path / "cuda", tmp_path / "nvidia"
    both = packages / "cu13" / "lib", packages / "cuda_runtime" / "lib"
    for folder, major in zip(both, ("13", "12"), strict=True):
        folder.mkdir(parents=True)
        (folder / f"libcudart.so.{major}").touch()
    assert packaged_runtime(home, [tmp_path, packages], "13") == both[0] / "libcudart.so.13"
    assert packaged_runtime(home, [tmp_path, packages], "12") == both[1] / "libcudart.so.12"
    assert packaged_runtime(home, [packages], "14") is None
    assert packaged_runtime(home, [], "13") is None
    (home / "lib64").mkdir(parents=True)
    (home / "lib64" / "libcudart.so").touch()
    assert packaged_runtime(home, [packages], "13") is None


@pytest.mark.parametrize(
    ("listed", "devices", "expected"),
    [
        (None, [], ["80,code=[sm_80,compute_80]", "90a,code=sm_90a"]),
        ("", [(9, 0)], ["90,code=compute_90", "90a,code=sm_90a"]),
        (None, [(8, 6), (8, 9)], ["86,code=sm_86", "89,code=compute_89", "89,code=sm_89"]),
        (None, [(7, 5)], []),
        ("7.5 8.0 9.0+PTX", [], ["80,code=sm_80", "90,code=compute_90", "90a,code=sm_90a"]),
        ("Hopper", [(8, 0)], ["90,code=compute_90", "90a,code=sm_90a"]),
        ("7.0;7.5", [(9, 0)], []),
    ],
    ids=str,
)
def test_architectures(
    listed: str | None,
    devices: list[tuple[int, int]],
    expected: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of the list, else of the GPUs there, else of common ones; never those too old."""
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    if listed is not None:
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(devices))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(devices))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: devices[i])
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_80", "sm_90", "sm_120"])
    assert cuda_build.architecture_flags() == [f"-gencode=arch=compute_{x}" for x in expected]


def test_list_of_old_architectures_costs_only_the_cuda_kernels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.5")
    done = run_setup("13.0", NVCC_13, tmp_path)
    assert "_cuda" not in done.stdout
    assert "8.0 or newer, found TORCH_CUDA_ARCH_LIST=7.5" in done.stderr


def test_old_setuptools_is_named() -> None:
    """A virtual environment of Python 3.11 comes with 65, and pip takes it."""
    script = "import runpy, setuptools; setuptools.__version__ = '65.5.0'; "
    done = subprocess.run(
        [sys.executable, "-c", script + "runpy.run_path('setup.py')"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr == "recalkv_vllm: expected setuptools 77 or later, found 65.5.0\n"
