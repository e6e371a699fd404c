"""``recalkv bench serve`` without a server: what is refused, what is kept, what is drawn."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from recalkv_vllm.benchmarks import load, serving
from recalkv_vllm.benchmarks.vllm_server import ServerError
from recalkv_vllm.benchmarks.workloads import WORKLOADS
from recalkv_vllm.cli import main

FEW = ["--num-samples", "4", "--seq-len", "32", "--compression", "0.5", "--method", "svd"]


@pytest.fixture
def checkpoint(tiny, tmp_path, capsys) -> Path:
    out = tmp_path / "half"
    assert main([*map(str, ["compress", tiny, "-o", out, *FEW])]) == 0
    capsys.readouterr()
    return out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workload", "nothing"], "--workload: expected all or some of chat.*found 'nothing'"),
        (["--workload", "long", "--max-model-len", "512"], "needs 1568 tokens per request, more"),
        (["--concurrency", "0"], "--concurrency: expected at least 1, found 0"),
        (["--base", "nowhere"], "--base: expected the directory or hub name.*found 'nowhere'"),
    ],
)
def test_bad_input(checkpoint, tiny, tmp_path, fails, arguments, message):
    arguments = arguments if "--base" in arguments else ["--base", tiny, *arguments]
    error = fails("bench", "serve", checkpoint, "-o", tmp_path / "bench", *arguments)
    assert re.search(message, error)
    assert not (tmp_path / "bench").exists()


class FakeServer:
    """Stands in for a vLLM server, so that only the bookkeeping is tested."""

    def __init__(self, model, args, log, timeout=0):
        self.model, self.args = model, args

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def kv_cache_tokens(self):
        return 1000 if "--attention-backend" not in self.args else 2000


def row(workload, concurrency):
    numbers = dict.fromkeys((*load.CLIENT, "duration_s", "peak_cache_use"), 1.0)
    return {**numbers, "output_throughput": 10.0 * concurrency, "preemptions": 0}


def test_rows_plots_and_what_is_kept_when_a_server_fails(
    checkpoint, tiny, tmp_path, capsys, fails, monkeypatch
):
    seeds = []

    def measure(server, workload, concurrency, prompts, seed):
        seeds.append((server.model, seed))
        return row(workload, concurrency)

    monkeypatch.setattr(serving, "VllmServer", FakeServer)
    monkeypatch.setattr(serving, "measure", measure)
    out = tmp_path / "bench"
    arguments = ["bench", "serve", checkpoint, "--base", tiny, "-o", out, "--concurrency", 1, 4]
    arguments += ["--workload", "chat", "context-256", "context-1024"]
    assert main([*map(str, arguments), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result == json.loads((out / "result.json").read_text())
    assert not result["partial"]
    assert len(result["rows"]) == 2 * 2 * (2 + 2)
    keys = {"workload", "concurrency", "server", "kv_cache_tokens", "ttft_ms_p99", "itl_ms_p50"}
    assert keys <= set(result["rows"][0])
    by_server = {r["server"]: r["kv_cache_tokens"] for r in result["rows"]}
    assert by_server == {"stock": 1000, "half": 2000}
    # The same prompts for both servers, and never the same twice.
    stock = [seed for model, seed in seeds if model == str(tiny)]
    assert stock == [seed for model, seed in seeds if model == str(checkpoint)]
    assert len(set(stock)) == len(stock)
    for name in ("throughput.png", "latency.png", "capacity.png"):
        assert Image.open(out / name).size[0] > 400

    def fail(server, workload, concurrency, prompts, seed):
        if server.model == str(checkpoint):
            raise ServerError("vllm bench serve: status 1; last lines:\nKilled")
        return row(workload, concurrency)

    monkeypatch.setattr(serving, "measure", fail)
    error = fails(*arguments)
    assert "vllm bench serve: status 1; last lines (see above); 4 rows measured before" in error
    kept = json.loads((out / "result.json").read_text())
    assert kept["partial"]
    assert len(kept["rows"]) == 4


def test_workloads_ask_for_what_they_say() -> None:
    for workload in WORKLOADS.values():
        arguments = workload.arguments()
        options = dict(zip(arguments[::2], arguments[1::2], strict=True))
        option = "--" + options["--dataset-name"].replace("_", "-")
        names = ("prefix", "suffix" if workload.documents else "input")
        prefix, rest = (int(options[f"{option}-{name}-len"]) for name in names)
        assert prefix + rest == workload.input_len
