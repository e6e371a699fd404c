"""The commands as a script uses them: one JSON object on stdout, everything else on stderr."""

import json
import logging
import math
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from recalkv_vllm.cli import main
from recalkv_vllm.evaluation.perplexity import cut_windows
from recalkv_vllm.version import __version__

FEW = ["--num-samples", "4", "--seq-len", "32"]


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("It was a bright cold day in April. " * 200)
    return path


@pytest.fixture
def run(capsys):
    """``run(*args)``: the JSON object that a command prints."""

    def run(*args):
        assert main([*map(str, args), "--json"]) == 0
        captured = capsys.readouterr()
        assert captured.out.count("\n") == 1
        return json.loads(captured.out)

    return run


def test_compress_inspect_eval(tiny, tmp_path, run, text):
    out = tmp_path / "out"
    plain = ("--latent-dtype", "bf16", "--target", "none", *FEW)
    made = run("compress", tiny, "-o", out, "--compression", 0.5, "--dataset", text, *plain)
    assert made["kv_bytes_per_token"] == {"dense": 512, "compressed": 256}
    assert made["compression"] == 0.5
    assert made["reconstruct_flop_per_token"] == sum(
        2 * layer["k_width"] * 64 for layer in made["layers"]
    )
    assert made["seconds"] > 0

    seen = run("inspect", out)
    for key in ("kv_bytes_per_token", "compression", "reconstruct_flop_per_token", "layers"):
        assert seen[key] == made[key]
    assert seen["calibration"]["dataset"] == "text.txt"
    assert seen["calibration"]["samples"] == 4
    assert seen["settings"]["k_group_size"] == 4

    base = run("eval", tiny, "--dataset", text, "--seq-len", 64, "--max-tokens", 500)
    few = ("--seq-len", 64, "--max-tokens", 500)
    compressed = run("eval", out, "--dataset", text, *few, "--card")
    assert base["tokens"] == compressed["tokens"] == 7 * 63
    assert base["perplexity"] == pytest.approx(math.exp(base["nll"]))
    assert base["nll"] != compressed["nll"]
    assert f"text.txt, windows of 64, transformers): {compressed['perplexity']:.4f}" in (
        (out / "README.md").read_text()
    )


def test_eval_is_the_mean_loss_of_consecutive_windows(tiny, run, text):
    found = run("eval", tiny, "--dataset", text, "--seq-len", 50, "--max-tokens", 220)
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    windows = cut_windows([text.read_text()], tokenizer, 50, 220)
    assert len(windows) == 4
    ids = tokenizer(text.read_text())["input_ids"]
    assert [token for window in windows for token in window] == ids[:200]
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    rows = torch.tensor(windows)
    with torch.no_grad():
        loss = model(rows, labels=rows).loss  # all windows are equally long
    assert found["nll"] == pytest.approx(float(loss), rel=1e-5)


def test_a_second_run_reuses_the_statistics(tiny, tmp_path, capsys):
    for name, method in (("a", "recalkv"), ("b", "palu")):
        args = ["compress", tiny, "-o", tmp_path / name, "--compression", 0.5, "--method", method]
        assert main([*map(str, args), *FEW]) == 0
    assert "reusing" in capsys.readouterr().err


def test_progress_is_on_stderr_unless_quiet(tiny, tmp_path, capsys, text):
    """Of every stage, also where a pipe reads it."""
    line = ["compress", tiny, "--compression", 0.6, "--heal", 2, "--dataset", text, *FEW, "-o"]
    assert main([*map(str, line), str(tmp_path / "loud")]) == 0
    told = capsys.readouterr().err
    for stage in ("calibrating on 4 samples of 32 tokens", "choosing bits", "factoring", "healing"):
        assert f"recalkv: {stage}: 0 of " in told
    assert main([*map(str, line), str(tmp_path / "quiet"), "--quiet"]) == 0
    assert capsys.readouterr().err == ""
    assert logging.getLogger("recalkv_vllm").level == logging.NOTSET


def test_text_output(tiny, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["compress", str(tiny), "-o", str(out), "--compression", "0"]) == 0
    assert f"vllm serve {out} --attention-backend recalkv" in capsys.readouterr().out
    assert "NaN" not in (out / "config.json").read_text()
    assert main(["inspect", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "512 bytes per token, 512 dense" in shown
    assert "calibration: none" in shown
    assert "bits" not in shown


def test_text_output_of_bands(tiny, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["compress", str(tiny), "-o", str(out), "--compression", "0.6", *FEW]) == 0
    bands = json.loads((out / "config.json").read_text())["recalkv"]["layers"][0]["bands"]
    capsys.readouterr()
    assert main(["inspect", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "latents: dtype bands" in shown
    bits = max(bits for _, bits in bands)
    assert f"{sum(width for width, each in bands if each == bits)}×{bits}" in shown


@pytest.mark.parametrize(("target", "costs"), [("cpu:0.5", True), ("none", False)])
def test_a_costly_limit_of_decode_time_is_told(tiny, tmp_path, capsys, target, costs):
    out = tmp_path / "out"
    line = ["compress", tiny, "-o", out, "--compression", 0.7, "--target", target, *FEW]
    assert main([*map(str, line)]) == 0
    settings = json.loads((out / "config.json").read_text())["recalkv"]["settings"]
    shown = capsys.readouterr().out
    assert f"made for serving on: {target} (--target)" in shown
    assert ("without a limit" in shown) == costs
    if costs:
        assert f"takes {settings['relative_decode_time']:.2f} of the dense cache's" in shown
        assert f" {settings['expected_loss_anywhere']:.4f} instead of " in shown


def test_plot(tiny, tmp_path, run):
    pytest.importorskip("matplotlib")
    out, picture = tmp_path / "out", tmp_path / "plot.png"
    run("compress", tiny, "-o", out, "--compression", 0)
    run("inspect", out, "--plot", picture)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_plot_without_matplotlib(tiny, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    assert main(["compress", str(tiny), "-o", str(out), "--compression", "0"]) == 0
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["inspect", str(out), "--plot", str(tmp_path / "plot.png")]) == 2
    assert "matplotlib is not installed" in capsys.readouterr().err


def test_help_needs_no_torch():
    """It would take seconds; and the offline tool never loads vLLM."""
    code = (
        "import sys; from recalkv_vllm.cli.main import build_parser; build_parser().format_help();"
        "import recalkv_vllm.cli.compress;"
        "print([m for m in ('torch', 'transformers', 'vllm') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_offline_tool_never_loads_vllm():
    code = (
        "import sys; import recalkv_vllm.compression.pipeline, recalkv_vllm.evaluation.perplexity;"
        "import recalkv_vllm.evaluation.transformers_engine; print('vllm' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_version(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert __version__ in capsys.readouterr().out


@pytest.mark.parametrize(
    ("device", "options", "expected"),
    [
        ("cpu", [], (("self", "builtin", "recall"), 64, 512)),
        ("spread", [], (("self", "builtin", "recall"), 256, 2048)),
        ("spread", ["--seq-len", 9], (("self", "builtin", "recall"), 256, 9)),
        ("cpu", ["--dataset", "a", "--dataset", "b", *FEW], (("a", "b"), 4, 32)),
    ],
)
def test_calibration_of_compress(monkeypatch, run, tiny, tmp_path, device, options, expected):
    given = []

    def compress(options):
        given.append((options.datasets, options.num_samples, options.seq_len))
        return {}

    monkeypatch.setattr("recalkv_vllm.compression.pipeline.compress", compress)
    base = ("compress", tiny, "-o", tmp_path / "out", "--compression", 0.5, "--device", device)
    run(*base, *options)
    assert given == [expected]
