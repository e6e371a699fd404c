"""The refit of ``o_proj``: closer to the base model, and nothing where nothing was lost."""

import pytest
import torch

from recalkv_vllm.compression import pipeline
from recalkv_vllm.compression.base_model.model import BaseModel
from recalkv_vllm.compression.calibration.samples import draw_samples
from recalkv_vllm.compression.calibration.text import documents
from recalkv_vllm.compression.check import check, choose_method
from recalkv_vllm.compression.factoring.factor_layers import ModelLayers, factor_layers
from recalkv_vllm.compression.factoring.output_refit import OutputRefit, _ridge_regression
from recalkv_vllm.compression.layer import LayerFactors
from recalkv_vllm.compression.pipeline import compress
from recalkv_vllm.compression.plan import Budget, ModelPlan
from recalkv_vllm.evaluation.transformers_engine import load_served
from tests.compression.methods.test_kfac import options
from tests.compression.test_compress import read, weights
from tests.e2e.architectures import CONFIGS, save_random_model

#: The text that errors are measured on.
TEXT = {"datasets": ("builtin",), "num_samples": 64, "dtype": "float32"}


def factor_at_full_rank(base: BaseModel, model, refit: OutputRefit, out) -> list[LayerFactors]:
    """Factors of method kfac that lose nothing."""
    layers = ModelLayers(model, base.geometry, None)
    method = choose_method(options(base.directory, out, 0.0), 0.0, base.geometry, "none")
    plan = method.plan(method.measure(0.0, layers, None), Budget(0.0))
    factors, _ = factor_layers(method, plan, layers, torch.float32, refit)
    return factors


def test_output_refit(tiny, tmp_path):
    """Only ``o_proj`` differs, and the model is closer to the base on the calibration text."""
    samples = draw_samples(documents("builtin"), BaseModel(tiny).tokenizer(), 64, 32, 42)

    def outputs(directory):
        with torch.no_grad():
            return BaseModel(directory).load(torch.float32, "cpu")(samples).logits

    errors = {}
    for refit in (False, True):
        out = tmp_path / str(refit)
        compress(options(tiny, out, 0.7, output_refit=refit, **TEXT))
        errors[refit] = float((outputs(out) - outputs(tiny)).norm())
        assert read(out)[0].settings["output_refit"] is refit
    plain, refitted = weights(tmp_path / "False"), weights(tmp_path / "True")
    changed = {name for name in plain if not torch.equal(plain[name], refitted[name])}
    assert changed == {f"model.layers.{i}.self_attn.o_proj.weight" for i in range(2)}
    assert errors[True] < 0.99 * errors[False]


@pytest.mark.parametrize(
    ("asked", "expected_loss", "refits"),
    [(None, 0.01, False), (None, 0.1, True), (True, 0.01, True), (False, 0.1, False)],
)
def test_refit_is_the_default_where_much_is_lost(tiny, tmp_path, asked, expected_loss, refits):
    job = check(options(tiny, tmp_path / "out", 0.7, output_refit=asked))
    assert job.refits_output(ModelPlan((), "joint", expected_loss=expected_loss)) is refits


@pytest.mark.parametrize("family", ["tiny", "phi3"])
def test_refit_makes_up_for_quantized_latents(family, tiny, tokenizer, tmp_path, monkeypatch):
    """Closer to the base, as served, than a refit that takes latents for exact."""
    base = tiny
    if family == "phi3":
        base = save_random_model(CONFIGS["phi3-short-rope"], tmp_path / "base")
        tokenizer.save_pretrained(base)
    samples = draw_samples(documents("builtin"), BaseModel(base).tokenizer(), 64, 32, 42)

    def outputs(network):
        with torch.no_grad():
            return network(samples).logits

    dense = outputs(BaseModel(base).load(torch.float32, "cpu"))
    errors = {}
    for name, kind in (("blind", lambda *args: OutputRefit(*args[:3])), ("aware", OutputRefit)):
        monkeypatch.setattr(pipeline, "OutputRefit", kind)
        out = tmp_path / name
        chosen = options(base, out, 0.84, latent_dtype="int3", **TEXT)
        compress(chosen)
        errors[name] = float((outputs(load_served(out)) - dense).norm())
    assert errors["aware"] < 0.99 * errors["blind"]


@pytest.mark.parametrize("family", ["llama", "llama_bias", "qwen2"])
def test_refit_of_what_lost_nothing_changes_nothing(tiny_models, tmp_path, family):
    base = BaseModel(tiny_models[family])
    model = base.load(torch.float32, "cpu")
    before = [layer.self_attn.o_proj.weight.clone() for layer in model.model.layers]
    samples = torch.randint(1, 512, (8, 32), generator=torch.Generator().manual_seed(0))
    factors = factor_at_full_rank(base, model, OutputRefit(model, samples, "cpu"), tmp_path)
    for part, weight in zip(factors, before, strict=True):
        torch.testing.assert_close(part.output, weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "name", ["gemma2", "gemma3", "granite", "mixtral", "phi3-short-rope", "qwen3", "qwen3-moe"]
)
def test_streams_of_every_architecture(tmp_path, name):
    """Scaled embeddings, layers of two kinds, fused projections: through a refit of what lost
    nothing the compressed stream ends where the model's own last layer does."""
    base = BaseModel(save_random_model(CONFIGS[name], tmp_path / name))
    samples = torch.randint(1, 512, (8, 64), generator=torch.Generator().manual_seed(0))
    model = base.load(torch.float32, "cpu")
    with torch.no_grad():
        expected = [model.model(sample[None]).last_hidden_state for sample in samples]
    refit = OutputRefit(model, samples, "cpu")
    factor_at_full_rank(base, model, refit, tmp_path)
    for hidden, last in zip(refit._compressed, expected, strict=True):
        torch.testing.assert_close(model.model.norm(hidden), last, rtol=1e-3, atol=1e-3)


def test_ridge_regression_is_the_least_squares_fit():
    generator = torch.Generator().manual_seed(0)
    heads = torch.randn(500, 12, generator=generator, dtype=torch.float64)
    residual = torch.randn(500, 7, generator=generator, dtype=torch.float64)
    change = _ridge_regression(heads.T @ heads, residual.T @ heads)
    expected = torch.linalg.lstsq(heads, residual).solution.T
    torch.testing.assert_close(change, expected, rtol=1e-2, atol=1e-3)
