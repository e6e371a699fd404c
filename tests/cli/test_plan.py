"""``recalkv plan``: capacity from configurations alone."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file

from recalkv_vllm.checkpoint import AttentionGeometry, kv_bytes_per_token
from recalkv_vllm.cli import main
from recalkv_vllm.cli.sizes import size
from recalkv_vllm.compression.ranks.targets import parse_target
from recalkv_vllm.serving.capacity import hypothetical_config, latent_bytes_per_token

FEW = ["--num-samples", "4", "--seq-len", "32"]


def plan(capsys, *args) -> dict:
    assert main(["plan", *map(str, args), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("80GiB", 80 << 30),
        ("1.5 G", 1_500_000_000),
        ("512MiB", 1 << 29),
        ("123", 123),
        ("2kb", 2000),
    ],
)
def test_sizes_with_units(text, nbytes):
    assert size(text) == nbytes


def test_tokens_are_vllms_own_count(tmp_path, capsys):
    """SmolLM2 in float32, 256 MiB, blocks of 128: what vLLM 0.32 logged for both."""
    config = {
        "model_type": "llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    arguments = [tmp_path, "--kv-cache-memory-bytes", "256MiB", "--max-model-len", 2048]
    arguments += ["--block-size", 128, "--dtype", "float32", "--compression", 0.5]
    result = plan(capsys, *arguments)
    assert result["kv_cache_tokens"] == {"dense": 5760, "compressed": 11648}
    assert result["bytes_per_token"] == {"dense": 46080, "compressed": 23040}
    assert result["max_concurrency"]["compressed"] == pytest.approx(11648 / 2048)
    assert result["supposed"]
    # 134.5 million parameters, known from the model's card.
    assert result["weight_bytes"]["dense"] == pytest.approx(134.5e6 * 4, rel=0.01)
    assert result["target"] == parse_target("auto").name
    assert result["relative_decode_time"] is None  # what compress would choose is not known
    if result["target"].startswith("cpu"):
        assert result["cpu"].keys() == {"flop_per_s", "bytes_per_s"}


@pytest.mark.parametrize(
    ("changes", "scales"),
    [
        ({"model_type": "qwen3"}, 2),
        ({"model_type": "olmo2"}, 1),
        ({"model_type": "glm4_moe", "use_qk_norm": True}, 2),
        ({"model_type": "glm4_moe", "use_qk_norm": False}, 0),
    ],
)
def test_key_scales_are_counted(changes, scales):
    """Four bytes per token, layer and norm, whatever the cache's elements."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    geometry = AttentionGeometry.from_hf_config({**sizes, "num_key_value_heads": 2, **changes})
    config = hypothetical_config(0.5, geometry, 1)
    for itemsize in (2, 4):
        expected = 3 * (32 * itemsize + 4 * scales)
        assert latent_bytes_per_token(config, geometry, itemsize, 1) == expected
        assert kv_bytes_per_token(config, geometry, itemsize)["compressed"] == expected


def test_checkpoint_weighs_what_a_server_loads(tiny, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["compress", tiny, "-o", out, "--compression", 0.5, "--method", "svd", *FEW]
    assert main([*map(str, arguments)]) == 0
    capsys.readouterr()
    size = ("--memory", "1GiB", "--overhead", "0", "--max-model-len", 64)
    times = [
        plan(capsys, out, *size, "--target", target)["relative_decode_time"]
        for target in ("cpu", "l40s", "none")
    ]
    assert times[0] > 0.5
    assert times[1] >= 0.5
    assert times[2] is None
    result = plan(capsys, out, *size)
    assert not result["supposed"]
    weights = load_file(out / "model.safetensors")
    kept = {k: v for k, v in weights.items() if "k_proj.w" not in k and "v_proj.w" not in k}
    factors = load_file(out / "recalkv.safetensors")
    loaded = sum(t.nbytes for t in (*kept.values(), *factors.values()))
    assert result["weight_bytes"]["compressed"] == pytest.approx(loaded, rel=0.05)
    assert result["kv_cache_bytes"]["compressed"] < 0.92 * 2**30
    half = result["bytes_per_token"]["dense"] / 2
    assert result["bytes_per_token"]["compressed"] == half


def test_ranks_share_heads(tiny, capsys):
    arguments = [tiny, "--kv-cache-memory-bytes", "1MiB", "--max-model-len", 16]
    one = plan(capsys, *arguments)
    four = plan(capsys, *arguments, "--tensor-parallel-size", 4)
    assert four["bytes_per_token"]["dense"] * 4 == one["bytes_per_token"]["dense"]
    assert "compressed" not in one["kv_cache_tokens"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--memory", "1KiB", "--overhead", "0"], "--memory 1024: expected more than"),
        (["--memory", "10 parsecs"], "expected bytes such as 80GiB or 512MiB, found '10 parsecs'"),
        (["--memory", "1GiB", "--compression", "1"], r"expected a fraction in \[0, 1\), found 1.0"),
        (["--memory", "1GiB", "--block-size", "0"], "--block-size 0: expected at least 1"),
        (["--memory", "1GiB", "--compression", "0.99"], "leaves 0 cached elements"),
    ],
)
def test_bad_input(tiny, fails, arguments, message):
    import re

    assert re.search(message, fails("plan", tiny, "--max-model-len", 64, *arguments))
