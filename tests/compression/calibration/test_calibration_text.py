"""Who gets to see which part of the calibration text."""

from dataclasses import replace

import pytest
import torch

from recalkv_vllm.compression.calibration import calibration_text
from recalkv_vllm.compression.calibration.calibration_text import (
    HELD_OUT,
    HELD_OUT_FOR_BUDGET,
    draw_text,
)
from recalkv_vllm.compression.calibration.samples import leave_out
from recalkv_vllm.compression.check import check
from recalkv_vllm.compression.errors import InputError
from recalkv_vllm.compression.options import CompressOptions


@pytest.fixture
def job(tiny, tmp_path):
    return check(CompressOptions(str(tiny), tmp_path / "out", 0.5, heal=20, num_samples=8))


@pytest.fixture
def drawn(monkeypatch):
    """``drawn(found)``: the text has so many samples, which are numbered; the numbers asked for."""

    def make(found):
        asked = []

        def draw(model, options, dtype, device, num_samples):
            asked.append(num_samples)
            return torch.arange(min(found, num_samples))[:, None]

        monkeypatch.setattr(calibration_text, "draw", draw)
        return asked

    return make


@pytest.mark.parametrize(("found", "held_out"), [(9, 1), (10, 2), (16, 4), (60, 4)], ids=str)
def test_held_out_samples_are_fresh(job, drawn, found, held_out):
    """And so are those to train on, as far as there are any."""
    asked = drawn(found)
    text = draw_text(job)
    assert asked == [8 + 20 + HELD_OUT]
    assert text.factoring.flatten().tolist() == list(range(8))
    assert text.held_out.flatten().tolist() == list(range(8, 8 + held_out))
    expected = [*range(8 + held_out, min(found, 32)), *range(8)][:20]
    assert text.training.flatten().tolist() == expected


@pytest.mark.parametrize(("found", "held_out"), [(2, 1), (7, 1), (8, 2), (60, 4)], ids=str)
def test_factoring_without_text(job, drawn, found, held_out):
    asked = drawn(found)
    text = draw_text(check(replace(job.options, method="svd")))
    assert asked == [20 + HELD_OUT]
    assert len(text.factoring) == 0
    assert text.held_out.flatten().tolist() == list(range(held_out))
    assert text.training.flatten().tolist() == list(range(held_out, min(found, 24)))


@pytest.mark.parametrize("heal", [0, 20])
def test_more_is_held_out_for_a_budget_of_loss(job, drawn, heal):
    asked = drawn(100)
    text = draw_text(check(replace(job.options, compression=None, max_loss=0.1, heal=heal)))
    assert asked == [8 + heal + HELD_OUT_FOR_BUDGET]
    held_out = (8 + heal + HELD_OUT_FOR_BUDGET) // 4
    assert text.held_out.flatten().tolist() == list(range(8, 8 + held_out))
    assert text.training.flatten().tolist() == list(range(8 + held_out, 8 + held_out + heal))


@pytest.mark.parametrize(("method", "wanted"), [("kfac", [8]), ("svd", [])])
def test_nothing_is_held_out_for_nothing(job, drawn, method, wanted):
    asked = drawn(60)
    text = draw_text(check(replace(job.options, heal=0, method=method)))
    assert asked == wanted
    assert len(text.factoring) == sum(wanted)
    assert len(text.training) == len(text.held_out) == 0


@pytest.mark.parametrize("found", [1, 8])
def test_all_text_is_factored_on(job, drawn, found):
    drawn(found)
    with pytest.raises(InputError, match=f"found {found} and 0 of that kind; give more text"):
        draw_text(job)


def test_only_statistics_see_which_tokens_are_left_out(job, monkeypatch):
    samples = torch.stack([leave_out(torch.full((4,), row)) for row in range(40)])
    monkeypatch.setattr(calibration_text, "draw", lambda *_: samples)
    text = draw_text(job)
    assert (text.factoring < 0).all()
    assert (text.training >= 0).all()
    assert (text.held_out >= 0).all()
