"""Language models within models of several modalities: text and images, equal to stock vLLM's."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file

from recalkv_vllm.architectures import SUPPORTED
from recalkv_vllm.cli.main import main
from tests.e2e.conftest import run_engines
from tests.e2e.multimodal import CONFIGS, END_OF_VOCABULARY, TEXT_ALONE, save_multimodal_model

ATTENTION = re.compile(r"language_model\.model\.layers\.\d+\.self_attn\.[qkvo]_proj\.weight")


@pytest.fixture(scope="module")
def make_model(tmp_path_factory):
    root = tmp_path_factory.mktemp("multimodal")

    def make(name):
        path = root / name
        return path if path.is_dir() else save_multimodal_model(name, path)

    return make


def job(small_prompts, model, name, **engine):
    """Text as ever, and with it two prompts of an image each, and one of two."""
    greedy = {"sampling": {"max_tokens": 16, "ignore_eos": True}}
    text = {**greedy, "prompts": small_prompts.ids}
    if name in TEXT_ALONE:
        limits = {"image": 0, "video": 0} if name.startswith("qwen") else {"image": 0}
        if name.startswith("qwen3.5"):
            # vLLM takes it for a hybrid, and looks for states to cache.
            engine["enable_prefix_caching"] = False
        return small_prompts.job(model, text, limit_mm_per_prompt=limits, **engine)
    image, short = END_OF_VOCABULARY, small_prompts.ids[1]
    prompts = [[*short, image, *short], [image, *short], [*short, image, *short, image]]
    seen = {**greedy, "prompts": prompts, "images": [[0], [1], [1, 2]]}
    limits = {"limit_mm_per_prompt": {"image": 2}, "max_num_batched_tokens": 256}
    return small_prompts.job(model, text, seen, **limits, **engine)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name == "llava" else pytest.mark.slow) for name in CONFIGS],
)
def test_full_rank_equals_stock(make_model, compressed, small_prompts, name):
    base = make_model(name)
    ours, factors = compressed(base), compressed(base, factors_only=True)
    served = json.loads((factors / "config.json").read_text())["architectures"]
    overrides = {"architectures": served, "recalkv": {"factors": str(factors)}}
    jobs = [
        job(small_prompts, base, name),
        job(small_prompts, ours, name, attention_backend="recalkv"),
        job(small_prompts, base, name, hf_overrides=overrides),
    ]
    stock, found, on_base = (result["tokens"] for result in run_engines(*jobs))
    assert found == stock
    assert on_base == stock
    for batch in stock:
        assert len({tuple(tokens) for tokens in batch}) == len(batch)


def test_all_but_attention_of_the_language_model_stays_as_it_is(make_model, compressed):
    base = make_model("llava")
    out = compressed(base, compression=0.5, rank_allocation="fisher")
    before, after = (load_file(path / "model.safetensors") for path in (base, out))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert len(changed) >= 6
    assert all(map(ATTENTION.fullmatch, changed))
    written = json.loads((out / "config.json").read_text())
    assert written["architectures"] == ["RecalkvLlavaForConditionalGeneration"]
    names = {path.name for path in base.glob("*processor_config.json")}
    assert names
    assert all((out / name).read_bytes() == (base / name).read_bytes() for name in names)


def test_commands_look_into_the_language_model(make_model, compressed, capsys):
    out = compressed(make_model("llava"), compression=0.5, rank_allocation="fisher")
    main(["inspect", str(out), "--json"])
    told = json.loads(capsys.readouterr().out)
    assert told["compression"] == pytest.approx(0.5, abs=0.05)


def test_every_model_of_several_modalities_is_here():
    multimodal = {name for name, entry in SUPPORTED.items() if entry.multimodal}
    assert {config.model_type for config in CONFIGS.values()} == multimodal
