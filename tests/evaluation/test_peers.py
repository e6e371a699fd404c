"""The comparison of peers at equal bytes: its command, its table, and how it goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from recalkv_vllm.benchmarks.peers import __main__ as command
from recalkv_vllm.benchmarks.peers import measure
from recalkv_vllm.benchmarks.peers.catalog import PEERS
from recalkv_vllm.benchmarks.peers.equal_bytes import best_peer, front, loss_at
from recalkv_vllm.benchmarks.peers.measure import Bench
from recalkv_vllm.benchmarks.peers.report import plot, table

LENGTHS = ["--num-samples", "2", "--calibrate-len", "48", "--evaluate-len", "160"]


@pytest.fixture
def peers(tiny, tmp_path):
    """``peers(*options)``: run the command on a tiny model; the parsed result."""
    out = tmp_path / "out"

    def run(*options: object, model: Path = tiny) -> dict:
        texts = ["--calibrate", "builtin", "--evaluate", "builtin", "-o", out]
        lengths = [*LENGTHS, "--max-tokens", "320"]
        command.main([*map(str, [model, *texts, *lengths, *options])])
        return json.loads((out / "result.json").read_text())

    run.out = out
    return run


@pytest.fixture
def fails(peers, capsys):
    """``fails(*options)``: the line that the command ends with."""

    def run(*options: object, **model: Path) -> str:
        with pytest.raises(SystemExit) as ended:
            peers(*options, **model)
        assert ended.value.code == 2
        return capsys.readouterr().err.splitlines()[-1]

    return run


def test_every_peer_runs(peers, capsys) -> None:
    names = [row.name for row in PEERS if row.make is not None]
    result = peers("--rows", *names)
    assert [row["name"] for row in result["rows"]] == names
    dense = 2 * 2 * 4 * 16 * 2  # bytes, keys and values, heads, elements, layers
    assert result["dense_bytes"] == dense
    for row in result["rows"]:
        assert row["loss"] == row["nll"] - result["dense"]["nll"]
        assert abs(row["loss"]) < 3
        assert row["tokens"] == result["dense"]["tokens"] == 318
        # Two layers are too few for vLLM's TurboQuant: both are dense, and the codebook is extra.
        assert 0 < row["long_context_bytes_per_token"] <= row["bytes_per_token"] < dense + 1
    assert {row["name"]: row["loss"] for row in result["rows"]}["int8_per_token_head"] < 0.01
    shown = capsys.readouterr().out
    assert (peers.out / "table.md").read_text().strip() in shown
    assert (peers.out / "pareto.png").read_bytes()[:4] == b"\x89PNG"


def test_rows_are_measured_once(peers, monkeypatch) -> None:
    first = peers("--rows", "fp8")
    measured = []
    row = Bench.row
    monkeypatch.setattr(Bench, "row", lambda self, r: measured.append(r.name) or row(self, r))
    monkeypatch.setattr(Bench, "dense", None)  # neither is the dense model's score
    second = peers("--rows", "fp8", "quarot-4")
    assert measured == ["quarot-4"]
    assert second["rows"][0] == first["rows"][0]
    peers("--rows", "quarot-4")
    assert measured == ["quarot-4"]


def test_an_interrupted_run_goes_on(peers, monkeypatch) -> None:
    row = Bench.row

    def interrupt(self, r):
        if r.name == "quarot-4":
            raise KeyboardInterrupt
        return row(self, r)

    monkeypatch.setattr(Bench, "row", interrupt)
    with pytest.raises(KeyboardInterrupt):
        peers("--rows", "kivi-2", "quarot-4")
    monkeypatch.setattr(Bench, "row", row)
    result = peers("--rows", "kivi-2", "quarot-4")
    assert [row["name"] for row in result["rows"]] == ["kivi-2", "quarot-4"]


def test_rows_of_checkpoints(peers, monkeypatch) -> None:
    asked = []

    def measure_checkpoint(row, options):
        asked.append(row.arguments())
        found = {"nll": 7.0, "perplexity": 1096.6, "tokens": 318, "windows": 2}
        return {**found, "kv_bytes_per_token": {"dense": 512, "compressed": 70}}

    monkeypatch.setattr(measure, "measure_checkpoint", measure_checkpoint)
    result = peers("--rows", "palu-bf16-0.5", "kfac-bands-0.86", "kfac-bands-0.86-healed")
    assert [row["family"] for row in result["rows"]] == ["Palu", "ours", "ours, healed"]
    assert {row["bytes_per_token"] for row in result["rows"]} == {70}
    assert asked[0] == ["--method", "palu", "--compression", "0.5", "--latent-dtype", "bf16",
                        "--target", "none"]  # fmt: skip
    assert [arguments[-1] for arguments in asked[1:]] == ["none", "--heal"]


@pytest.mark.slow
def test_a_checkpoint_is_made_for_its_row(peers) -> None:
    result = peers("--rows", "palu-bf16-0.5", "palu-0.5-int4")
    plain, codes = result["rows"]
    assert plain["bytes_per_token"] <= result["dense_bytes"] / 2
    assert plain["bytes_per_token"] / 4 < codes["bytes_per_token"] < plain["bytes_per_token"] / 2
    assert (peers.out / "palu-bf16-0.5" / "recalkv.safetensors").is_file()


@pytest.mark.slow
def test_checkpoints_are_scored_as_they_are_served(peers, make_model) -> None:
    model = make_model("llama", num_attention_heads=4, num_key_value_heads=2, head_dim=32)

    def run(*options: str) -> dict:
        # Samples enough for the metric of a layer.
        return peers("--num-samples", "4", *options, model=model)

    plain = run("--rows", "kfac-bands-0.75")
    assert "served" not in (peers.out / "table.md").read_text()
    result = run("--rows", "fp8", "kfac-bands-0.75", "--served")
    fp8, ours = result["rows"]
    assert "served_loss" not in fp8
    assert ours["nll"] == plain["rows"][0]["nll"]
    assert result["dense"]["served_nll"] == pytest.approx(result["dense"]["nll"], abs=1e-4)
    assert ours["served_loss"] == pytest.approx(ours["loss"], abs=2e-3)
    head, _, fp8_line, line, *_ = (peers.out / "table.md").read_text().splitlines()
    assert head.split(" | ")[6] == "served by vLLM"
    assert fp8_line.split(" | ")[6] == ""
    assert line.split(" | ")[6] == f"{ours['served_loss']:+.4f}"
    assert result == run("--rows", "kfac-bands-0.75", "--served")  # once


def test_bad_input(fails, tmp_path) -> None:
    assert "--rows kivi-5: unknown; expected one of fp8, " in fails("--rows", "kivi-5")
    line = fails("--rows", "fp8", "--evaluate-len", "257")
    assert line.endswith("--evaluate-len 257: the model's context is 256 tokens")
    line = fails("--rows", "fp8", "--calibrate-len", "1024")
    assert line.endswith("--calibrate-len 1024: the model's context is 256 tokens")
    assert "--num-samples 0: expected at least 1" in fails("--num-samples", "0")
    assert "are less than one window" in fails("--rows", "fp8", "--max-tokens", "100")
    assert "config.json" in fails("--rows", "fp8", model=tmp_path / "none")


def test_rows_of_other_settings_are_refused(peers, fails) -> None:
    peers("--rows", "fp8")
    line = fails("--rows", "fp8", "--max-tokens", "160")
    assert line.endswith("its rows have max_tokens 320, not 160; choose another -o")


def test_a_dense_score_that_is_not_finite(fails, tiny, tmp_path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in tiny.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"] = torch.full_like(weights["model.norm.weight"], torch.nan)
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    line = fails("--rows", "fp8", model=broken)
    assert line.endswith("gives log-likelihoods that are not finite")


def test_losses_between_points() -> None:
    points = [(100, 0.4), (400, 0.1), (200, 0.5), (800, -0.1)]
    assert front(points) == [(100, 0.4), (400, 0.1), (800, -0.1)]  # 200 bytes are beaten
    assert loss_at(points, 200) == pytest.approx(0.2)  # halfway in both logarithms
    assert loss_at(points, 400 * 2**0.5) == pytest.approx(0)  # where a loss is not positive
    assert loss_at(points, 5000) == -0.1
    assert loss_at(points, 99) is None
    assert loss_at([], 99) is None


def result_of(*rows: tuple[str, str, float, float, bool]) -> dict:
    names = ("name", "family", "bytes_per_token", "loss", "storage_only")
    full = [dict(zip(names, row, strict=True)) for row in rows]
    for row in full:
        row["long_context_bytes_per_token"] = row["bytes_per_token"]
    return {"dense_bytes": 1000, "settings": {"evaluate_len": 64}, "rows": full}


def test_the_table_names_the_winner(tmp_path) -> None:
    result = result_of(
        ("a-4", "A", 400, 0.1, False),
        ("a-1", "A", 100, 0.4, False),
        ("b-1", "B", 150, 0.9, False),
        ("c-1", "C", 50, 0.0, True),  # storage only: no best peer
        ("ours-1", "ours", 100, 0.5, False),
        ("ours-2", "ours", 200, 0.05, False),
        ("ours-3", "ours", 60, 0.9, False),
    )
    assert best_peer([row for row in result["rows"] if row["family"] == "A"], 200) == (
        "A",
        pytest.approx(0.2),
    )
    lines = table(result).splitlines()
    assert "| a-4 | A | 60.0% | 400 | 400 | +0.1000 | +0.0500 | 0.500 | +0.0500 |" in lines
    assert "| c-1 | C (storage only) | 95.0% | 50 | 50 | +0.0000 |  |  |  |" in lines
    assert "| 80.0% | 200 | ours-2 | +0.0500 | A | +0.2000 | 0.250 |" in lines
    assert "| 90.0% | 100 | ours-1 | +0.5000 | A | +0.4000 | 1.250 (the peer wins) |" in lines
    assert "| 94.0% | 60 | ours-3 | +0.9000 | none; A in 100 | +0.4000 | 2.250 |" in lines
    plot(result, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").is_file()
