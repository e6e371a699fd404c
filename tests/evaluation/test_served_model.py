"""The transformers engine runs a checkpoint as it is served; agreement compares two models."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from recalkv_vllm.checkpoint import AttentionGeometry, FactorReader, RecalkvConfig, read_hf_config
from recalkv_vllm.cli import main
from recalkv_vllm.compression.errors import InputError
from recalkv_vllm.evaluation.agreement import agreement
from recalkv_vllm.evaluation.transformers_engine import generate, load_served, score_windows
from recalkv_vllm.latent_format import LatentFormat

WINDOWS = [[(7 * i + 3 * j) % 500 + 1 for i in range(40)] for j in range(3)]


@pytest.fixture(params=["llama", "qwen2"])
def checkpoint(request, make_model, tmp_path) -> Path:
    out = tmp_path / "half"
    base = make_model(request.param)
    arguments = ["compress", base, "-o", out, "--compression", 0.5, "--method", "svd"]
    assert main([*map(str, arguments)]) == 0
    return out


def quantize(checkpoint: Path, latent_format: LatentFormat) -> RecalkvConfig:
    config = read_hf_config(checkpoint)
    recalkv = replace(RecalkvConfig.from_hf_config(config), latent_quantization=latent_format)
    (checkpoint / "config.json").write_text(json.dumps({**config, "recalkv": recalkv.to_dict()}))
    return recalkv


def test_quantized_latents_are_rounded(checkpoint):
    plain = load_served(checkpoint)
    recalkv = quantize(checkpoint, LatentFormat("int4", 16))
    served = load_served(checkpoint)
    geometry = AttentionGeometry.from_hf_config(read_hf_config(checkpoint))
    x = torch.randn(5, geometry.hidden_size)
    with FactorReader(checkpoint / "recalkv.safetensors", recalkv, geometry) as reader:
        down, k_up = (reader.read(1, name).float() for name in ("down", "k_up"))
    z = LatentFormat("int4", 16).round_trip(x @ down.T)
    layout = recalkv.layers[1]
    keys = [z[:, a:b] @ up.T for (a, b), up in zip(layout.k_spans, k_up, strict=True)]
    projection = plain.model.layers[1].self_attn.k_proj
    bias = 0 if projection.bias is None else projection.bias
    got = served.model.layers[1].self_attn.k_proj(x)
    torch.testing.assert_close(got, torch.cat(keys, dim=-1) + bias, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(got, projection(x), atol=1e-4)


def test_eight_bits_lose_little_and_three_lose_more(checkpoint):
    exact = torch.tensor(score_windows(checkpoint, WINDOWS))
    errors = []
    for dtype in ("int8", "int3"):
        quantize(checkpoint, LatentFormat(dtype, 32))
        scores = torch.tensor(score_windows(checkpoint, WINDOWS))
        errors.append(float((scores - exact).sum(dim=1).abs().sum()))
    assert 0 < errors[0] < errors[1] / 4


def test_agreement_with_itself_is_whole(checkpoint, tiny):
    same = agreement(checkpoint, checkpoint, WINDOWS)
    assert same["top1"] == 1
    assert same["kl"] == pytest.approx(0, abs=1e-6)
    assert same["nll"] == same["base_nll"]
    assert same["tokens"] == 3 * 39
    total = sum(map(sum, score_windows(checkpoint, WINDOWS)))
    assert same["nll"] == pytest.approx(total / same["tokens"], rel=1e-5)
    other = agreement(checkpoint, tiny, WINDOWS)
    assert other["kl"] > 1e-4
    assert math.isfinite(other["base_nll"])


def test_other_vocabulary_is_refused(checkpoint, tiny, tmp_path):
    other = load_served(tiny)
    other.resize_token_embeddings(300)
    other.save_pretrained(tmp_path / "small")
    with pytest.raises(InputError, match="expected a vocabulary of 512, found 300"):
        agreement(checkpoint, tmp_path / "small", WINDOWS)


def test_generation_is_greedy(tiny):
    network = load_served(tiny)
    prompt = WINDOWS[0][:10]
    (answer,) = generate(tiny, [prompt], [5])
    for token in answer:
        assert int(network(torch.tensor([prompt])).logits[0, -1].argmax()) == token
        prompt = [*prompt, token]
