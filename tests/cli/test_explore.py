"""``recalkv explore``: the table, its JSON, the plot, and what is refused."""

import json
import shlex
import shutil

import pytest
from safetensors.torch import load_file, save_file

from recalkv_vllm.checkpoint import read_hf_config
from recalkv_vllm.cli import main

FEW = ["--num-samples", "4", "--seq-len", "32"]
ROW = {
    "removed": float,
    "compression": float,
    "latent_dtype": str,
    "bits": float,
    "bands": dict,
    "group_size": int,
    "expected_loss": float,
    "relative_decode_time": float,
    "bytes_per_token": int,
    "tokens": int,
    "front": bool,
    "command": str,
}


def explore(capsys, *args) -> dict:
    assert main(["explore", *map(str, args), *FEW, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_schema_and_meaning(tiny, capsys):
    size = ("--kv-cache-memory-bytes", "1MiB")
    result = explore(capsys, tiny, "--target", "cpu", "--compression", 0.5, 0.8, *size)
    assert set(result) == {
        "model", "target", "dense", "rows", "command", "seconds"
    }  # fmt: skip
    assert (result["model"], result["target"]) == (str(tiny), "cpu")
    assert result["dense"] == {"bytes_per_token": 512, "tokens": 2048}
    rows = result["rows"]
    # 0.8 is too much for 16 bits and one head or two per group.
    assert [(row["compression"], row["latent_dtype"], row["group_size"]) for row in rows] == [
        *((0.5, name, size) for name in ("bands", "bf16") for size in (1, 2, 4)),
        *((0.8, "bands", size) for size in (1, 2, 4)),
        (0.8, "bf16", 4),
    ]
    for row in rows:
        bands = {"bands": type(None)} if row["latent_dtype"] == "bf16" else {}
        assert {name: type(value) for name, value in row.items()} == ROW | bands
        assert row["compression"] <= row["removed"] < 1
        assert row["bytes_per_token"] == pytest.approx(512 * (1 - row["removed"]))
        assert row["tokens"] == 2**20 // (16 * row["bytes_per_token"]) * 16
        rank = 8 * row["bytes_per_token"] / row["bits"]
        assert row["bits"] == 16 if row["bands"] is None else rank == sum(row["bands"].values())
    assert any(row["front"] for row in rows)


def test_commands_make_what_was_promised(tiny, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = [tiny, "--compression", 0.8, "--latent-dtype", "bands", "int8", "--seed", 7]
    rows = explore(capsys, *arguments)["rows"]
    outs = []
    for row in rows:
        program, *command = shlex.split(row["command"])
        assert program == "recalkv"
        assert main([*command, "--no-output-refit", "--json"]) == 0
        made = json.loads(capsys.readouterr().out)
        assert made["compression"] == pytest.approx(row["removed"])
        settings = read_hf_config(tmp_path / made["out"])["recalkv"]["settings"]
        assert settings["expected_loss"] == row["expected_loss"]
        assert settings["k_group_size"] == row["group_size"]
        outs.append(made["out"])
    assert len(set(outs)) == len(rows) > 3
    assert outs[0] == "model-0.8-bands-1"


def test_without_a_memory_or_a_device(tiny, capsys):
    result = explore(capsys, tiny, "--target", "none", "--compression", 0.5)
    assert {row["tokens"] for row in result["rows"]} == {None}
    assert {row["relative_decode_time"] for row in result["rows"]} == {None}


def test_table_and_plot(tiny, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    plot = tmp_path / "front.png"
    arguments = [tiny, "--compression", 0.5, *FEW, "--plot", plot]
    for target, memory in (("cpu", ["--memory", "8GiB"]), ("none", [])):
        assert main([*map(str, ["explore", *arguments, "--target", target, *memory])]) == 0
        table = capsys.readouterr().out
        assert ("tokens" in table.splitlines()[2]) == bool(memory)
        assert plot.read_bytes().startswith(b"\x89PNG")
        assert [path.name for path in tmp_path.glob("front*")] == ["front.png"]
        assert table.count("bands") == 3
        assert "●" in table
        assert (
            f"recalkv compress {tiny} -o OUT --compression REMOVED --k-group-size GROUP "
            f"--latent-dtype FORMAT --target {target} --num-samples 4 --seq-len 32\n"
        ) in table


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--compression", 1], "--compression 1: expected fractions above 0 and below 1"),
        (["--compression", "half"], "--compression"),
        (["--compression", 0.99], "the largest possible compression with these groups is"),
        (["--latent-dtype", "auto"], "--latent-dtype"),
        (["--target", "tpu"], "target 'tpu': expected auto"),
        (["--num-samples", 0], "--num-samples 0: expected at least 1"),
        (["--block-size", 0], "--block-size 0: expected at least 1"),
        (["--memory", "1KiB", "--overhead", 0], "--memory 1024: expected more than"),
        (["--memory", "1GiB", "--kv-cache-memory-bytes", "1GiB"], "not allowed with argument"),
        (["--plot", "/nowhere/front.png"], "--plot /nowhere/front.png: cannot be written"),
        (["--plot", "front.txt"], "--plot front.txt: cannot be written"),
        (["--method", "svd"], "--method"),
    ],
)
def test_refused_before_any_work(tiny, fails, arguments, message):
    if "--plot" in arguments:
        pytest.importorskip("matplotlib")
    assert message in fails("explore", tiny, *arguments, "--dataset", "/nowhere/text.txt")


def test_bad_input_of_calibration(tiny, fails, tmp_path):
    pytest.importorskip("matplotlib")
    plot = tmp_path / "front.png"
    error = fails("explore", tiny, "--dataset", "/nowhere/text.txt", "--plot", plot)
    assert "/nowhere/text.txt: no such file" in error
    assert not plot.exists()
    assert "no config.json" in fails("explore", tmp_path)


def test_model_that_overflows(tiny, fails, tmp_path):
    directory = tmp_path / "copy"
    shutil.copytree(tiny, directory)
    path = directory / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.input_layernorm.weight"].fill_(float("nan"))
    save_file(tensors, path, metadata={"format": "pt"})
    assert "of layer 0 are not finite" in fails("explore", directory, *FEW)
