"""Base models whose weights are quantized: read dense, and left as they are but for k and v."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from recalkv_vllm.checkpoint import read_hf_config
from recalkv_vllm.compression.base_model.model import BaseModel
from recalkv_vllm.compression.base_model.weight_formats.gptq import dense_weight
from recalkv_vllm.compression.errors import InputError
from recalkv_vllm.compression.options import CompressOptions
from recalkv_vllm.compression.pipeline import compress
from tests.compression.test_compress import read
from tests.e2e.architectures import CONFIGS, save_random_model
from tests.quantized_models import (
    FORMATS,
    GROUP,
    edit_config,
    pack,
    quantize_model,
    round_to,
    write_dense,
)

IDS = torch.randint(1, 512, (1, 40), generator=torch.Generator().manual_seed(5))
FEW = {"num_samples": 8, "seq_len": 32}
KEYS_AND_VALUES = re.compile(r"model\.layers\.\d\.self_attn\.[kv]_proj\.(?!bias)\w+")


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


@pytest.fixture(scope="module")
def quantized(make_model, tmp_path_factory):
    """``quantized(name)``: a quantized model in float32, and the same dense."""
    # Rows of keys fill the words that formats pack along them.
    source = make_model("llama_bias", torch.float32, head_dim=32)
    made = {}

    def make(name):
        if name not in made:
            root = tmp_path_factory.mktemp("quantized")
            dense = quantize_model(source, root / "base", name)
            made[name] = root / "base", write_dense(source, root / "dense", dense)
        return made[name]

    return make


@pytest.fixture(scope="module")
def small_gpt_oss(tokenizer, tmp_path_factory):
    directory = save_random_model(CONFIGS["gpt-oss"], tmp_path_factory.mktemp("gpt-oss") / "model")
    tokenizer.save_pretrained(directory)
    return directory


@pytest.mark.parametrize("name", FORMATS)
def test_dense_form_is_exact(quantized, name):
    """Numbers of a few bits times 16-bit scales fit in float32: no rounding anywhere."""
    base, dense = quantized(name)
    model, expected = (
        BaseModel(base).load(torch.float32, "cpu"),
        load_file(dense / "model.safetensors"),
    )
    found = dict(model.named_parameters())
    assert len(expected) > 20
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key


@pytest.mark.parametrize("name", ["int4", "awq"])
def test_dense_form_of_experts(tmp_path, name):
    source = save_random_model(CONFIGS["qwen3-moe"], tmp_path / "source")
    dense = quantize_model(source, tmp_path / "base", name)
    assert any("experts" in key for key in dense)
    expected = BaseModel(write_dense(source, tmp_path / "dense", dense)).load(torch.float32, "cpu")
    found = BaseModel(tmp_path / "base").load(torch.float32, "cpu")
    assert torch.equal(logits(found), logits(expected))


def microscaled(source, directory):
    """A copy of a gpt-oss model with random experts in MXFP4, and the same dense."""
    generator = torch.Generator().manual_seed(0)
    experts = re.compile(r"model\.layers\.\d\.mlp\.experts\.\w+_proj")
    packed, dense = {}, {}
    for key, tensor in load_file(source / "model.safetensors").items():
        if not experts.fullmatch(key):
            packed[key] = tensor
            continue
        count, inputs, outputs = tensor.shape
        signs, exponents, halves = (
            torch.randint(n, (count, outputs, inputs), generator=generator) for n in (2, 4, 2)
        )
        codes = 8 * signs + 2 * exponents + halves
        scales = torch.randint(119, 123, (count, outputs, inputs // 32), generator=generator)
        pairs = codes.unflatten(2, (-1, 16, 2))
        packed[f"{key}_blocks"] = (pairs[..., 0] + 16 * pairs[..., 1]).to(torch.uint8)
        packed[f"{key}_scales"] = scales.to(torch.uint8)
        # Numbers without a leading one have the smallest exponent.
        magnitudes = torch.where(
            exponents == 0, halves / 2, (1 + halves / 2) * 2.0 ** (exponents - 1)
        )
        numbers = magnitudes * (1 - 2 * signs) * 2.0 ** (scales.repeat_interleave(32, 2) - 127)
        dense[key] = numbers.transpose(1, 2)
    shutil.copytree(source, directory, ignore=shutil.ignore_patterns("model.safetensors"))
    save_file(packed, directory / "model.safetensors", metadata={"format": "pt"})
    settings = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    edit_config(directory, quantization_config=settings)
    return directory, write_dense(source, directory.with_name("dense"), dense)


@pytest.mark.parametrize("compression", [0.0, 0.5])
def test_experts_in_mxfp4_stay_as_they_are(small_gpt_oss, tmp_path, compression):
    base, dense = microscaled(small_gpt_oss, tmp_path / "base")
    assert torch.equal(*(logits(BaseModel(x).load(torch.float32, "cpu")) for x in (base, dense)))
    out = tmp_path / "out"
    compress(CompressOptions(str(base), out, compression, k_group_size=2, **FEW))
    before, after = (load_file(path / "model.safetensors") for path in (base, out))
    assert before.keys() == after.keys()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert all(re.search(r"self_attn\.[kv]_proj\.weight$", key) for key in changed)
    assert len(changed) == (6 if compression else 0)
    configs = [read_hf_config(directory)["quantization_config"] for directory in (base, out)]
    assert configs[0] == configs[1]
    if compression == 0:
        expected, found = (
            logits(BaseModel(directory).load(torch.float32, "cpu")) for directory in (dense, out)
        )
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("version", [1, 2])
def test_gptq_with_ordered_activations_and_any_zero_points(bits, version):
    generator = torch.Generator().manual_seed(bits)
    rounded = round_to(torch.randn(48, 3 * GROUP, generator=generator).half(), bits, False)
    rounded.zeros[0] = 0  # version 1 stores it as the largest number
    rounded.zeros[1] = (1 << bits) - 1
    group_of = torch.arange(3).repeat_interleave(GROUP)[torch.randperm(3 * GROUP)]
    stored = (rounded.zeros.T - (2 - version)) % (1 << bits)
    found = dense_weight(
        pack(rounded.numbers.T, bits, 0),
        pack(stored, bits, 1),
        rounded.scales.T,
        group_of.int(),
        zero_offset=2 - version,
    )
    assert torch.equal(found.double(), rounded.dense(group_of))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("compression", [0.0, 0.5])
def test_all_but_keys_and_values_stay_as_they_are(quantized, tmp_path, name, compression):
    (base, _), out = quantized(name), tmp_path / "out"
    compress(CompressOptions(str(base), out, compression, k_group_size=2, **FEW))
    before, after = (load_file(path / "model.safetensors") for path in (base, out))
    replaced = {key for key in before if KEYS_AND_VALUES.fullmatch(key)}
    written = {f"model.layers.{i}.self_attn.{p}_proj.weight" for i in range(2) for p in "kv"}
    assert set(after) == (set(before) - replaced) | written
    for key in set(before) - replaced:
        assert before[key].dtype == after[key].dtype
        assert torch.equal(before[key].view(torch.uint8), after[key].view(torch.uint8)), key
    recalkv, _, factors = read(out)
    assert {layer.head_order for layer in recalkv.layers} == {tuple(range(4))}
    assert recalkv.settings["output_refit"] is False
    for i, (layout, layer) in enumerate(zip(recalkv.layers, factors, strict=True)):
        down = layer["down"]
        keys = [
            u @ down[slice(*span)] for u, span in zip(layer["k_up"], layout.k_spans, strict=True)
        ]
        found = after[f"model.layers.{i}.self_attn.k_proj.weight"]
        torch.testing.assert_close(found, torch.cat(keys))


@pytest.mark.parametrize("name", FORMATS)
def test_full_rank_is_the_same_model(quantized, tmp_path, name):
    """As read here, and by plain transformers where it reads the format by itself."""
    (base, dense), out = quantized(name), tmp_path / "out"
    compress(CompressOptions(str(base), out, 0.0))
    expected = logits(BaseModel(dense).load(torch.float32, "cpu"))
    torch.testing.assert_close(logits(BaseModel(out).load(torch.float32, "cpu")), expected)
    if read_hf_config(out)["quantization_config"]["quant_method"] != "compressed-tensors":
        return
    plain, theirs = (
        logits(AutoModelForCausalLM.from_pretrained(directory)) for directory in (out, base)
    )
    # Where activations are rounded too, those of keys and values no longer are.
    allowed = (theirs - expected).norm() * 1.1 + 1e-5 * expected.norm()
    assert (plain - expected).norm() < allowed


@pytest.mark.parametrize("method", ["kfac", "recalkv"])
def test_factors_are_those_of_the_dense_form(quantized, tmp_path, method):
    """Calibrated on the dense form, gradients and all; heads stay with their neighbors."""
    made = [tmp_path / name for name in ("base", "dense")]
    for source, out in zip(quantized("int4"), made, strict=True):
        options = {"method": method, "k_group_size": 1, "output_refit": False, **FEW}
        if source.name == "base":
            options["output_refit"] = None
        compress(CompressOptions(str(source), out, 0.5, **options))
    ours, expected = (load_file(out / "recalkv.safetensors") for out in made)
    assert ours.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(ours[key], tensor, rtol=1e-4, atol=1e-5)


def test_factors_alone_heal(quantized, tmp_path):
    """Towards the dense form, as if the model were that."""
    told = []
    for source in quantized("int4"):
        out = tmp_path / source.name
        options = {"heal": 10, "k_group_size": 1, "factors_only": True, **FEW}
        compress(CompressOptions(str(source), out, 0.6, method="svd", **options))
        told.append(read(out)[0].settings["healing"])
    ours, expected = told
    assert ours["weights"] is expected["weights"] is False
    for name in ("loss_before", "loss_after"):
        assert ours[name] == pytest.approx(expected[name], rel=1e-2)


@pytest.mark.parametrize("method", ["kfac", "recalkv"])
def test_heads_are_reordered_only_where_weights_are_not_quantized(
    quantized, tmp_path, method, monkeypatch
):
    for where in ("lowrank.layer_metric", "methods.recalkv"):
        monkeypatch.setattr(
            f"recalkv_vllm.compression.{where}.group_heads", lambda *_: [[0, 2], [1, 3]]
        )
    monkeypatch.setattr(
        "recalkv_vllm.compression.lowrank.layer_metric.improve_grouping",
        lambda grouping, _: grouping,
    )
    orders = []
    for source in quantized("awq"):
        out = tmp_path / source.name
        options = {"method": method, "k_group_size": 2, **FEW}
        compress(CompressOptions(str(source), out, 0.5, factors_only=True, **options))
        layers = read_hf_config(out)["recalkv"]["layers"]
        orders.append({tuple(layer["head_order"]) for layer in layers})
    assert orders == [{(0, 1, 2, 3)}, {(0, 2, 1, 3)}]


def test_configuration_names_what_is_dense_now(quantized, tmp_path):
    written = {}
    for name in ("int4", "awq", "gptq"):
        compress(CompressOptions(str(quantized(name)[0]), tmp_path / name, 0.0))
        written[name] = read_hf_config(tmp_path / name)["quantization_config"]
    dense = ["self_attn.k_proj", "self_attn.v_proj"]
    assert written["int4"]["ignore"] == [
        "lm_head", r"re:.*\.self_attn\.k_proj$", r"re:.*\.self_attn\.v_proj$",
    ]  # fmt: skip
    assert written["awq"]["modules_to_not_convert"] == ["lm_head", "model.embed_tokens", *dense]
    assert written["gptq"]["modules_in_block_to_quantize"] == [
        ["mlp.down_proj", "mlp.gate_proj", "mlp.up_proj", "self_attn.o_proj", "self_attn.q_proj"]
    ]


def test_modules_that_awq_left_dense_stay_named(quantized, tmp_path):
    base, _ = quantized("awq")
    config = read_hf_config(base)["quantization_config"]
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in base.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    edit_config(copy, quantization_config={**config, "modules_to_not_convert": ["router"]})
    compress(CompressOptions(str(copy), tmp_path / "out", 0.0))
    kept = read_hf_config(tmp_path / "out")["quantization_config"]["modules_to_not_convert"]
    assert kept == ["router", "self_attn.k_proj", "self_attn.v_proj"]


def test_missing_scales_are_noticed(quantized, tmp_path):
    """Weights that are not there must not be made up at random."""
    for name, part in (("int4", "weight_scale"), ("gptq", "qzeros"), ("fp8", "weight_scale")):
        copy = tmp_path / name
        copy.mkdir()
        for path in quantized(name)[0].iterdir():
            (copy / path.name).write_bytes(path.read_bytes())
        tensors = load_file(copy / "model.safetensors")
        del tensors[f"model.layers.1.mlp.up_proj.{part}"]
        save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(InputError, match="cannot be loaded"):
            compress(CompressOptions(str(copy), tmp_path / "out", 0.0))


def test_factors_alone_name_no_weights(quantized, tmp_path):
    base, _ = quantized("gptq")
    compress(CompressOptions(str(base), tmp_path / "out", 0.0, factors_only=True, dtype="bfloat16"))
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["quantization_config"] == read_hf_config(base)["quantization_config"]
    factors = load_file(tmp_path / "out" / "recalkv.safetensors")
    assert {tensor.dtype for tensor in factors.values()} == {torch.bfloat16}
