"""``recalkv bench kernel --rows``: what is measured is kept, what fails costs only itself."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from recalkv_vllm.benchmarks import kernel, kernel_plot, kernel_table
from recalkv_vllm.benchmarks.kernel_rows import read_rows
from recalkv_vllm.benchmarks.roofline import Roof, Timing
from recalkv_vllm.benchmarks.runs import Runs
from recalkv_vllm.cli import bench_kernel
from recalkv_vllm.compression.errors import InputError

#: Seconds of each function.
OURS, STOCK = 3e-6, 4e-6


class Platform(SimpleNamespace):
    """A device that has memory for contexts shorter than ``room``."""

    room = 100

    def __init__(self) -> None:
        super().__init__(built=[])

    def build(self, geometry, latent, latent_format, context, batch, queries, dtype) -> Runs:
        self.built.append(context)
        if context >= self.room:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")
        return Runs("kernel", 1, lambda: OURS, {"s": lambda: STOCK}, lambda: 0)

    def largest_cache_bytes(self) -> int:
        return 1 << 40

    def clean_up(self) -> None:
        """As on a device that is not lost."""


@pytest.fixture
def platform(monkeypatch: pytest.MonkeyPatch) -> Platform:
    fake = Platform()
    monkeypatch.setattr(kernel, "_platform", lambda device: fake)
    monkeypatch.setattr(kernel, "measure_roof", lambda *_: Roof(1e9, 1e12))

    def alternate(runs: list[Callable[[], float]], *_: object, **__: object) -> list[Timing]:
        return [Timing(run(), 0, 0) for run in runs]

    monkeypatch.setattr(kernel, "alternate", alternate)
    return fake


def options(path: Path | None, *more: str) -> argparse.Namespace:
    parser = bench_kernel.add_parser(argparse.ArgumentParser().add_subparsers())
    rows = [] if path is None else ["--rows", str(path)]
    return parser.parse_args(["--device", "cpu", "--compression", "0.5", *rows, *more])


def test_row_that_finds_no_memory_is_recorded_and_the_rest_goes_on(
    platform: Platform, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = tmp_path / "rows.jsonl"
    result = kernel.run(options(path, "--context", "10", "200", "30"))
    assert [row["context"] for row in result["rows"]] == [10, 30]
    (failed,) = result["failed"]
    assert failed["context"] == 200
    assert failed["error"] == "OutOfMemoryError: CUDA out of memory. Tried to allocate"
    assert [row["context"] for row in read_rows(path)] == [10, 200, 30]
    kernel_table.show(result)
    assert "200x1: OutOfMemoryError" in capsys.readouterr().out


def test_interrupted_run_goes_on(platform: Platform, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    kernel.run(options(path, "--context", "10", "200"))
    path.write_text(path.read_text() + '{"geometry": "lla')  # killed while it wrote
    result = kernel.run(options(path, "--context", "10", "200", "30"))
    assert platform.built == [10, 200, 30]
    assert [row["context"] for row in result["rows"]] == [10, 30]
    assert [json.loads(line)["context"] for line in path.read_text().splitlines()] == [10, 200, 30]
    kernel.run(options(path, "--context", "10", "--queries", "2"))
    assert platform.built == [10, 200, 30, 10]


def test_lost_device_ends_the_run_after_its_row(platform: Platform, tmp_path: Path) -> None:
    def lost() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    platform.clean_up = lost
    path = tmp_path / "rows.jsonl"
    with pytest.raises(RuntimeError, match="illegal memory access"):
        kernel.run(options(path, "--context", "200", "30"))
    assert [row["context"] for row in read_rows(path)] == [200]


def test_ratio_is_ours_to_stock(platform: Platform) -> None:
    (row,) = kernel.run(options(None, "--context", "10"))["rows"]
    assert row["ratio"] == pytest.approx(OURS / STOCK)


def test_nothing_measured_is_an_error(platform: Platform) -> None:
    with pytest.raises(InputError, match="nothing was measured"):
        kernel.run(options(None, "--context", "200"))


def test_file_of_something_else(platform: Platform, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("not rows\n")
    with pytest.raises(InputError, match=r"--rows: .* cannot be read"):
        kernel.run(options(path, "--context", "10"))


def test_plot_of_rows_on_disk(
    platform: Platform, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, picture = tmp_path / "rows.jsonl", tmp_path / "rows.png"
    kernel.run(options(path, "--context", "10", "200", "30"))
    monkeypatch.setattr(sys, "argv", ["kernel_plot", str(path), str(picture)])
    assert kernel_plot.main() == 0
    assert picture.stat().st_size > 1000
