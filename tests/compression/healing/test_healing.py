"""Healing: what is trained is what is served, it gets better, and it never makes things worse."""

import logging
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from recalkv_vllm.band_format import BandFormat
from recalkv_vllm.checkpoint import RecalkvConfig, read_hf_config
from recalkv_vllm.compression import pipeline
from recalkv_vllm.compression.base_model.attention import attention_modules
from recalkv_vllm.compression.calibration.calibration_pass import freeze
from recalkv_vllm.compression.calibration.calibration_text import draw_text
from recalkv_vllm.compression.errors import InputError
from recalkv_vllm.compression.healing import state, training
from recalkv_vllm.compression.healing.distillation import divergence, hidden_states
from recalkv_vllm.compression.healing.projections import TrainedFactors
from recalkv_vllm.compression.healing.student import Student
from recalkv_vllm.compression.layer import LayerFactors, nested_layout
from recalkv_vllm.compression.options import CompressOptions
from recalkv_vllm.compression.pipeline import compress
from recalkv_vllm.evaluation.transformers_engine import load_served
from recalkv_vllm.latent_format import LatentFormat

FEW = {"num_samples": 8, "seq_len": 32}
#: Of both layers.
FORMATS = {
    "plain": (None, None),
    "int4": (LatentFormat("int4", 32),) * 2,
    "bands": (BandFormat(((32, 6), (32, 3))), BandFormat(((64, 4),))),
}
IDS = torch.randint(1, 512, (6, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def factors(geometry):
    """Random factors of heads in an order of their own."""
    layout = nested_layout((2, 0, 3, 1), k_group_size=2, k_width=16, width=32)
    generator = torch.Generator().manual_seed(0)

    def layer():
        shapes = layout.factor_shapes(geometry)
        parts = [0.2 * torch.randn(shapes[n], generator=generator) for n in shapes]
        return LayerFactors(layout, *parts)

    return [layer() for _ in range(geometry.num_layers)]


@pytest.fixture
def student(load, factors):
    def make(*latent_formats, train_weights=True):
        model = load()
        freeze(model, gradient=True, seq_len=IDS.shape[1])
        return Student(model, load(), factors, latent_formats or FORMATS["plain"], train_weights)

    return make


@pytest.fixture
def state_file(tmp_path):
    return lambda: state.StateFile(tmp_path / "state.safetensors")


def logits(model):
    with torch.no_grad():
        return model(IDS[:1]).logits


def likelihoods(directory, ids):
    with torch.no_grad():
        return load_served(directory)(ids).logits.log_softmax(dim=-1)


def written(directory):
    config = RecalkvConfig.from_hf_config(read_hf_config(directory))
    return config, load_file(directory / "model.safetensors")


def test_student_is_the_model_of_the_factors(student, load, factors):
    """Within the block; outside of it the model is dense again."""
    made, dense, expected = student(), load(), load()
    for attention, layer in zip(attention_modules(expected), factors, strict=True):
        natural = sorted(range(4), key=layer.layout.head_order.__getitem__)
        for name, product in zip(("k_proj", "v_proj"), layer.products(), strict=True):
            heads = product.unflatten(0, (4, -1))[natural].flatten(0, 1)
            getattr(attention, name).weight.data.copy_(heads)
    with made.compressed():
        torch.testing.assert_close(logits(made.model), logits(expected))
        assert not torch.allclose(logits(made.model), logits(dense), atol=1e-2)
    torch.testing.assert_close(logits(made.model), logits(dense), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["int4", "bands"])
@pytest.mark.parametrize("index", [0, 1])
def test_gradients_pass_the_rounding_of_latents(student, name, index):
    rounded = student(*FORMATS[name]).layers[index].factors
    plain = student().layers[index].factors
    x = torch.randn(5, 96, generator=torch.Generator().manual_seed(2))
    weight = torch.randn(5, len(rounded.down()), generator=torch.Generator().manual_seed(3))
    for layer in (rounded, plain):
        (layer.latents(x) * weight).sum().backward()
    expected = FORMATS[name][index].round_trip(plain.latents(x))
    torch.testing.assert_close(rounded.latents(x), expected)
    torch.testing.assert_close(rounded.down.unit.grad, plain.down.unit.grad)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_keys_and_values_share_latents(student, checkpointing, monkeypatch):
    """They are computed once a layer and pass; gradients those of latents that are not shared."""
    computed, latents = [], TrainedFactors.latents

    def counted(self, x):
        computed.append(self)
        return latents(self, x)

    def gradients():
        made = student(*FORMATS["bands"])
        if checkpointing:
            made.model.train()
            made.model.gradient_checkpointing_enable({"use_reentrant": False})
        with made.compressed():
            hidden_states(made.model, IDS[0], gradient=True).square().sum().backward()
        return [parameter.grad for parameter in made.parameters()]

    monkeypatch.setattr(TrainedFactors, "latents", counted)
    found = gradients()
    assert len(computed) == (4 if checkpointing else 2)
    monkeypatch.setattr(TrainedFactors, "shared_latents", latents)
    for shared, own in zip(found, gradients(), strict=True):
        torch.testing.assert_close(shared, own)


def test_divergence_and_its_gradient(load, monkeypatch):
    monkeypatch.setattr("recalkv_vllm.compression.healing.distillation.LOGIT_CHUNK", 5)
    model = load().double()
    teacher, hidden = torch.randn(2, 12, 96, dtype=torch.float64)
    hidden.requires_grad_(True)
    student = hidden.detach().requires_grad_(True)
    found, gradient = divergence(model, teacher, student), student.grad
    target, predicted = (F.softmax(model.lm_head(x), dim=-1) for x in (teacher, hidden))
    expected = (target * (target / predicted).log()).sum()
    expected.backward()
    assert found == pytest.approx(float(expected.detach()), rel=1e-4)
    torch.testing.assert_close(gradient, hidden.grad, rtol=1e-3, atol=1e-5)
    assert divergence(model, teacher, teacher) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("name", FORMATS)
def test_training_gets_better(student, factors, state_file, name, monkeypatch):
    """On random tokens there is nothing to learn but these."""
    monkeypatch.setattr(training, "LEARNING_RATE", 3e-3)
    made = student(*FORMATS[name])
    found = training.train(made, IDS, IDS[4:], 40, 0, state_file())
    assert found.steps == 40
    assert found.tokens == 40 * IDS.shape[1]
    assert found.loss_after < 0.9 * found.loss_before
    expected = training.predictions(made, IDS[4:])
    assert training.held_out_loss(made, IDS[4:], expected) == pytest.approx(
        found.loss_after, rel=1e-5
    )
    for before, after in zip(factors, made.rounded(factors), strict=True):
        assert not torch.equal(before.down, after.down)
        assert after.query is not None
        assert after.output is not None


def test_steps_go_with_the_root_of_the_loss(student, factors, state_file, monkeypatch):
    """Of the first step every element has the size of the rate."""

    def moved(loss):
        monkeypatch.setattr(training, "held_out_loss", lambda *_: next(losses))
        losses = iter([loss, loss / 2])
        made = student()
        before = [parameter.detach().clone() for parameter in made.parameters()]
        training.train(made, IDS[:4], IDS[4:], 1, 0, state_file())
        pairs = zip(before, made.parameters(), strict=True)
        return max(float((after - start).abs().max().detach()) for start, after in pairs)

    expected = training.LEARNING_RATE / training.WARM_UP
    assert moved(1.0) == pytest.approx(expected, rel=1e-2)
    assert moved(0.09) == pytest.approx(0.3 * expected, rel=1e-2)


def test_frozen_weights_stay(student, factors, state_file):
    made = student(train_weights=False)
    training.train(made, IDS[:4], IDS[4:], 3, 0, state_file())
    assert all(layer.query is layer.output is None for layer in made.rounded(factors))


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({"held_out_loss": (1.0, 2.5)}, 10),
        ({"held_out_loss": (1.0, math.nan)}, 10),
        ({"_step": (math.nan,)}, 1),
    ],
    ids=["worse", "nan when held out", "nan when trained"],
)
def test_what_diverges_ends_with_what_was_best(
    changes, steps, student, factors, state_file, monkeypatch, caplog
):
    for name, losses in changes.items():
        found = iter(losses)
        monkeypatch.setattr(training, name, lambda *_, found=found: next(found))
    made = student()
    with caplog.at_level(logging.WARNING):
        found = training.train(made, IDS[:4], IDS[4:], 40, 0, state_file())
    assert found.steps == steps
    assert f"diverges at step {steps} " in caplog.text
    assert found.loss_after == found.loss_before
    for before, after in zip(factors, made.rounded(factors), strict=True):
        torch.testing.assert_close(after.down, before.down)


def test_resumed_training_ends_with_the_same_bits(student, factors, state_file, monkeypatch):
    whole = student()
    expected = training.train(whole, IDS[:4], IDS[4:], 12, 0, state_file())
    monkeypatch.setattr(state, "SECONDS", 0.0)
    step, interrupted = training._step, student()

    def stop(*args):
        if len(steps_made) == 7:
            raise KeyboardInterrupt
        steps_made.append(None)
        return step(*args)

    steps_made: list[None] = []
    monkeypatch.setattr(training, "_step", stop)
    with pytest.raises(KeyboardInterrupt):
        training.train(interrupted, IDS[:4], IDS[4:], 12, 0, state_file())
    monkeypatch.setattr(training, "_step", step)
    resumed = student()
    assert training.train(resumed, IDS[:4], IDS[4:], 12, 0, state_file()) == expected
    for a, b in zip(whole.rounded(factors), resumed.rounded(factors), strict=True):
        assert torch.equal(a.down, b.down)
        assert torch.equal(a.query, b.query)
    assert state_file().load(resumed.parameters(), torch.optim.AdamW(resumed.parameters())) is None


def test_training_ends_when_it_gets_no_better(student, factors, state_file, monkeypatch, caplog):
    losses = iter([1.0, 0.9, 0.8, 0.85, 0.8, 0.81])
    monkeypatch.setattr(training, "held_out_loss", lambda *_: next(losses))
    with caplog.at_level(logging.INFO):
        found = training.train(student(), IDS[:4], IDS[4:], 60, 0, state_file())
    assert (found.steps, found.loss_before, found.loss_after) == (50, 1.0, 0.8)
    assert "ends at step 50: the held-out loss has not fallen since step 20" in caplog.text


def test_predictions_that_are_not_finite_do_not_heal(student, state_file, monkeypatch):
    monkeypatch.setattr(training, "held_out_loss", lambda *_: math.inf)
    with pytest.raises(InputError, match="--heal: the compressed model's loss is inf before"):
        training.train(student(), IDS[:4], IDS[4:], 40, 0, state_file())


@pytest.fixture
def held_out_samples_train(monkeypatch):
    """All samples: a tiny model of random weights has nothing that other text could teach."""
    kept = []

    def draw(job):
        text = draw_text(job)
        kept.append(text.held_out)
        return replace(text, training=text.held_out)

    monkeypatch.setattr(pipeline, "draw_text", draw)
    return kept


@pytest.mark.parametrize("method", ["kfac", "recalkv", "palu", "svd"])
def test_healed_checkpoint(make_model, tmp_path, method, held_out_samples_train):
    """Of every method: what is written predicts as what was trained did."""
    base = make_model("llama_bias", torch.float32)
    options = CompressOptions(str(base), tmp_path / "healed", 0.75, method=method, heal=40, **FEW)
    compress(options)
    (held_out,) = held_out_samples_train
    compress(replace(options, out=tmp_path / "plain", heal=0))
    config, tensors = written(tmp_path / "healed")
    unhealed, before = written(tmp_path / "plain")
    assert config.layers == unhealed.layers
    told = config.settings["healing"]
    assert (told["steps"], told["tokens"], told["weights"]) == (40, 40 * FEW["seq_len"], True)
    assert told["loss_after"] < 0.9 * told["loss_before"]
    for name in ("q", "k", "v", "o"):
        weight = f"model.layers.1.self_attn.{name}_proj.weight"
        assert not torch.equal(tensors[weight], before[weight]), name
    assert torch.equal(tensors["model.embed_tokens.weight"], before["model.embed_tokens.weight"])

    dense, healed, plain = (
        likelihoods(path, held_out) for path in (base, tmp_path / "healed", tmp_path / "plain")
    )
    for found, loss in ((healed, told["loss_after"]), (plain, told["loss_before"])):
        lost = F.kl_div(found, dense, log_target=True, reduction="sum") / held_out.numel()
        assert float(lost) == pytest.approx(loss, rel=1e-3)


def test_factors_alone_heal(make_model, tmp_path, held_out_samples_train):
    base = str(make_model("llama", torch.float32))
    options = CompressOptions(base, tmp_path / "out", 0.75, heal=40, factors_only=True, **FEW)
    compress(options)
    told = RecalkvConfig.from_hf_config(read_hf_config(tmp_path / "out")).settings["healing"]
    assert told["weights"] is False
    assert told["loss_after"] < 0.95 * told["loss_before"]
