"""``recalkv env``: what is here, and a line instead of a failure for what is broken."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from recalkv_vllm.cli import main
from recalkv_vllm.environment import collect, packages, probes, probing
from recalkv_vllm.ops import dispatch, reference

RAISES = "raise ImportError('libfoo.so.1: cannot open shared object file')"
CRASHES = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"
LIBRARIES = ("torch", "transformers", "triton", "vllm")
RUN = "import sys; from recalkv_vllm.cli import main; sys.exit(main(['env', *sys.argv[1:]]))"


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """``broken(source)``: a process whose libraries all are ``source``; its JSON and text."""

    def run(source: str, *arguments: str, **environment: str) -> str:
        for name in LIBRARIES:
            (tmp_path / f"{name}.py").write_text(source)
        path = os.pathsep.join((str(tmp_path), *filter(None, sys.path)))
        done = subprocess.run(
            [sys.executable, "-c", RUN, *arguments],
            env={**os.environ, "PYTHONPATH": path, **environment},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert not done.stderr
        return done.stdout

    return run


def test_libraries_that_raise(broken) -> None:
    shown = broken(RAISES)
    for name in (*LIBRARIES, "kernels"):
        assert f"warning: {name}: ImportError: libfoo.so.1: cannot open" in shown
    assert "plugin:        ImportError: libfoo.so.1" in shown
    assert "CPU: " in shown


def test_libraries_that_end_the_process(broken) -> None:
    found = json.loads(broken(CRASHES, "--json"))
    for name in (*LIBRARIES, "kernels"):
        assert f"{name}: ends its process with SIGSEGV" in found["warnings"]
    assert found["devices"] == []
    assert found["plugin"]["error"] == "ends its process with SIGSEGV"


def test_cache_that_cannot_be_written(broken, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "cache"
    shown = broken(RAISES, RECALKV_CACHE=str(path))
    assert f"warning: cache: cannot be written ([Errno 20] Not a directory: '{path}')" in shown
    assert f"RECALKV_CACHE={path}" in shown


def test_plugin_that_is_left_out(broken) -> None:
    assert "warning: plugin: VLLM_PLUGINS=other leaves recalkv out" in broken(
        RAISES, VLLM_PLUGINS="other"
    )


def test_a_probe_that_takes_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text("import time; time.sleep(60)")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(tmp_path), *filter(None, sys.path))))
    assert probing.probe(["triton"], timeout=1.0) == {
        "triton": {"error": "takes longer than 1 seconds"}
    }


def test_what_follows_a_probe_that_ends_its_process(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = [([b'{"a": 1}'], "ends its process with SIGILL"), ([b'{"c": 3}'], "status 0")]
    commands = []

    def run(command, timeout):
        commands.append(command[3:])
        return ends[len(commands) - 1]

    monkeypatch.setattr(probing, "_run", run)
    found = probing.probe(["one", "two", "three"])
    assert found == {
        "one": {"a": 1},
        "two": {"error": "ends its process with SIGILL"},
        "three": {"c": 3},
    }
    assert commands == [["one", "two", "three"], ["three"]]


def test_kernels_are_those_that_the_dispatcher_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RECALKV_KERNEL", raising=False)
    monkeypatch.delenv("RECALKV_CPU_ISA", raising=False)
    (device, *_) = probes.kernels()["devices"]
    assert device["device"] == "cpu"
    for dtype in probes.DTYPES:
        rows = {row["kernels"]: row for row in device["kernels"] if row["dtype"] == dtype}
        assert set(rows) == set(dispatch.MODULES)
        where = torch.device("cpu"), getattr(torch, dtype)
        chosen = dispatch.implementation(*where)
        (serving,) = (name for name, row in rows.items() if row["serves"])
        assert rows[serving]["description"] == chosen.describe(*where)
        assert chosen.__name__ == dispatch.MODULES[serving]
        assert rows["cuda"]["description"] is None
        assert "CUDA" in rows["cuda"]["reason"]
        assert rows["reference"]["description"] == reference.describe(*where)


def test_forced_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECALKV_KERNEL", "reference")
    rows = probes.kernels()["devices"][0]["kernels"]
    assert {row["kernels"] for row in rows if row["serves"]} == {"reference"}


def test_no_kernels_are_warned_of(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv("RECALKV_KERNEL", "fast")
    found = {name: {"error": "untested"} for name in probes.PROBES}
    monkeypatch.setattr(collect, "probe", lambda _: {**found, "kernels": probes.kernels()})
    assert main(["env"]) == 0
    warnings = capsys.readouterr().out.split("warning: ")[1:]
    assert "RECALKV_KERNEL=fast: no kernels for bfloat16 on cpu\n" in warnings


@pytest.mark.parametrize(
    ("name", "version", "expected"),
    [
        ("vllm", "0.31.2", "vLLM 0.31.2 is older than what this plugin was tried with, 0.32 to"),
        ("vllm", "0.34.0rc1", "vLLM 0.34.0rc1 is newer than what this plugin was tried with"),
        ("vllm", "0.33.1+cpu", None),
        ("transformers", "4.57.1", "transformers: expected >=5, found 4.57.1"),
        ("transformers", "5.1.0.dev0", None),
        ("triton", "0.1", None),
    ],
)
def test_releases_that_were_not_tried(monkeypatch, name, version, expected) -> None:
    own = packages._version
    monkeypatch.setattr(packages, "_version", lambda n: version if n == name else own(n))
    found, warnings = packages.packages()
    assert found[name]["version"] == version
    about = [line for line in warnings if line.lower().startswith(name)]
    assert [line.startswith(expected or "") for line in about] == [True] * bool(expected)


def test_package_that_is_not_installed(monkeypatch) -> None:
    def requires(_):
        raise packages.metadata.PackageNotFoundError("recalkv_vllm")

    monkeypatch.setattr(packages.metadata, "requires", requires)
    assert any("requirements cannot be read" in line for line in packages.packages()[1])


@pytest.mark.slow  # imports vLLM
def test_everything_is_well_here(capsys, monkeypatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    monkeypatch.delenv("RECALKV_KERNEL", raising=False)
    assert main(["env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["warnings"] == []
    assert found["plugin"] == {
        "entry_point": "recalkv_vllm:register",
        "backend": "recalkv_vllm.serving.attention.backend",
        "error": None,
    }
