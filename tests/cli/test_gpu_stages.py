"""``make gpu``: stages that lose nothing, whatever fails or however long it takes."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import gpu, gpu_stages
from benchmarks.gpu_stages import Stage
from recalkv_vllm.cli.main import build_parser

ROOT = Path(__file__).parents[2]


def stage(name: str, script: str) -> Stage:
    return Stage(name, ("sh", "-c", script))


def test_failure_costs_one_stage_and_is_tried_again(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    ran = tmp_path / "ran"
    stages = [
        stage("first", f"echo first >> {ran}; echo; echo 3 passed"),
        stage("bad", f"echo bad >> {ran}; exit 1"),
        Stage("absent", ("no-such-command",)),
        stage("last", f"echo last >> {ran}"),
    ]
    assert gpu.run(stages, tmp_path / "out", 60) == gpu.FAILED
    told = capsys.readouterr().out
    assert "gpu: first: done after 0 s: 3 passed" in told
    assert told.splitlines()[-1].endswith("out: bad, absent")
    assert "No such file" in (tmp_path / "out" / "absent.log").read_text()
    stages[1] = stage("bad", f"echo mended >> {ran}")
    del stages[2]
    assert gpu.run(stages, tmp_path / "out", 60) == gpu.DONE
    assert ran.read_text().split() == ["first", "bad", "last", "mended"]


def test_call_ends_in_time_and_the_next_goes_on(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    slow = f"echo one >> {ran}; sleep 60 & sleep 60; wait"
    stages = [stage("quick", f"echo quick >> {ran}"), stage("slow", slow), stage("next", "true")]
    began = time.monotonic()
    assert gpu.run(stages, tmp_path, 1) == gpu.UNFINISHED
    assert time.monotonic() - began < 30
    assert json.loads((tmp_path / "stages.json").read_text()) == {
        "quick": "done",
        "slow": "stopped",
    }
    stages[1] = stage("slow", f"echo two >> {ran}")
    assert gpu.run(stages, tmp_path, 60) == gpu.DONE
    assert ran.read_text().split() == ["quick", "one", "two"]


def listed(*options: str) -> list[str]:
    command = [sys.executable, "-S", "-m", "benchmarks.gpu", "--list", "--output", "x", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return [line.partition(":")[0] for line in done.stdout.splitlines()]


def test_stages_need_nothing_installed_to_begin(tmp_path: Path) -> None:
    """``-S``: no packages. Then all that stages import is asked for, except torch and Triton."""
    names = listed("--skip", "test-cuda", "plot")
    assert names[:3] == ["requirements", "install", "smoke"]
    assert "compress" not in names
    assert "test-ops-dispatch" in names
    assert "bench-llama" in names
    assert not any(name.startswith(("test-cuda", "plot")) for name in names)
    (tmp_path / "config.json").touch()
    assert "compress" in listed("--model", str(tmp_path))


def test_commands_of_recalkv_are_understood(tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()
    for each in gpu_stages.stages_of(tmp_path, tmp_path):
        if each.name.startswith(("compress", "bench")):
            command = each.command[2:] if each.command[0] == "env" else each.command
            assert "recalkv_vllm.cli import main" in command[2]
            build_parser().parse_args(command[3:])


def test_requirements(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"numpy": "2.3.5", "rich": "14.0", "setuptools": "68.1.2", "wheel": "0.45.1"}

    def version(name: str) -> str:
        if name not in versions:
            raise gpu_stages.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(gpu_stages, "version", version)
    missing = gpu_stages.missing_requirements()
    assert {"hypothesis", "pytest", "safetensors>=0.5", "setuptools>=77"} <= set(missing)
    assert not {"numpy", "rich>=13", "wheel"} & set(missing)
    assert not any("torch" in name or "triton" in name for name in missing)
