"""Models some of whose layers have no attention: those stay, and share pages with latents."""

import json
import re
import shutil
from itertools import chain

import pytest
import torch
from safetensors.torch import load_file

from recalkv_vllm.architectures import SUPPORTED
from recalkv_vllm.band_format import token_bytes
from recalkv_vllm.checkpoint import AttentionGeometry, RecalkvConfig, read_hf_config
from recalkv_vllm.cli.main import main
from recalkv_vllm.compression.base_model.model import BaseModel
from recalkv_vllm.compression.calibration.samples import draw_samples
from recalkv_vllm.compression.calibration.text import documents
from recalkv_vllm.evaluation.transformers_engine import score_windows
from tests.e2e.architectures import CONFIGS, save_random_model
from tests.e2e.conftest import run_engines
from tests.e2e.more_architectures import MORE_CONFIGS
from tests.tiny_models import train_tokenizer

NAME = "granitemoehybrid"
STOCK = {"hf_overrides": {"architectures": ["GraniteMoeHybridForCausalLM"]}}
#: See ``more_architectures.WITHOUT_PREFIX_CACHING``.
ENGINE = {"enable_prefix_caching": False}
CACHE_BYTES = 64 << 20


@pytest.fixture
def base(make_small):
    return make_small(NAME)


@pytest.fixture
def half(base, compressed):
    """Half the cache, every layer's latents of one size, and outputs that are refitted."""
    settings = {"method": "kfac", "latent_dtype": "bf16", "target": "none", "num_samples": 16}
    return compressed(base, compression=0.5, k_group_size=None, output_refit=True, **settings)


def test_all_but_attention_stays_as_it_is(base, half):
    before, after = (load_file(path / "model.safetensors") for path in (base, half))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    projections = [f"model.layers.{i}.self_attn.{x}_proj.weight" for i in (1, 3) for x in "kov"]
    assert {re.sub(r"\bq_proj", "o_proj", name) for name in changed} == {*projections}


def test_refit_brings_the_whole_model_closer(base, half, compressed):
    """Layers without attention lie between those that are refitted."""
    settings = {"method": "kfac", "latent_dtype": "bf16", "target": "none", "num_samples": 16}
    plain = compressed(base, compression=0.5, k_group_size=None, output_refit=False, **settings)
    samples = draw_samples(documents("builtin"), BaseModel(base).tokenizer(), 16, 64, 42)

    def outputs(directory):
        with torch.no_grad():
            return BaseModel(directory).load(torch.float32, "cpu")(samples).logits

    dense = outputs(base)
    errors = [float((outputs(directory) - dense).norm()) for directory in (plain, half)]
    assert errors[1] < errors[0]


@pytest.mark.parametrize("kinds", [["mamba", "attention"] * 2, None])
def test_kinds_of_layers_as_files_spell_them(base, tmp_path, kinds):
    """By older names, or not at all where the model's class knows a rule."""
    path = tmp_path / "model"
    if kinds is None:
        save_random_model(CONFIGS["qwen3-next-attention"], path)
    else:
        shutil.copytree(base, path)
    config = read_hf_config(path)
    del config["layer_types"]
    if kinds is None:
        config["num_hidden_layers"] = 4  # every fourth has attention
    (path / "config.json").write_text(
        json.dumps({**config, **({"layer_types": kinds} if kinds else {})})
    )
    found = AttentionGeometry.from_hf_config(BaseModel(path).config)
    assert found.layer_indices == ((1, 3) if kinds else (3,))
    assert found.num_layers == len(found.layer_indices)


def test_sizes_are_of_the_layers_with_attention(base, half, capsys):
    geometry = AttentionGeometry.from_hf_config(read_hf_config(half))
    assert (geometry.num_layers, geometry.layer_indices) == (2, (1, 3))
    assert [geometry.position(i) for i in range(5)] == [None, 0, None, 1, None]
    main(["inspect", str(half), "--json"])
    assert json.loads(capsys.readouterr().out)["compression"] == pytest.approx(0.5, abs=0.05)


@pytest.mark.slow
def test_pages_are_those_of_latents(base, half, bands, small_prompts):
    """vLLM makes blocks as long as a state needs, and states' pages no longer than that."""
    narrow = bands(base)
    dense, ours, banded = run_engines(
        small_prompts.job(half, **STOCK, **ENGINE),
        small_prompts.job(half, attention_backend="recalkv", **ENGINE),
        small_prompts.job(narrow, attention_backend="recalkv", **ENGINE),
    )
    assert ours["tokens"] == dense["tokens"]
    state = min(page for _, page in dense["metrics"]["kv_cache_pages"])
    for checkpoint, result in ((half, ours), (narrow, banded)):
        config = read_hf_config(checkpoint)
        served = RecalkvConfig.from_hf_config(config)
        widest = max(
            token_bytes(served.latent_format(i), layer.rank, 4, 0)
            for i, layer in enumerate(served.layers)
        )
        pages = result["metrics"]["kv_cache_pages"]
        assert len(pages) == 2  # a group of layers with attention, and one of those without
        assert len({page for _, page in pages}) == 1
        block, page = next(pair for pair in pages if pair[0] != 512)
        assert page == block * widest
        assert page <= state
        assert block % 16 == 0
        blocks = result["metrics"]["kv_cache_tokens"] // min(size for size, _ in pages)
        assert blocks == CACHE_BYTES // (2 * page)  # each block of two layers
    # The same memory holds more tokens; states take what they take.
    assert ours["metrics"]["kv_cache_tokens"] > dense["metrics"]["kv_cache_tokens"]


@pytest.mark.slow
def test_factors_on_the_untouched_base(base, compressed, small_prompts):
    factors = compressed(base, factors_only=True)
    served = read_hf_config(factors)["architectures"]
    overrides = {"architectures": served, "recalkv": {"factors": str(factors)}}
    stock, ours = run_engines(
        small_prompts.job(base, **STOCK, **ENGINE),
        small_prompts.job(base, hf_overrides=overrides, **ENGINE),
    )
    assert ours["tokens"] == stock["tokens"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3-next-attention", "qwen3.5-attention"])
def test_gated_delta_net_beside_gated_attention(name, tmp_path, compressed, small_prompts):
    """In bfloat16, the only dtype of vLLM's kernels for CPUs: as near to float32 as stock is."""
    attention = {**CONFIGS, **MORE_CONFIGS}[name]
    config = attention.to_dict()
    config |= {
        "num_hidden_layers": 4,
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "num_experts_per_tok": 4,  # all of them: rounding would choose others
    }
    base = save_random_model(type(attention)(**config), tmp_path / "model")
    train_tokenizer().save_pretrained(base)
    ours = compressed(base)
    served = SUPPORTED[attention.model_type].served_name.removeprefix("Recalkv")
    stock = {"hf_overrides": {"architectures": [served]}}
    engine = {"dtype": "bfloat16", **ENGINE}
    scored = {"prompts": small_prompts.ids, "sampling": {"max_tokens": 1, "prompt_logprobs": 0}}
    results = run_engines(
        small_prompts.job(base, scored, **engine, **stock),
        small_prompts.job(ours, scored, attention_backend="recalkv", **engine),
    )
    exact = torch.tensor([*chain(*score_windows(base, small_prompts.ids))])
    errors = []
    for result in results:
        found = [
            -likelihood
            for output in result["outputs"][0]
            for at in output["prompt_logprobs"][1:]
            for likelihood in at.values()
        ]
        errors.append(float((torch.tensor(found) - exact).abs().mean()))
    assert errors[1] < 1.5 * errors[0]


def test_capacity_is_left_to_vllm(half, capsys):
    assert main(["plan", str(half), "--memory", "8GiB", "--max-model-len", "512"])
    assert "all of whose layers have attention" in capsys.readouterr().err
