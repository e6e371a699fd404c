"""Quantized latents, served: the scheduler changes no token, capacity and perplexity are right."""

import json
import shutil
from pathlib import Path

import pytest
from vllm.engine.arg_utils import EngineArgs

from recalkv_vllm.checkpoint import RecalkvConfig
from recalkv_vllm.latent_format import LatentFormat
from tests.e2e.conftest import run_engines, run_recalkv
from tests.e2e.prompts import LONG_TEXT

RECALKV = {"attention_backend": "recalkv"}
INT8, INT4 = LatentFormat("int8", 32), LatentFormat("int4", 64)


@pytest.fixture(scope="module")
def quantize(tmp_path_factory):
    """``quantize(checkpoint, latent_format)``: a copy that caches latents so, weights linked."""

    def make(checkpoint: Path, latent_format: LatentFormat) -> Path:
        copy = tmp_path_factory.mktemp("quantized") / f"{checkpoint.name}-{latent_format.dtype}"
        shutil.copytree(checkpoint, copy, copy_function=lambda a, b: Path(b).symlink_to(a))
        config = json.loads((copy / "config.json").read_text())
        config["recalkv"]["latent_quantization"] = latent_format.to_dict()
        (copy / "config.json").unlink()
        (copy / "config.json").write_text(json.dumps(config))
        return copy

    return make


@pytest.fixture(scope="module")
def runs(small, make_small, compressed, small_prompts, quantize, bands):
    """The same prompts as scheduled in several ways, and on caches of several formats."""
    plain = compressed(small)
    int4 = quantize(plain, INT4)
    # Windows on some layers: the cache has layers of two kinds.
    windows = quantize(compressed(make_small("gemma2")), INT8)
    repeat = {"prompts": [small_prompts.ids[0]], "sampling": {"max_tokens": 8, "ignore_eos": True}}
    jobs = {
        "plain": small_prompts.job(plain, **RECALKV),
        "fp8 flag": small_prompts.job(plain, kv_cache_dtype="fp8", **RECALKV),
        "int8": small_prompts.job(quantize(plain, INT8), **RECALKV),
        "whole": small_prompts.job(int4, max_num_batched_tokens=512, **RECALKV),
        "chunked": small_prompts.job(int4, **RECALKV),
        "repeated": small_prompts.job(int4, repeat, repeat, **RECALKV),
        "windows": small_prompts.job(windows, **RECALKV),
        "windows whole": small_prompts.job(windows, max_num_batched_tokens=512, **RECALKV),
        "bands": small_prompts.job(bands(small), **RECALKV),
        "bands whole": small_prompts.job(bands(small), max_num_batched_tokens=512, **RECALKV),
        # 12 blocks of 32 tokens hold the long request alone.
        "tight": small_prompts.job(int4, num_gpu_blocks_override=13, max_model_len=352, **RECALKV),
    }
    return dict(zip(jobs, run_engines(*jobs.values()), strict=True))


def test_chunked_prefill(runs):
    assert runs["chunked"]["tokens"] == runs["whole"]["tokens"]
    assert runs["windows"]["tokens"] == runs["windows whole"]["tokens"]
    assert runs["bands"]["tokens"] == runs["bands whole"]["tokens"]


def test_prefix_caching(runs, small_prompts):
    first, again = runs["repeated"]["tokens"]
    assert first == again
    assert first[0] == runs["whole"]["tokens"][0][0][:8]
    cached = runs["repeated"]["metrics"]["vllm:prefix_cache_hits"]
    assert cached >= len(small_prompts.ids[0]) - 32


def test_preemption(runs):
    assert runs["tight"]["metrics"]["vllm:num_preemptions"] > 0
    assert runs["tight"]["tokens"] == runs["whole"]["tokens"]


def test_int4_is_not_float32(runs):
    """Else nothing above was quantized."""
    assert runs["whole"]["tokens"] != runs["plain"]["tokens"]


@pytest.mark.parametrize(
    ("name", "latent_format"),
    [("fp8 flag", LatentFormat("fp8", 32)), ("int8", INT8), ("chunked", INT4)],
)
def test_capacity(runs, compressed, small, name, latent_format):
    config = json.loads((compressed(small) / "config.json").read_text())["recalkv"]
    ranks = [layer["rank"] for layer in config["layers"]]
    expected = 4 * sum(ranks) / sum(map(latent_format.slot_bytes, ranks))
    tokens = {run: runs[run]["metrics"]["kv_cache_tokens"] for run in ("plain", name)}
    found = tokens[name] / tokens["plain"]
    assert found == pytest.approx(expected, rel=0.01)


def test_capacity_of_bands(runs, bands, compressed, small):
    """Several bit widths, with scales and padding: each layer has slots of its own size."""
    plain, banded = (
        RecalkvConfig.from_hf_config(json.loads((checkpoint / "config.json").read_text()))
        for checkpoint in (compressed(small), bands(small))
    )
    slots = [banded.latent_format(i).slot_bytes(at.rank) for i, at in enumerate(banded.layers)]
    assert len({band.bits for layer in banded.layers for band in layer.bands}) > 1
    expected = 4 * plain.cached_elements_per_token() / sum(slots)
    tokens = {run: runs[run]["metrics"]["kv_cache_tokens"] for run in ("plain", "bands")}
    assert tokens["bands"] / tokens["plain"] == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("latents", ["int4", pytest.param("bands", marks=pytest.mark.slow)])
def test_perplexity_is_that_of_rounded_latents(half, model, quantize, bands, latents, tmp_path):
    checkpoint = quantize(half, INT4) if latents == "int4" else bands(model)
    text = tmp_path / "text.txt"
    text.write_text(LONG_TEXT)
    perplexity = {}
    for engine in ("transformers", "vllm"):
        options = ("--dataset", text, "--seq-len", 256, "--max-tokens", 512, "--engine", engine)
        done = run_recalkv("eval", checkpoint, *options, "--json")
        perplexity[engine] = json.loads(done.stdout)["perplexity"]
    # Codes that other sums round the other way: 1 % here, a tenth of what int4 costs.
    assert perplexity["vllm"] == pytest.approx(perplexity["transformers"], rel=0.02)


@pytest.mark.parametrize("cache_dtype", ["fp8", "bfloat16", "int8_per_token_head"])
def test_format_of_the_checkpoint_stays(compressed, small, quantize, cache_dtype):
    checkpoint = quantize(compressed(small), INT4)
    arguments = {"enforce_eager": True, "dtype": "float32", "kv_cache_dtype": cache_dtype}
    message = (
        rf"--kv-cache-dtype: expected auto for a checkpoint of int4 latents, found {cache_dtype}"
    )
    with pytest.raises(ValueError, match=message):
        EngineArgs(model=str(checkpoint), **RECALKV, **arguments).create_engine_config()
