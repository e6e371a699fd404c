"""Training gets better, and never makes things worse."""

import logging
import math

import pytest
import torch

from recalkv_vllm.compression.errors import InputError
from recalkv_vllm.compression.healing import state, training
from tests.compression.healing.conftest import FORMATS, IDS


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
