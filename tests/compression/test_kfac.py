"""Method kfac through the whole pipeline, on tiny models."""

import pytest
import torch

from recalkv_vllm.checkpoint import AttentionGeometry, rank_budget, read_hf_config
from recalkv_vllm.compression import pipeline
from recalkv_vllm.compression.calibration import _logits
from recalkv_vllm.compression.errors import InputError
from recalkv_vllm.compression.factoring import ModelLayers, factor_layers
from recalkv_vllm.compression.factors import natural_rows, reorder_rows
from recalkv_vllm.compression.output_refit import OutputRefit, _ridge_regression
from recalkv_vllm.compression.pipeline import CompressOptions, choose_method, compress
from recalkv_vllm.compression.samples import draw_samples
from recalkv_vllm.compression.source import load_model, load_tokenizer
from recalkv_vllm.compression.text import documents
from recalkv_vllm.evaluation.transformers_engine import load_served
from tests.compression.test_compress import FEW, logits, read, weights
from tests.e2e.architectures import CONFIGS, save_random_model


def options(base, out, compression=0.5, **changes):
    return CompressOptions(str(base), out, compression, **{**FEW, **changes})


@pytest.mark.parametrize(
    ("family", "spans", "size", "compression"),
    [
        ("llama_bias", "nested", 1, 0.5),
        ("llama_bias", "nested", 2, 0.3),
        ("llama_bias", "joint", 2, 0.7),
        ("llama_bias", "split", 2, 0.5),
        ("qwen2", "nested", 4, 0.7),
        ("qwen2", "joint", 1, 0.3),
        ("qwen2", "joint", 4, 0.5),
        ("qwen2", "split", 4, 0.7),
    ],
)
def test_spans_and_budget(tiny_models, tmp_path, family, spans, size, compression):
    base, out = tiny_models[family], tmp_path / "out"
    summary = compress(
        options(base, out, compression, spans=spans, k_group_size=size, target="none")
    )
    recalkv, geometry, factors = read(out)
    budget = rank_budget(compression, geometry)
    used = recalkv.cached_elements_per_token()
    groups = 4 // size
    # Short of the budget by less than one step of the cheapest kind.
    assert budget - 16 * groups < used <= budget
    assert recalkv.settings["spans"] == spans
    assert recalkv.settings["v_groups"] == (1 if spans == "split" else groups)
    for layout, layer in zip(recalkv.layers, factors, strict=True):
        assert layout.k_group_size == size
        if spans == "joint":
            assert layout.k_spans == layout.v_spans
        if spans == "nested":
            assert all(
                k[0] == v[0] and k[1] - k[0] == min(v[1] - v[0], size * 16)
                for k, v in zip(layout.k_spans, layout.v_spans, strict=True)
            )
        assert layer["k_up"].isfinite().all()
    assert summary["reconstruct_flop_per_token"] == sum(
        2 * 64 * layout.k_width for layout in recalkv.layers
    )
    assert torch.isfinite(logits(out)).all()


@pytest.mark.parametrize("target", ["16", "40"])
def test_reconstruction_budget(tiny, tmp_path, target):
    """Of all groupings within the budget, the one that loses least."""
    out = tmp_path / "out"
    compress(options(tiny, out, target=target))
    recalkv, geometry, _ = read(out)
    for layout in recalkv.layers:
        assert layout.reconstruct_flop(geometry) <= float(target) * 2 * layout.rank
    losses = {}
    for size in (1, 2, 4):
        directory = tmp_path / str(size)
        compress(options(tiny, directory, target=target, k_group_size=size))
        losses[size] = read(directory)[0].settings["expected_loss"]
    assert recalkv.settings["expected_loss"] == min(losses.values())
    assert recalkv.settings["k_group_size"] == min(losses, key=losses.get)


def test_expected_loss_rises_with_less_freedom(tiny, tmp_path):
    """Sharing a latent, and sharing it among more heads, never loses more."""
    losses = {}
    for name, changes in {
        "joint 4": {"spans": "joint", "k_group_size": 4},
        "nested 4": {"spans": "nested", "k_group_size": 4},
        "nested 4 at 24": {"spans": "nested", "k_group_size": 4, "target": "24"},
        "joint 1": {"spans": "joint", "k_group_size": 1},
        "split 4": {"spans": "split", "k_group_size": 4},
    }.items():
        out = tmp_path / name
        compress(options(tiny, out, **{"target": "none", **changes}))
        losses[name] = read(out)[0].settings["expected_loss"]
    assert losses["joint 4"] == pytest.approx(losses["nested 4"])
    assert losses["joint 4"] < losses["nested 4 at 24"]
    assert losses["joint 4"] < losses["joint 1"]
    assert losses["joint 4"] < losses["split 4"]


@pytest.mark.parametrize("family", ["llama_bias", "qwen2"])
def test_compression_zero_is_exact(tiny_models, tmp_path, family):
    base, out = tiny_models[family], tmp_path / "out"
    summary = compress(options(base, out, 0.0))
    recalkv, _, factors = read(out)
    assert summary["compression"] == 0
    assert recalkv.calibration == {}
    before, after = weights(base), weights(out)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    for layer in factors:
        assert torch.equal(layer["k_up"].float(), torch.eye(16).expand(4, -1, -1))


def test_a_joint_latent_never_needs_more_than_the_hidden_state(tiny, tmp_path):
    """Its 96 numbers hold all that 128 of the dense cache do."""
    out = tmp_path / "out"
    summary = compress(options(tiny, out, 0.1, dtype="float32"))
    assert summary["compression"] == 0.25
    torch.testing.assert_close(logits(out), logits(tiny), rtol=1e-3, atol=1e-2)


def test_output_refit(tiny, tmp_path):
    """Only ``o_proj`` differs, and the model is closer to the base on the calibration text."""
    samples = draw_samples(documents("builtin"), load_tokenizer(tiny), 64, 32, 42)

    def outputs(directory):
        with torch.no_grad():
            return load_model(directory, torch.float32, "cpu")(samples).logits

    errors = {}
    for refit in (False, True):
        out = tmp_path / str(refit)
        compress(options(tiny, out, 0.7, output_refit=refit, num_samples=64, dtype="float32"))
        errors[refit] = float((outputs(out) - outputs(tiny)).norm())
        assert read(out)[0].settings["output_refit"] is refit
    plain, refitted = weights(tmp_path / "False"), weights(tmp_path / "True")
    changed = {name for name in plain if not torch.equal(plain[name], refitted[name])}
    assert changed == {f"model.layers.{i}.self_attn.o_proj.weight" for i in range(2)}
    assert errors[True] < 0.99 * errors[False]


@pytest.mark.parametrize("family", ["tiny", "phi3"])
def test_refit_makes_up_for_quantised_latents(family, tiny, tokenizer, tmp_path, monkeypatch):
    """Closer to the base, as served, than a refit that takes latents for exact."""
    base = tiny
    if family == "phi3":
        base = save_random_model(CONFIGS["phi3-short-rope"], tmp_path / "base")
        tokenizer.save_pretrained(base)
    samples = draw_samples(documents("builtin"), load_tokenizer(base), 64, 32, 42)

    def outputs(network):
        with torch.no_grad():
            return network(samples).logits

    dense = outputs(load_model(base, torch.float32, "cpu"))
    errors = {}
    for name, kind in (("blind", lambda *args: OutputRefit(*args[:3])), ("aware", OutputRefit)):
        monkeypatch.setattr(pipeline, "OutputRefit", kind)
        out = tmp_path / name
        chosen = options(base, out, 0.84, latent_dtype="int3", num_samples=64, dtype="float32")
        compress(chosen)
        errors[name] = float((outputs(load_served(out)) - dense).norm())
    assert errors["aware"] < 0.99 * errors["blind"]


@pytest.mark.parametrize("family", ["llama", "llama_bias", "qwen2"])
def test_refit_of_what_lost_nothing_changes_nothing(tiny_models, tmp_path, family):
    base = tiny_models[family]
    geometry = AttentionGeometry.from_hf_config(read_hf_config(base))
    chosen = options(base, tmp_path, 0.0)
    method = choose_method(chosen, geometry)
    model = load_model(base, torch.float32, "cpu")
    before = [layer.self_attn.o_proj.weight.clone() for layer in model.model.layers]
    layers = ModelLayers(model, geometry, None)
    samples = torch.randint(1, 512, (8, 32), generator=torch.Generator().manual_seed(0))
    refit = OutputRefit(model, samples, "cpu")
    factors, _ = factor_layers(
        geometry, method, method.plan(0.0, layers, None), layers, torch.float32, refit
    )
    for part, weight in zip(factors, before, strict=True):
        torch.testing.assert_close(part.output, weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "name", ["gemma2", "gemma3", "granite", "mixtral", "phi3-short-rope", "qwen3", "qwen3-moe"]
)
def test_streams_of_every_architecture(tmp_path, name):
    """Scaled embeddings, layers of two kinds, fused projections: through a refit of what lost
    nothing the compressed stream ends where the model's own last layer does."""
    base = save_random_model(CONFIGS[name], tmp_path / name)
    geometry = AttentionGeometry.from_hf_config(read_hf_config(base))
    samples = torch.randint(1, 512, (8, 64), generator=torch.Generator().manual_seed(0))
    model = load_model(base, torch.float32, "cpu")
    with torch.no_grad():
        expected = [model.model(sample[None]).last_hidden_state for sample in samples]
    method = choose_method(options(base, tmp_path, 0.0), geometry)
    layers = ModelLayers(model, geometry, None)
    refit = OutputRefit(model, samples, "cpu")
    plans = method.plan(0.0, layers, None)
    factor_layers(geometry, method, plans, layers, torch.float32, refit)
    for hidden, last in zip(refit._compressed, expected, strict=True):
        torch.testing.assert_close(model.model.norm(hidden), last, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["gemma2", "granite", "qwen3"])
def test_gradient_is_that_of_the_models_own_logits(tmp_path, name):
    model = load_model(save_random_model(CONFIGS[name], tmp_path / name), torch.float32, "cpu")
    ids = torch.randint(1, 512, (1, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        hidden = model.model(ids).last_hidden_state
        expected = model(ids).logits[0]
    torch.testing.assert_close(_logits(model, hidden[0]), expected)


def test_ridge_regression_is_the_least_squares_fit():
    generator = torch.Generator().manual_seed(0)
    heads = torch.randn(500, 12, generator=generator, dtype=torch.float64)
    residual = torch.randn(500, 7, generator=generator, dtype=torch.float64)
    change = _ridge_regression(heads.T @ heads, residual.T @ heads)
    expected = torch.linalg.lstsq(heads, residual).solution.T
    torch.testing.assert_close(change, expected, rtol=1e-2, atol=1e-3)


def test_orders_invert():
    rows = torch.arange(12)
    order = (2, 0, 3, 1)
    assert torch.equal(natural_rows(reorder_rows(rows, order), order), rows)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target": "3"}, "no choice of nested spans rebuilds keys with as little as 3 FLOP"),
        ({"spans": "joint", "target": "15"}, "no choice of joint spans"),
        ({"v_groups": 2}, "with nested spans values are grouped as keys are"),
        ({"rank_allocation": "fisher"}, "not known to method kfac; expected loss"),
        ({"target": "tpu"}, "target 'tpu': expected h100"),
        ({"num_samples": 3}, "96 tokens are too few; expected at least 128"),
        ({"method": "palu", "spans": "joint"}, "not known to method palu; expected split"),
    ],
)
def test_bad_input(tiny, tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        compress(options(tiny, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


def test_largest_possible_compression_is_accepted(tiny, tmp_path):
    with pytest.raises(InputError, match=r"largest possible compression .* is 0\.875"):
        compress(options(tiny, tmp_path / "out", 0.95))
    compress(options(tiny, tmp_path / "out", 0.875))


def test_same_bits_twice(tiny, tmp_path, monkeypatch):
    for name in ("a", "b"):
        monkeypatch.setenv("RECALKV_CACHE", str(tmp_path / f"cache-{name}"))
        compress(options(tiny, tmp_path / name))
    for file in ("config.json", "model.safetensors", "recalkv.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
