"""Healing: what is trained is what is served, it gets better, and it never makes things worse."""

import logging
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from recalkv_vllm.checkpoint import RecalkvConfig, read_hf_config
from recalkv_vllm.compression.base_model.attention import attention_modules
from recalkv_vllm.compression.calibration.calibration_pass import freeze
from recalkv_vllm.compression.check import check
from recalkv_vllm.compression.errors import InputError
from recalkv_vllm.compression.healing import heal, state, training
from recalkv_vllm.compression.healing.distillation import divergence
from recalkv_vllm.compression.healing.student import Student
from recalkv_vllm.compression.layer import LayerFactors, nested_layout
from recalkv_vllm.compression.options import CompressOptions
from recalkv_vllm.compression.pipeline import compress
from recalkv_vllm.latent_format import LatentFormat

FEW = {"num_samples": 8, "seq_len": 32}
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
    def make(latent_format=None, train_weights=True):
        model = load()
        freeze(model, gradient=True, seq_len=IDS.shape[1])
        return Student(model, load(), factors, latent_format, train_weights)

    return make


@pytest.fixture
def state_file(tmp_path):
    return lambda: state.StateFile(tmp_path / "state.safetensors")


def logits(model):
    with torch.no_grad():
        return model(IDS[:1]).logits


def likelihoods(directory, ids):
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        return model(ids).logits.log_softmax(dim=-1)


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


def test_gradients_pass_the_rounding_of_latents(student):
    rounded = student(LatentFormat("int4", 32)).layers[0].factors
    plain = student().layers[0].factors
    x = torch.randn(5, 96, generator=torch.Generator().manual_seed(2))
    weight = torch.randn(5, len(rounded.down()), generator=torch.Generator().manual_seed(3))
    for layer in (rounded, plain):
        (layer.latents(x) * weight).sum().backward()
    expected = rounded.latent_format.round_trip(plain.latents(x))
    torch.testing.assert_close(rounded.latents(x), expected)
    torch.testing.assert_close(rounded.down.unit.grad, plain.down.unit.grad)


def test_divergence_and_its_gradient(load, monkeypatch):
    monkeypatch.setattr("recalkv_vllm.compression.healing.distillation.LOGIT_CHUNK", 5)
    model = load().double()
    teacher, hidden = torch.randn(2, 12, 96, dtype=torch.float64)
    hidden.requires_grad_(True)
    found, gradient = divergence(model, teacher, hidden)
    target, predicted = (F.softmax(model.lm_head(x), dim=-1) for x in (teacher, hidden))
    expected = (target * (target / predicted).log()).sum(dim=-1).mean()
    expected.backward()
    assert found == pytest.approx(float(expected.detach()), rel=1e-4)
    torch.testing.assert_close(gradient, hidden.grad, rtol=1e-3, atol=1e-6)
    assert divergence(model, teacher, teacher)[0] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("latent_format", [None, LatentFormat("int4", 32)], ids=["plain", "int4"])
def test_training_gets_better(student, factors, state_file, latent_format, monkeypatch):
    """On random tokens there is nothing to learn but these."""
    monkeypatch.setattr(training, "LEARNING_RATE", 3e-3)
    made = student(latent_format)
    found = training.train(made, IDS, IDS[4:], 40, 0, state_file())
    assert found.steps == 40
    assert found.tokens == 40 * IDS.shape[1]
    assert found.loss_after < 0.9 * found.loss_before
    assert training._held_out_loss(made, IDS[4:]) == pytest.approx(found.loss_after, rel=1e-5)
    for before, after in zip(factors, made.rounded(factors), strict=True):
        assert not torch.equal(before.down, after.down)
        assert after.query is not None
        assert after.output is not None


def test_frozen_weights_stay(student, factors, state_file):
    made = student(train_weights=False)
    training.train(made, IDS[:4], IDS[4:], 3, 0, state_file())
    assert all(layer.query is layer.output is None for layer in made.rounded(factors))


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({"_held_out_loss": iter([1.0, 2.5]).__next__}, 5),
        ({"_step": lambda: math.nan}, 1),
    ],
    ids=["worse", "nan"],
)
def test_what_diverges_ends_with_what_was_best(
    changes, steps, student, factors, state_file, monkeypatch, caplog
):
    for name, result in changes.items():
        monkeypatch.setattr(training, name, lambda *_, result=result: result())
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


@pytest.fixture
def all_samples_train(monkeypatch):
    """The held-out ones too: a tiny model of random weights has nothing that text could teach."""
    kept = []

    draw = heal.draw_windows

    def draw_windows(job, used):
        samples, _ = draw(job, used)
        kept.append(samples[:2])
        return samples, samples[:2]

    monkeypatch.setattr(heal, "draw_windows", draw_windows)
    monkeypatch.setattr(training, "LEARNING_RATE", 1e-4)
    return kept


@pytest.mark.parametrize("method", ["kfac", "recalkv", "palu", "svd"])
def test_healed_checkpoint(make_model, tmp_path, method, all_samples_train):
    """Of every method: what is written predicts as what was trained did."""
    base = make_model("llama_bias", torch.float32)
    options = CompressOptions(str(base), tmp_path / "healed", 0.75, method=method, heal=20, **FEW)
    compress(options)
    compress(replace(options, out=tmp_path / "plain", heal=0))
    config, tensors = written(tmp_path / "healed")
    unhealed, before = written(tmp_path / "plain")
    assert config.layers == unhealed.layers
    told = config.settings["healing"]
    assert (told["steps"], told["tokens"], told["weights"]) == (20, 20 * FEW["seq_len"], True)
    assert told["loss_after"] < told["loss_before"]
    for name in ("q", "k", "v", "o"):
        weight = f"model.layers.1.self_attn.{name}_proj.weight"
        assert not torch.equal(tensors[weight], before[weight]), name
    assert torch.equal(tensors["model.embed_tokens.weight"], before["model.embed_tokens.weight"])

    (held_out,) = all_samples_train
    dense, healed, plain = (
        likelihoods(path, held_out) for path in (base, tmp_path / "healed", tmp_path / "plain")
    )
    for found, loss in ((healed, told["loss_after"]), (plain, told["loss_before"])):
        lost = F.kl_div(found, dense, log_target=True, reduction="sum") / held_out.numel()
        assert float(lost) == pytest.approx(loss, rel=1e-3)


def test_factors_alone_heal(tiny, tmp_path, all_samples_train):
    options = CompressOptions(str(tiny), tmp_path / "out", 0.5, heal=5, factors_only=True, **FEW)
    compress(options)
    told = RecalkvConfig.from_hf_config(read_hf_config(tmp_path / "out")).settings["healing"]
    assert told["weights"] is False
    assert told["loss_after"] < told["loss_before"]


@pytest.mark.parametrize(
    ("found", "used", "held_out"),
    [(2, 0, 1), (2, 1, 1), (7, 0, 1), (8, 3, 2), (16, 4, 4), (60, 8, 4)],
    ids=str,
)
def test_windows_held_out_are_fresh(tiny, tmp_path, monkeypatch, found, used, held_out):
    """And so are those to train on, as far as there are any."""
    drawn, asked = torch.arange(found)[:, None], []

    def draw(model, options, dtype, device, num_samples):
        asked.append(num_samples)
        return drawn

    monkeypatch.setattr(heal, "draw", draw)
    job = check(CompressOptions(str(tiny), tmp_path / "out", 0.5, heal=20, **FEW))
    train_on, kept = heal.draw_windows(job, drawn[:used] if used else None)
    assert asked == [used + 20 + heal.HELD_OUT]
    assert kept.flatten().tolist() == list(range(used, used + held_out))
    expected = [*range(used + held_out, found), *range(used)][:20]
    assert train_on.flatten().tolist() == expected


def test_all_text_was_used(tiny, tmp_path, monkeypatch):
    drawn = torch.arange(6)[:, None]
    monkeypatch.setattr(heal, "draw", lambda *_: drawn)
    job = check(CompressOptions(str(tiny), tmp_path / "out", 0.5, heal=20, **FEW))
    with pytest.raises(InputError, match="found 6 and 0 not used; give more text"):
        heal.draw_windows(job, drawn)
