"""``recalkv_vllm.compress``: what the command does, from Python."""

import inspect
import json
from dataclasses import replace

import pytest

import recalkv_vllm
from recalkv_vllm.cli import main
from recalkv_vllm.compression import pipeline
from recalkv_vllm.compression.errors import InputError
from recalkv_vllm.compression.options import CompressOptions


def test_checkpoint_is_the_one_that_the_command_writes(tiny, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("It was a bright cold day in April. " * 200)
    made = recalkv_vllm.compress(
        tiny, tmp_path / "python", compression=0.6, dataset=str(text), num_samples=4, seq_len=32
    )
    line = f"compress {tiny} -o {tmp_path / 'command'} --compression 0.6 --dataset {text} --json"
    assert main([*line.split(), "--num-samples", "4", "--seq-len", "32"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert made["out"] == str(tmp_path / "python")
    for out in (made, said):
        for name in ("out", "seconds", "serve"):
            out.pop(name, None)
    assert json.loads(json.dumps(made)) == said
    for name in ("config.json", "recalkv.safetensors", "model.safetensors"):
        one, other = ((tmp_path / run / name).read_bytes() for run in ("python", "command"))
        assert one == other


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"compression": 0.5}, {"compression": 0.5}),
        ({"max_loss": 0.1, "dataset": "self"}, {"max_loss": 0.1, "datasets": ("self",)}),
        ({"dataset": ["a", "b"]}, {"datasets": ("a", "b")}),
        ({"device": "spread"}, {"device": "spread", "num_samples": 256, "seq_len": 2048}),
        (
            {"device": "spread", "seq_len": 9},
            {"device": "spread", "num_samples": 256, "seq_len": 9},
        ),
        ({"method": "palu", "heal": 3}, {"method": "palu", "heal": 3}),
    ],
)
def test_options(given, expected, monkeypatch, tmp_path):
    monkeypatch.setattr(pipeline, "compress", lambda options: {"options": options})
    options = recalkv_vllm.compress("m", tmp_path, **{"device": "cpu", **given})["options"]
    assert options == replace(CompressOptions("m", tmp_path, device="cpu"), **expected)


def test_defaults_are_those_of_the_options():
    fields = CompressOptions.__dataclass_fields__
    for name, parameter in inspect.signature(recalkv_vllm.compress).parameters.items():
        if name not in ("model", "out", "dataset", "others"):
            assert parameter.default == fields[name].default


def test_bad_input(tiny, tmp_path):
    with pytest.raises(TypeError, match="unexpected keyword argument 'compresion'"):
        recalkv_vllm.compress(tiny, tmp_path / "out", compresion=0.5)
    with pytest.raises(InputError, match="expected it or --max-loss, found both") as caught:
        recalkv_vllm.compress(tiny, tmp_path / "out", compression=0.5, max_loss=0.1)
    assert isinstance(caught.value, ValueError)
    assert not (tmp_path / "out").exists()
