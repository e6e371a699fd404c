"""``recalkv bench offline`` with a stand-in for ``vllm``: who runs when, with what, and is kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from recalkv_vllm.benchmarks import offline
from recalkv_vllm.cli import main

FEW = ["--num-samples", "4", "--seq-len", "32", "--compression", "0.5", "--method", "svd"]
#: Writes its arguments, then what vLLM would; compressed checkpoints are twice as fast.
STAND_IN = """#!/usr/bin/env python3
import json, sys
from pathlib import Path
arguments = sys.argv[1:]
with open({calls!r}, "a") as calls:
    calls.write(json.dumps(arguments) + "\\n")
if len(open({calls!r}).readlines()) > {most}:
    sys.exit("something went wrong")
fast = 2 if "--attention-backend" in arguments else 1
result = {{"requests_per_second": 3.0 * fast, "tokens_per_second": 30.0 * fast}}
if arguments[1] == "latency":
    result = {{"latencies": [9.0 / fast, 4.0 / fast, 5.0 / fast]}}
Path(arguments[arguments.index("--output-json") + 1]).write_text(json.dumps(result))
"""


@pytest.fixture
def checkpoint(tiny, tmp_path, capsys) -> Path:
    out = tmp_path / "half"
    assert main([*map(str, ["compress", tiny, "-o", out, *FEW])]) == 0
    capsys.readouterr()
    return out


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """``stand_in(most)``: use it for that many calls; the file with their arguments."""

    def install(most: int) -> Path:
        calls = tmp_path / "calls"
        script = tmp_path / "bin" / "vllm"
        script.parent.mkdir()
        script.write_text(STAND_IN.format(calls=str(calls), most=most))
        script.chmod(0o755)
        monkeypatch.setattr(offline.sys, "executable", str(script.with_name("python")))
        return calls

    return install


def test_systems_take_turns(checkpoint, tiny, tmp_path, stand_in, capsys):
    calls, out = stand_in(8), tmp_path / "bench"
    arguments = ["bench", "offline", checkpoint, "--base", tiny, "-o", out]
    assert main([*map(str, arguments), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result == json.loads((out / "result.json").read_text())
    assert not result["partial"]
    assert [(row["system"], row["round"]) for row in result["rows"]] == [
        ("stock", 0), ("half", 0), ("stock", 1), ("half", 1),
    ]  # fmt: skip
    assert [row["latency_s"] for row in result["rows"]] == [5.0, 2.5, 5.0, 2.5]
    assert [row["requests_per_second"] for row in result["rows"]] == [3.0, 6.0, 3.0, 6.0]
    made = [json.loads(line) for line in calls.read_text().splitlines()]
    assert [call[1] for call in made] == ["throughput", "latency"] * 4
    ours = {"--attention-backend", "recalkv"}
    for stock, compressed in ((made[0], made[2]), (made[1], made[3])):
        differs = {"--output-json", str(tiny), str(checkpoint)}
        same = [argument for argument in stock[:-1] if argument not in differs]
        assert same == [a for a in compressed[:-1] if a not in differs | ours]
    offline.show(result)
    assert "2.00" in capsys.readouterr().out


def test_a_failed_run_keeps_what_was_measured(checkpoint, tiny, tmp_path, stand_in, fails):
    stand_in(3)
    out = tmp_path / "bench"
    error = fails("bench", "offline", checkpoint, "--base", tiny, "-o", out)
    assert "vllm bench latency: ended with status 1 (see above)" in error
    assert "something went wrong" in (out / "half-0.log").read_text()
    kept = json.loads((out / "result.json").read_text())
    assert kept["partial"]
    assert [row["system"] for row in kept["rows"]] == ["stock"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input-len", "4000"], "4064 tokens per request are more than --max-model-len 2048"),
        (["--num-prompts", "0"], "--num-prompts: expected at least 1, found 0"),
        (["--base", "nowhere"], "--base: expected the directory or hub name"),
    ],
)
def test_bad_input(checkpoint, tiny, tmp_path, fails, arguments, message):
    arguments = arguments if "--base" in arguments else ["--base", tiny, *arguments]
    error = fails("bench", "offline", checkpoint, "-o", tmp_path / "bench", *arguments)
    assert message in error
    assert not (tmp_path / "bench").exists()
