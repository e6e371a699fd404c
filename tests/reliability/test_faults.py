"""Killed, starved and mutilated: one line of error or none, and nothing half-written."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from recalkv_vllm.checkpoint import FACTORS_FILE, CheckpointError
from recalkv_vllm.cli import main
from recalkv_vllm.compression.calibration.sum_store import SumStore
from recalkv_vllm.compression.errors import OutputError
from recalkv_vllm.compression.options import CompressOptions
from recalkv_vllm.compression.output.reader import check_factors
from recalkv_vllm.compression.pipeline import compress
from tests.reliability.figures import count

FEW = {"num_samples": 4, "seq_len": 32}
ARGUMENTS = ["--compression", "0.5", "--num-samples", "4", "--seq-len", "32"]
#: ``recalkv`` that stops, and says so, once the weights are written and before the factors are.
PAUSED = """
import sys, time
from recalkv_vllm.cli import main
from recalkv_vllm.compression.output import writer

def pause(*_):
    print("writing", flush=True)
    time.sleep(600)

writer.save_factors = pause
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def two_shards(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model with its weights in two files and an index."""
    model = tmp_path / "sharded"
    shutil.copytree(tiny, model)
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    weight_map = {}
    for i, names in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2])):
        file = f"model-0000{i + 1}-of-00002.safetensors"
        save_file({name: tensors[name] for name in names}, model / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    return model


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """No file of this process may grow beyond ``size`` bytes."""
    _, hard = before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def paused(tiny: Path, tmp_path: Path) -> Iterator[tuple[subprocess.Popen, Path]]:
    """A ``recalkv compress`` in the middle of writing its output, and that output's path."""
    out = tmp_path / "results" / "out"
    process = subprocess.Popen(
        [sys.executable, "-c", PAUSED, "compress", tiny, "-o", out, *ARGUMENTS],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "writing\n", process.communicate()
        yield process, out
    finally:
        process.kill()
        process.communicate()


def test_killed_while_writing(paused, tiny: Path, caplog: pytest.LogCaptureFixture) -> None:
    """No half checkpoint at OUT; what is beside it is named by the next run, which succeeds."""
    process, out = paused
    assert not out.exists()
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    count("faults injected")
    assert not out.exists()
    (left,) = out.parent.iterdir()
    assert left.name.startswith(".out.")
    with caplog.at_level("WARNING", "recalkv_vllm"):
        compress(CompressOptions(str(tiny), out, 0.5, **FEW))
    assert f"{left}: of a run that was killed, or is still writing" in caplog.text
    check_factors(out)
    assert sorted(out.parent.iterdir()) == sorted((left, out))


def test_ended_while_writing(paused) -> None:
    process, out = paused
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    count("faults injected")
    assert process.returncode == 130
    assert error.splitlines()[-1] == "recalkv: interrupted"
    assert "Traceback" not in error
    assert list(out.parent.iterdir()) == []


@pytest.mark.parametrize("what", ["statistics", "weights"])
def test_files_that_may_not_grow(
    tiny: Path, tmp_path: Path, monkeypatch, capsys, what: str
) -> None:
    cache, out = tmp_path / "cache", tmp_path / "results" / "out"
    monkeypatch.setenv("RECALKV_CACHE", str(cache))
    if what == "weights":
        compress(CompressOptions(str(tiny), tmp_path / "first", 0.5, **FEW))
        capsys.readouterr()
    with files_up_to(30_000):
        status = main(["compress", str(tiny), "-o", str(out), *ARGUMENTS])
    error = capsys.readouterr().err.splitlines()[-1]
    count("faults injected")
    assert status == 2
    assert error.startswith("recalkv: error: ")
    assert str(out if what == "weights" else cache) in error
    assert "cannot be written" in error
    assert "File too large" in error
    assert not out.parent.exists() or list(out.parent.iterdir()) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """``small_disk(size)``: a directory on a file system of its own."""
    mounted: list[Path] = []

    def mount(size: str) -> Path:
        path = tmp_path / f"disk-{size}"
        path.mkdir()
        options = ["-t", "tmpfs", "-o", f"size={size}", "recalkv-test", path]
        try:
            subprocess.run(["mount", *options], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("may not mount a file system")
        mounted.append(path)
        return path

    yield mount
    for path in mounted:
        subprocess.run(["umount", path], check=True)


def test_full_disk(tiny: Path, tmp_path: Path, small_disk) -> None:
    disk = small_disk("128k")
    with pytest.raises(OutputError, match=f"output {disk}/out: cannot be written .*No space left"):
        compress(CompressOptions(str(tiny), disk / "out", 0.5, **FEW))
    count("faults injected")
    assert list(disk.iterdir()) == []


def test_full_disk_of_the_statistics(small_disk) -> None:
    """An error of Python's; a store to a page that has no block would end the process."""
    disk = small_disk("192k")
    with (
        pytest.raises(OutputError, match=f"statistics {disk}.*RECALKV_CACHE.*No space left"),
        SumStore(disk / "store", {"sum": (4, 128, 128)}),
    ):
        pytest.fail("opened")
    count("faults injected")
    with SumStore(disk / "store", {"sum": (4, 32, 32)}) as store:
        store.sums["sum"] += 1
        store.finish(tokens=1)


def vanished(shard: Path) -> None:
    shard.unlink()


def dangling(shard: Path) -> None:
    """As a hub's cache is after its blobs were cleaned up."""
    shard.unlink()
    shard.symlink_to("/nowhere/blob")


def a_directory(shard: Path) -> None:
    shard.unlink()
    shard.mkdir()


def truncated(shard: Path) -> None:
    shard.write_bytes(shard.read_bytes()[:-1000])


def emptied(shard: Path) -> None:
    shard.write_bytes(b"")


def unreadable(shard: Path) -> None:
    shard.chmod(0)
    if os.access(shard, os.R_OK):
        pytest.skip("root reads everything")


@pytest.mark.parametrize("fault", [vanished, dangling, a_directory, truncated, emptied, unreadable])
@pytest.mark.parametrize("when", ["before", "while writing"])
def test_broken_shard(
    two_shards: Path, tmp_path: Path, capsys, monkeypatch, fault: Callable[[Path], None], when: str
) -> None:
    """Refused in one line, also if it breaks after the model was loaded."""
    shard = two_shards / "model-00002-of-00002.safetensors"
    if when == "before":
        fault(shard)
    else:
        from recalkv_vllm.compression import pipeline

        write = pipeline.write_checkpoint

        def break_then_write(*args: object) -> None:
            fault(shard)
            write(*args)

        monkeypatch.setattr(pipeline, "write_checkpoint", break_then_write)
    out = tmp_path / "results" / "out"
    assert main(["compress", str(two_shards), "-o", str(out), *ARGUMENTS, "--method", "svd"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    count("faults injected")
    assert error.startswith("recalkv: error: ")
    assert str(shard if when != "before" else two_shards) in error
    assert not out.parent.exists() or list(out.parent.iterdir()) == []


def test_flipped_bits_of_the_factors(tiny: Path, tmp_path: Path) -> None:
    """Any bit, though the file stays well-formed: the digest tells."""
    out = tmp_path / "out"
    compress(CompressOptions(str(tiny), out, 0.5, method="svd"))
    check_factors(out)
    path = out / FACTORS_FILE
    content = path.read_bytes()
    body = 8 + int.from_bytes(content[:8], "little")
    generator = torch.Generator().manual_seed(0)
    for position in torch.randint(body, len(content), (20,), generator=generator).tolist():
        flipped = bytearray(content)
        # The lowest bit of a number: the least that could go unnoticed.
        flipped[position & ~1] ^= 1
        path.write_bytes(flipped)
        with pytest.raises(CheckpointError, match=f"{path}: expected SHA-256"):
            check_factors(out)
        count("faults injected")
    path.write_bytes(content)
    check_factors(out)
