"""Bad input: one clear line on stderr, exit status 2, nothing on stdout, nothing written."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from recalkv_vllm.cli import main

FEW = ["--num-samples", "4", "--seq-len", "32"]


@pytest.fixture
def compress_fails(fails, tmp_path):
    """The same for ``compress MODEL -o OUT``, which must leave nothing at or beside OUT."""

    def run(model, *args) -> str:
        out = tmp_path / "results" / "out"
        error = fails("compress", model, "-o", out, *args)
        assert not out.parent.exists() or not any(out.parent.iterdir())
        return error

    return run


@pytest.fixture
def copy(tiny, tmp_path):
    """A copy of the tiny model to break, and a function that edits its ``config.json``."""
    directory = tmp_path / "copy"
    shutil.copytree(tiny, directory)

    def edit(**changes):
        path = directory / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
        return directory

    return edit


@pytest.mark.parametrize("value", ["1", "1.5", "-0.1", "nan", "inf"])
def test_compression_outside_its_range(tiny, compress_fails, value):
    assert "expected a fraction in [0, 1)" in compress_fails(tiny, f"--compression={value}")


def test_compression_is_required(tiny, compress_fails):
    assert "--compression" in compress_fails(tiny)


def test_two_budgets(tiny, compress_fails):
    error = compress_fails(tiny, "--compression", 0.5, "--max-loss", 0.1)
    assert "--max-loss: not allowed with argument --compression" in error


@pytest.mark.parametrize("value", ["0", "-0.1", "nan", "inf"])
def test_loss_budget_outside_its_range(tiny, compress_fails, value):
    error = compress_fails(tiny, f"--max-loss={value}")
    assert f"--max-loss {value}: expected a positive number of nats" in error


def test_loss_budget_that_nothing_stays_within(tiny, compress_fails, monkeypatch):
    monkeypatch.setattr("recalkv_vllm.compression.pipeline.LossMeter.loss", lambda *_: 0.5)
    error = compress_fails(tiny, "--max-loss", 0.25, "--method", "svd", *FEW)
    assert "--max-loss 0.25: expected a loss that some compression stays within" in error
    assert "found 0.5000 nats at 1%, the least that is tried" in error


def test_compression_not_a_number(tiny, compress_fails):
    assert "--compression" in compress_fails(tiny, "--compression", "half")


def test_ranks_that_round_to_nothing(tiny, compress_fails):
    """Refused before the calibration text is read, let alone run."""
    arguments = ["--compression", 0.9, "--k-group-size", 1, "--dataset", "/nowhere/text.txt"]
    arguments += ["--latent-dtype", "bf16"]
    for method, possible in (("recalkv", 0.375), ("kfac", 0.5)):
        error = compress_fails(tiny, *arguments, "--method", method)
        assert f"largest possible compression with these groups is {possible}" in error


@pytest.mark.parametrize("option", ["--k-group-size", "--v-groups"])
@pytest.mark.parametrize("value", ["3", "0", "-1", "8"])
def test_groups_that_do_not_divide(tiny, compress_fails, option, value):
    error = compress_fails(tiny, "--compression", 0.5, f"{option}={value}")
    assert f"{option} {value}: does not divide the model's 4 KV heads" in error
    assert "1, 2, 4" in error


def test_unknown_method(tiny, compress_fails):
    error = compress_fails(tiny, "--compression", 0.5, "--method", "magic")
    assert "'magic'" in error
    assert "kfac, palu, recalkv, svd" in error


def test_missing_model(compress_fails):
    assert "no such directory" in compress_fails("/nowhere/model", "--compression", 0.5)


def test_hub_model_out_of_reach(compress_fails, monkeypatch):
    import huggingface_hub

    def unreachable(*args, **kwargs):
        raise ConnectionError("no network\nat all")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    error = compress_fails("owner/name", "--compression", 0.5)
    assert (
        "no such directory, and the hub gave no such model (ConnectionError: no network)" in error
    )


def test_model_that_is_a_file(compress_fails, tmp_path):
    (tmp_path / "file").write_text("")
    assert "is a file" in compress_fails(tmp_path / "file", "--compression", 0.5)


def test_directory_without_a_model(compress_fails, tmp_path):
    assert "no config.json" in compress_fails(tmp_path, "--compression", 0.5)


def test_broken_configuration(compress_fails, copy):
    directory = copy()
    (directory / "config.json").write_text("{")
    assert "not valid JSON" in compress_fails(directory, "--compression", 0.5)


def test_model_without_weights(compress_fails, copy):
    directory = copy()
    (directory / "model.safetensors").unlink()
    error = compress_fails(directory, "--compression", 0.5, "--method", "svd")
    assert "cannot be loaded" in error


def test_truncated_weights(compress_fails, copy):
    path = copy() / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    error = compress_fails(path.parent, "--compression", 0.5, "--method", "svd")
    assert "cannot be loaded" in error


def test_unsupported_architecture(compress_fails, copy):
    error = compress_fails(copy(model_type="new"), "--compression", 0.5)
    assert "'new' is not supported; expected one of" in error
    error = compress_fails(copy(model_type="minimax_m2"), "--compression", 0.5)
    assert "'minimax_m2' is not supported: norms of queries and keys that vLLM" in error


CT = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {}}
AWQ, GPTQ = {"quant_method": "awq", "bits": 4}, {"quant_method": "gptq", "bits": 4}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quant_method": "bitsandbytes"}, "quant_method 'bitsandbytes': no dense form"),
        ({}, "expected one of awq, compressed-tensors, gptq, mxfp4, or the model before"),
        ({**CT, "kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme: latents take the place"),
        ({**CT, "transform_config": {"config_groups": {"u": {}}}}, "transform_config"),
        ({**CT, "sparsity_config": {"format": "sparse-24-bitmask"}}, "(sparse-24-bitmask)"),
        ({**AWQ, "bits": 8}, "4-bit"),
        ({**AWQ, "version": "gemv"}, "gemv"),
        ({**GPTQ, "bits": 3}, "bits: expected 2, 4 or 8, found 3"),
        ({**GPTQ, "checkpoint_format": "marlin"}, "expected gptq or gptq_v2, found 'marlin'"),
    ],
)
def test_quantized_weights_that_are_not_read(compress_fails, copy, settings, message):
    assert message in compress_fails(copy(quantization_config=settings), "--compression", 0.5)


def test_quantized_weights_that_are_fused(compress_fails, copy):
    directory = copy(model_type="phi3", architectures=["Phi3ForCausalLM"], quantization_config=GPTQ)
    assert "found quantized ones fused" in compress_fails(directory, "--compression", 0.5)


@pytest.mark.parametrize("option", [["--output-refit"], ["--dtype", "float32"], ["--heal"]])
def test_options_that_would_change_quantized_weights(compress_fails, copy, option):
    error = compress_fails(copy(quantization_config=AWQ), "--compression", 0.5, *option)
    assert " ".join(option) in error
    assert "the model's weights are quantized and stay as they are" in error


def test_quantized_weights_that_are_not_there(compress_fails, copy):
    """Plain weights under a configuration of quantized ones are taken as they are: no scales."""
    directory = copy(quantization_config=GPTQ)
    tensors = load_file(directory / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    error = compress_fails(directory, "--compression", 0.5, "--method", "svd")
    assert "cannot be loaded (model.layers.1.mlp.up_proj.weight is missing)" in error


def test_model_without_tokenizer(compress_fails, copy):
    directory = copy()
    for path in directory.glob("tokenizer*"):
        path.unlink()
    assert "tokenizer" in compress_fails(directory, "--compression", 0.5)


def test_compressed_twice(compress_fails, tiny, tmp_path, capsys):
    once = tmp_path / "once"
    assert main(["compress", str(tiny), "-o", str(once), "--compression", "0", "--json"]) == 0
    capsys.readouterr()
    assert "already compressed" in compress_fails(once, "--compression", 0.5)


def test_output_exists(fails, tiny, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("kept")
    assert "exists already" in fails("compress", tiny, "-o", out, "--compression", 0.5)
    assert [path.name for path in out.iterdir()] == ["precious"]


def test_output_cannot_be_made(fails, tiny, tmp_path):
    (tmp_path / "file").write_text("")
    error = fails("compress", tiny, "-o", tmp_path / "file" / "out", "--compression", 0.5)
    assert "cannot be created" in error


@pytest.mark.parametrize("command", ["compress", "eval"])
def test_text_shorter_than_one_sample(fails, tiny, tmp_path, command):
    path = tmp_path / "short.txt"
    path.write_text("short")
    extra = ["-o", tmp_path / "out", "--compression", 0.5] if command == "compress" else []
    error = fails(command, tiny, *extra, "--dataset", path, "--seq-len", 64)
    assert "tokens are less than one" in error
    assert "of 64" in error


def test_missing_dataset(fails, tiny, compress_fails):
    error = compress_fails(tiny, "--compression", 0.5, "--dataset", "/nowhere/text.txt")
    assert "/nowhere/text.txt: no such file" in error
    assert "no such file" in fails("eval", tiny, "--dataset", "/nowhere/text.txt")


def test_missing_column(fails, tiny, compress_fails, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"body": "text"}\n')
    arguments = ["--dataset", path, "--text-column", "text"]
    for error in (
        compress_fails(tiny, "--compression", 0.5, *arguments),
        fails("eval", tiny, *arguments),
    ):
        assert "no column 'text'; found body" in error


def test_dataset_given_twice(tiny, compress_fails):
    error = compress_fails(tiny, "--compression", 0.5, *["--dataset", "builtin"] * 2)
    assert "--dataset builtin: found twice; expected each dataset once" in error


@pytest.mark.parametrize("option", ["--num-samples", "--seq-len"])
def test_sizes_below_the_least(tiny, compress_fails, option):
    error = compress_fails(tiny, "--compression", 0.5, option, 0)
    assert f"{option} 0: expected at least" in error


def test_device_not_there(tiny, compress_fails):
    error = compress_fails(tiny, "--compression", 0.5, "--device", "cuda:99", *FEW)
    assert "cuda:99: not available" in error


def test_model_that_overflows(copy, compress_fails):
    path = copy() / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.input_layernorm.weight"].fill_(float("nan"))
    save_file(tensors, path, metadata={"format": "pt"})
    for method, message in (("recalkv", "is not finite"), ("kfac", "are not finite")):
        error = compress_fails(path.parent, "--compression", 0.5, "--method", method, *FEW)
        assert f"of layer 0 {message}" in error


def test_overflow_of_the_written_dtype(copy, compress_fails):
    path = copy() / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.self_attn.k_proj.weight"].mul_(1e6)
    save_file(tensors, path, metadata={"format": "pt"})
    error = compress_fails(path.parent, "--compression", 0, "--dtype", "float16")
    assert "layer 1: factors overflow torch.float16" in error


@pytest.fixture
def checkpoint(tiny, tmp_path):
    out = tmp_path / "checkpoint"
    assert main(["compress", str(tiny), "-o", str(out), "--compression", "0"]) == 0
    return out


def truncate(path):
    path.write_bytes(path.read_bytes()[:-50])


def rename(path):
    tensors = load_file(path)
    tensors["layers.0.up"] = tensors.pop("layers.0.k_up")
    save_file(tensors, path)


def poison(path):
    tensors = load_file(path)
    tensors["layers.1.down"][3, 3] = torch.nan
    save_file(tensors, path)


def mismatch(path):
    tensors = load_file(path)
    tensors["layers.1.down"] = tensors["layers.1.down"][:16].contiguous()
    save_file(tensors, path)


FAULTS = {
    truncate: "not a readable safetensors file",
    rename: "layers.0.k_up missing",
    poison: "layers.1.down: expected finite values, found 1 of",
    mismatch: "layers.1.down: expected shape [128, 96], found [16, 96]",
    lambda path: path.unlink(): "no such file; expected the factors",
}


@pytest.mark.parametrize("command", [["inspect"], ["eval", "--dataset", "builtin"]])
@pytest.mark.parametrize("fault", FAULTS)
def test_broken_factors(fails, checkpoint, capsys, command, fault):
    capsys.readouterr()
    fault(checkpoint / "recalkv.safetensors")
    error = fails(*command, checkpoint)
    assert "recalkv.safetensors" in error
    assert FAULTS[fault] in error


def test_broken_record_of_errors(fails, checkpoint, capsys):
    capsys.readouterr()
    config = json.loads((checkpoint / "config.json").read_text())
    config["recalkv"]["settings"]["relative_error"]["k"] = ["small"]
    (checkpoint / "config.json").write_text(json.dumps(config))
    assert "settings.relative_error" in fails("inspect", checkpoint)


def test_inspect_of_what_is_no_checkpoint(fails, tiny, tmp_path):
    assert "no recalkv object" in fails("inspect", tiny)
    assert "no such file" in fails("inspect", tmp_path / "nothing")


def test_eval_has_no_card_to_write_to(fails, tiny):
    """Said before anything is measured."""
    error = fails("eval", tiny, "--dataset", "/nowhere/text.txt", "--card")
    assert "expected the model card of a compressed checkpoint" in error


def test_eval_of_what_is_no_model(fails, tmp_path):
    assert "no config.json" in fails("eval", tmp_path, "--dataset", "builtin")


def test_eval_of_a_model_that_overflows(fails, copy):
    path = copy() / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"].fill_(float("nan"))
    save_file(tensors, path, metadata={"format": "pt"})
    error = fails("eval", path.parent, "--dataset", "builtin", "--max-tokens", 64, "--seq-len", 32)
    assert "not finite" in error


@pytest.mark.parametrize("option", ["--seq-len", "--max-tokens"])
def test_eval_sizes(fails, tiny, option):
    assert "expected at least 2" in fails("eval", tiny, "--dataset", "builtin", option, 1)


def test_unknown_command(fails):
    assert "frobnicate" in fails("frobnicate")


def test_plot_that_cannot_be_written(fails, checkpoint, capsys):
    pytest.importorskip("matplotlib")
    capsys.readouterr()
    for name in ("missing/plot.png", "plot.nothing"):
        assert "cannot be written" in fails("inspect", checkpoint, "--plot", checkpoint / name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--metric", "ppl"], "--dataset: expected a text for --metric ppl, found none"),
        (["--metric", "agreement", "--dataset", "builtin"], "--base: expected a model for"),
        (
            ["--metric", "agreement", "--dataset", "builtin", "--base", "x", "--engine", "vllm"],
            "--engine vllm: expected transformers for --metric agreement",
        ),
        (["--metric", "divergence"], "--base: expected a model for --metric divergence"),
        (
            ["--metric", "divergence", "--base", "x", "--plot", "x.png"],
            "--plot: expected --metric ppl, passkey, ruler",
        ),
        (["--dataset", "builtin"] * 2, "--dataset builtin: found twice"),
        (["--metric", "passkey", "--samples", "0"], "--samples 0: expected at least 1"),
        (["--metric", "passkey", "--lengths", "20"], "--lengths 20: expected at least"),
        (
            ["--metric", "passkey", "--lengths", "300"],
            "--lengths 300: expected at most 256 for this model",
        ),
        (
            ["--metric", "passkey", "--lengths", "99", "--depths", "1.5"],
            "--depths 1.5: expected a number from 0 to 1",
        ),
        (["--metric", "ruler", "--tasks", "qa"], "--tasks qa: unknown; expected one of passkey"),
        (
            ["--metric", "ruler", "--tasks", "vt", "--plot", "x.png", "--lengths", "200"],
            "--plot: expected a task with one needle, found vt",
        ),
    ],
)
def test_evaluations_that_cannot_be(fails, tiny, arguments, message):
    assert message in fails("eval", tiny, *arguments)


def test_heal_at_full_rank(tiny, compress_fails):
    error = compress_fails(tiny, "--compression", 0, "--heal")
    assert "--heal: full rank is exact; expected a --compression above 0" in error


@pytest.mark.parametrize("steps", ["-5", "many", "1.5"])
def test_heal_for_no_number_of_steps(tiny, compress_fails, steps):
    assert "--heal" in compress_fails(tiny, "--compression", 0.5, f"--heal={steps}")


@pytest.mark.parametrize("option", [["--compression", 0.5, "--heal"], ["--max-loss", 0.1]])
def test_no_text_to_hold_out(tiny, compress_fails, tmp_path, option):
    text = tmp_path / "short.txt"
    text.write_text("One two three. " * 8)
    arguments = ["--method", "svd", "--dataset", text, "--seq-len", 60]
    error = compress_fails(tiny, *arguments, *option)
    flag = next(part for part in option[::-1] if str(part).startswith("--"))
    assert f"{flag}: calibration text: expected 2 samples or more" in error
