"""``compress`` on tiny models of every family: the checkpoint is what it says it is."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from recalkv_vllm.architectures import SUPPORTED
from recalkv_vllm.checkpoint import (
    AttentionGeometry,
    FactorReader,
    RecalkvConfig,
    rank_budget,
    read_hf_config,
)
from recalkv_vllm.compression.options import CompressOptions
from recalkv_vllm.compression.output import writer
from recalkv_vllm.compression.pipeline import compress
from tests.tiny_models import FAMILIES

IDS = torch.randint(1, 512, (2, 40), generator=torch.Generator().manual_seed(5))
FEW = {"num_samples": 4, "seq_len": 32}


def logits(directory) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(IDS).logits


def read(directory):
    """Configuration and all factors, through the strict reader."""
    config = read_hf_config(directory)
    recalkv = RecalkvConfig.from_hf_config(config)
    geometry = AttentionGeometry.from_hf_config(config)
    with FactorReader(directory / "recalkv.safetensors", recalkv, geometry) as reader:
        factors = [
            {name: reader.read(i, name) for name in layout.factor_shapes(geometry)}
            for i, layout in enumerate(recalkv.layers)
        ]
    return recalkv, geometry, factors


def head_order(recalkv, i):
    return list(recalkv.layers[i].head_order)


def weights(directory) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["kfac", "recalkv", "palu", "svd"])
def test_checkpoint_holds_what_it_says(tiny_models, tmp_path, family, method):
    base, out = tiny_models[family], tmp_path / "out"
    options = {"method": method, "k_group_size": 2, "latent_dtype": "bf16", **FEW}
    summary = compress(CompressOptions(str(base), out, 0.5, **options))
    recalkv, geometry, factors = read(out)
    assert {len(layout.v_spans) for layout in recalkv.layers} == {
        2 if method in ("kfac", "palu") else 1
    }
    config, base_config = read_hf_config(out), read_hf_config(base)

    assert config["model_type"] == base_config["model_type"]
    assert config["architectures"] == [SUPPORTED[config["model_type"]].served_name]
    changed = {"architectures", "recalkv"}
    assert {k: v for k, v in config.items() if k not in changed} == {
        k: v for k, v in base_config.items() if k not in changed
    }
    assert recalkv.method == method
    assert recalkv.cached_elements_per_token() == rank_budget(0.5, geometry)
    assert summary["kv_bytes_per_token"] == {"dense": 2 * 128 * 2, "compressed": 128 * 2}
    assert summary["compression"] == 0.5
    assert 0 < max(layer["k_error"] for layer in summary["layers"]) < 1

    # Dense products are those of the rounded factors, in the written dtype.
    tensors = weights(out)
    for i, (layout, layer) in enumerate(zip(recalkv.layers, factors, strict=True)):
        assert layer["down"].dtype == torch.bfloat16
        down = layer["down"].float()
        keys = [
            u.float() @ down[a:b] for u, (a, b) in zip(layer["k_up"], layout.k_spans, strict=True)
        ]
        per_group = geometry.num_kv_heads // len(layout.v_spans)
        values = [
            layer["v_up"][h].float() @ down[slice(*layout.v_spans[h // per_group])]
            for h in range(geometry.num_kv_heads)
        ]
        prefix = f"model.layers.{i}.self_attn"
        for name, product in (("k_proj", keys), ("v_proj", values)):
            written = tensors[f"{prefix}.{name}.weight"]
            assert torch.equal(written, torch.cat(product).bfloat16())
    assert torch.isfinite(logits(out)).all()
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer("text").input_ids == AutoTokenizer.from_pretrained(base)("text").input_ids
    assert "vllm serve out --attention-backend recalkv" in (out / "README.md").read_text()


@pytest.mark.parametrize("family", FAMILIES)
def test_biases_move_with_their_heads(tiny_models, tmp_path, family, monkeypatch):
    """All biases are the base model's, permuted: none added to the factors as well, none left."""
    monkeypatch.setattr(
        "recalkv_vllm.compression.methods.recalkv.group_heads", lambda *_: [[0, 2], [1, 3]]
    )
    base, out = tiny_models[family], tmp_path / "out"
    compress(CompressOptions(str(base), out, 0.5, "recalkv", k_group_size=2, **FEW))
    before, after = weights(base), weights(out)
    assert set(before) == set(after)
    order = [0, 2, 1, 3]
    for name, tensor in before.items():
        if "self_attn" not in name:
            assert torch.equal(after[name], tensor), name
        elif name.endswith("bias"):
            moved = tensor if "o_proj" in name else tensor.view(4, -1)[order].flatten()
            assert torch.equal(after[name], moved), name
        elif "q_proj" in name:
            assert torch.equal(after[name], tensor.view(4, -1, 96)[order].flatten(0, 1)), name
        elif "o_proj" in name:
            assert torch.equal(after[name], tensor.view(96, 4, -1)[:, order].flatten(1)), name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("order", [[[0, 1], [2, 3]], [[1, 3], [0, 2]]])
def test_full_rank_gives_the_same_model(tiny_models, tmp_path, family, order, monkeypatch):
    """Compression 0 is exact: identities, the very weights, and the same logits in any order."""
    monkeypatch.setattr("recalkv_vllm.compression.methods.recalkv.group_heads", lambda *_: order)
    base, out = tiny_models[family], tmp_path / "out"
    summary = compress(CompressOptions(str(base), out, 0.0, "recalkv", k_group_size=2, **FEW))
    recalkv, _, factors = read(out)
    before, after = weights(base), weights(out)
    flat = [head for group in order for head in group]
    for i, layer in enumerate(factors):
        assert head_order(recalkv, i) == flat
        for name, rows in (("k_proj", slice(0, 64)), ("v_proj", slice(64, 128))):
            full = f"model.layers.{i}.self_attn.{name}.weight"
            moved = before[full].view(4, 16, 96)[flat].flatten(0, 1)
            assert torch.equal(after[full], moved)
            assert torch.equal(layer["down"][rows], moved)
        assert torch.equal(layer["k_up"].float(), torch.eye(32).expand(2, -1, -1))
        assert torch.equal(layer["v_up"].float().flatten(0, 1), torch.eye(64))
    assert summary["compression"] == 0
    assert {layer["k_error"] for layer in summary["layers"]} == {0.0}
    torch.testing.assert_close(logits(out), logits(base), rtol=1e-5, atol=1e-5)


def test_planted_copies_of_heads_share_groups(make_model, tmp_path):
    """HSR through the whole pipeline: with copies grouped, half of the key cache loses nothing."""
    base = make_model("llama", torch.float32)
    tensors = weights(base)
    for i in range(2):
        keys = tensors[f"model.layers.{i}.self_attn.k_proj.weight"].view(4, 16, 96)
        keys[3], keys[2] = keys[0], keys[1]
    model = AutoModelForCausalLM.from_pretrained(base)
    model.load_state_dict(tensors, strict=False)
    model.save_pretrained(base)
    out = tmp_path / "out"
    options = CompressOptions(
        str(base), out, 0.25, "recalkv", k_group_size=2, rank_allocation="uniform", **FEW
    )
    compress(options)
    recalkv, _, _ = read(out)
    for i in range(2):
        assert sorted(sorted(head_order(recalkv, i)[a : a + 2]) for a in (0, 2)) == [[0, 3], [1, 2]]


@pytest.mark.parametrize(
    ("method", "allocation"),
    [("kfac", None), ("recalkv", "uniform"), ("palu", "uniform"), ("svd", None)],
)
def test_error_falls_with_rank(tiny, tmp_path, method, allocation):
    errors = []
    for compression in (0.7, 0.5, 0.2):
        out = tmp_path / str(compression)
        summary = compress(
            CompressOptions(
                str(tiny), out, compression, method=method, rank_allocation=allocation, **FEW
            )
        )
        errors.append(sum(layer["k_error"] + layer["v_error"] for layer in summary["layers"]))
    assert errors[0] > errors[1] > errors[2]


def test_whitening_beats_plain_svd_on_outputs(tiny, tmp_path):
    """With the same ranks, on the text that it was calibrated on."""
    total = {}
    for method in ("palu", "recalkv"):
        summary = compress(
            CompressOptions(
                str(tiny), tmp_path / method, 0.5, method=method, k_group_size=4, v_groups=1,
                rank_allocation="uniform", **FEW,
            )
        )  # fmt: skip
        total[method] = sum(layer["v_error"] for layer in summary["layers"])
    # All heads in one group: OVC ends where whitening begins.
    assert total["recalkv"] == pytest.approx(total["palu"], rel=1e-2)


@pytest.mark.parametrize(
    ("dtype", "expected"), [("float32", torch.float32), ("float16", torch.float16)]
)
def test_written_dtype(tiny, tmp_path, dtype, expected):
    out = tmp_path / "out"
    compress(CompressOptions(str(tiny), out, 0.0, dtype=dtype))
    _, _, factors = read(out)
    assert factors[0]["down"].dtype == expected
    assert {tensor.dtype for tensor in weights(out).values()} == {expected}
    assert read_hf_config(out)["dtype"] == dtype
    torch.testing.assert_close(logits(out), logits(tiny), rtol=1e-2, atol=2e-3)


def test_factors_of_a_model_in_float32_are_rounded_once(make_model, tmp_path):
    base, out = make_model("llama", torch.float32), tmp_path / "out"
    compress(CompressOptions(str(base), out, 0.5, method="svd", dtype="bfloat16"))
    recalkv, _, factors = read(out)
    written = weights(out)["model.layers.0.self_attn.k_proj.weight"]
    layout = recalkv.layers[0]
    product = factors[0]["k_up"][0].float() @ factors[0]["down"][slice(*layout.k_spans[0])].float()
    assert torch.equal(written, product.bfloat16())


def test_old_configurations_keep_their_name_of_the_dtype(tiny, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    for path in tiny.iterdir():
        (base / path.name).write_bytes(path.read_bytes())
    config = read_hf_config(base)
    config["torch_dtype"] = config.pop("dtype")
    (base / "config.json").write_text(json.dumps(config))
    compress(CompressOptions(str(base), tmp_path / "out", 0.0, dtype="float32"))
    written = read_hf_config(tmp_path / "out")
    assert written["torch_dtype"] == "float32"
    assert "dtype" not in written


@pytest.mark.parametrize("failure", [KeyboardInterrupt, OSError])
def test_nothing_is_left_behind_by_a_failure(tiny, tmp_path, monkeypatch, failure):
    def fail(*_):
        raise failure

    monkeypatch.setattr(writer, "save_factors", fail)
    with pytest.raises(failure):
        compress(CompressOptions(str(tiny), tmp_path / "results" / "out", 0.0))
    assert list((tmp_path / "results").iterdir()) == []


def test_same_seed_same_checkpoint(tiny, tmp_path, monkeypatch):
    for name in ("a", "b"):
        monkeypatch.setenv("RECALKV_CACHE", str(tmp_path / f"cache-{name}"))
        compress(CompressOptions(str(tiny), tmp_path / name, 0.5, **FEW))
    for file in ("config.json", "model.safetensors", "recalkv.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
