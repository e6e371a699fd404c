"""Models whose weights are quantized, compressed and served, beside stock vLLM."""

import json
from functools import cache, partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from tests.e2e.conftest import run_engines, run_recalkv
from tests.e2e.equality import assert_equal_up_to_rounding
from tests.e2e.prompts import LONG_TEXT
from tests.quantized_models import edit_config, quantize_model, write_dense

#: Weights alone are quantized: what is multiplied with them is the same here and there. vLLM's
#: kernels for these know no float32.
WEIGHT_ONLY = ("int4", "awq", "gptq")
#: Activations are quantized too, for stock vLLM's keys and values as well.
ACTIVATIONS = ("int8", "fp8")
RECALKV = {"attention_backend": "recalkv"}

needs_avx512 = pytest.mark.skipif(
    not torch.cpu._is_avx512_supported(), reason="vLLM's kernels for weights in 4 bits need AVX-512"
)


def slow(*names):
    """The first of the formats in every run, the others where slow tests are asked for."""
    return [names[0], *(pytest.param(name, marks=pytest.mark.slow) for name in names[1:])]


@pytest.fixture(scope="module")
def make_base(make_small, tmp_path_factory):
    """``make_base(format)``: one small model, quantized and dense."""
    root = tmp_path_factory.mktemp("quantized-base")

    @cache
    def make(name):
        source = make_small("llama3-rope")
        if name in WEIGHT_ONLY:
            source = in_float16(source, root / f"{name}-source")
        dense = quantize_model(source, root / name, name)
        return root / name, write_dense(source, root / f"{name}-dense", dense)

    return make


def in_float16(source, directory):
    """A copy whose scales are such that no engine rounds them."""
    write_dense(source, directory, {})
    tensors = load_file(directory / "model.safetensors")
    tensors = {name: tensor.half() for name, tensor in tensors.items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    edit_config(directory, dtype="float16")
    return directory


def overrides(factors):
    return {
        "architectures": json.loads((factors / "config.json").read_text())["architectures"],
        "recalkv": {"factors": str(factors)},
    }


@needs_avx512
@pytest.mark.parametrize("name", slow(*WEIGHT_ONLY))
def test_tokens_equal_stock(make_base, compressed, small_prompts, name):
    base, _ = make_base(name)
    alone = overrides(compressed(base, factors_only=True))
    engine = partial(small_prompts.job, dtype="float16")
    results = assert_equal_up_to_rounding(
        {
            "stock": partial(engine, base),
            "ours": partial(engine, compressed(base), **RECALKV),
            "alone": partial(engine, base, hf_overrides=alone, **RECALKV),
        },
        small_prompts.ids,
        torch.float16,
    )
    stock = results["stock"]["tokens"][0]
    assert len({tuple(tokens) for tokens in stock}) == len(stock)


def prompt_likelihoods(result):
    return torch.tensor(
        [
            likelihood
            for output in result["outputs"][0]
            for position in output["prompt_logprobs"][1:]
            for likelihood in position.values()
        ]
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_quantized_activations_change_no_more_than_in_stock(
    make_base, compressed, small_prompts, name
):
    """Keys and values here see activations before rounding, so that tokens may differ.

    Stock vLLM's distance to the same model without any rounding of activations is the measure.
    """
    base, dense = make_base(name)
    scored = {"prompts": small_prompts.ids, "sampling": {"max_tokens": 1, "prompt_logprobs": 0}}
    # With AMX vLLM multiplies int8 with a kernel for bfloat16 only.
    amx = name == "int8" and torch.cpu._is_amx_tile_supported()
    dtype = {"dtype": "bfloat16" if amx else "float32"}
    jobs = [
        small_prompts.job(dense, scored),
        small_prompts.job(base, scored, **dtype),
        small_prompts.job(compressed(base), scored, **dtype, **RECALKV),
    ]
    dense, stock, ours = map(prompt_likelihoods, run_engines(*jobs))
    rounding = (stock - dense).abs().mean()
    assert 0 < (ours - dense).abs().mean() < 1.1 * rounding
    # Two roundings that know nothing of one another: the root of two.
    assert 0 < (ours - stock).abs().mean() < 1.5 * rounding


@needs_avx512
@pytest.mark.slow
def test_perplexity_of_half_the_cache(make_base, tmp_path):
    """The dense form that transformers evaluates is what is served, calibrated as ever."""
    base, out, text = make_base("int4")[0], tmp_path / "half", tmp_path / "text.txt"
    text.write_text(LONG_TEXT)
    few = ("--num-samples", 16, "--seq-len", 64)
    run_recalkv("compress", base, "-o", out, "--compression", 0.5, *few)
    tokens = len(AutoTokenizer.from_pretrained(base)(LONG_TEXT).input_ids)
    options = ("--dataset", text, "--seq-len", 256, "--max-tokens", min(1024, tokens))
    nll = {}
    for engine in ("transformers", "vllm"):
        done = run_recalkv("eval", out, *options, "--engine", engine, "--json")
        nll[engine] = json.loads(done.stdout)["nll"]
    assert nll["vllm"] == pytest.approx(nll["transformers"], rel=0.01)
