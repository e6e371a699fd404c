"""A budget of loss: the largest compression within it, and the loss that evaluation finds."""

import logging
import math
import re

import pytest
import torch

from recalkv_vllm.checkpoint import RecalkvConfig, read_hf_config
from recalkv_vllm.compression import loss_budget, pipeline
from recalkv_vllm.compression.calibration.calibration_text import draw_text
from recalkv_vllm.compression.check import LOSS_BUDGET_COMPRESSIONS, check
from recalkv_vllm.compression.errors import InputError
from recalkv_vllm.compression.loss_budget import most_compressed, reachable_compressions
from recalkv_vllm.compression.options import CompressOptions
from recalkv_vllm.compression.pipeline import compress
from recalkv_vllm.evaluation import transformers_engine
from recalkv_vllm.evaluation.perplexity import describe_losses

#: On what it writes itself, no model can do better than the dense one.
FEW = {"num_samples": 16, "seq_len": 128, "datasets": ("self",)}
BUDGET = 0.05


@pytest.mark.parametrize("count", [1, 2, 7, 99])
def test_the_largest_compression_within_is_found(count):
    compressions = LOSS_BUDGET_COMPRESSIONS[:count]
    for largest in compressions:
        tried = []

        def attempt(compression, tried=tried):
            tried.append(compression)
            return f"made at {compression}", compression**2

        found = most_compressed(largest**2, compressions, attempt)
        assert found == f"made at {largest}"
        assert len(tried) <= math.ceil(math.log2(count + 1))


@pytest.mark.parametrize("loss", [0.5, math.inf, math.nan])
def test_nothing_is_within(loss):
    message = f"--max-loss 0.1: expected .*, found {loss:.4f} nats at 1%"
    with pytest.raises(InputError, match=message):
        most_compressed(0.1, LOSS_BUDGET_COMPRESSIONS, lambda compression: ("made", loss))


def test_every_try_is_told(caplog):
    with caplog.at_level(logging.INFO):
        most_compressed(0.4, (0.1, 0.2, 0.3), lambda compression: ("made", 2 * compression))
    assert [record.getMessage() for record in caplog.records] == [
        "--max-loss 0.4: 20 % removed: loss 0.4000 nats, within",
        "--max-loss 0.4: 30 % removed: loss 0.6000 nats, above",
    ]


@pytest.mark.parametrize(
    ("options", "least", "largest"),
    [
        ({"latent_dtype": "bf16"}, 0.01, 0.87),
        # Four bits and a scale for every 32 elements remove 71 % at full rank.
        ({"latent_dtype": "int4"}, 0.71, 0.96),
        ({"method": "recalkv", "k_group_size": 1}, 0.01, 0.37),
    ],
    ids=["kfac", "int4", "recalkv"],
)
def test_compressions_that_are_tried(tiny, tmp_path, options, least, largest):
    job = check(CompressOptions(str(tiny), tmp_path / "out", max_loss=0.1, **options))
    found = reachable_compressions(job)
    assert (found[0], found[-1]) == (least, largest)
    assert found == [round(least + i / 100, 2) for i in range(len(found))]


@pytest.mark.parametrize(
    "options",
    [{"method": "palu"}, {"latent_dtype": "int8"}, {"heal": 12}, {"factors_only": True}],
    ids=["palu", "kfac int8", "healed", "factors"],
)
def test_what_is_written_loses_what_was_measured(
    make_model, tmp_path, options, monkeypatch, caplog
):
    base, out = make_model("llama_bias", torch.float32), tmp_path / "out"
    held_out, calibrations = [], []

    def draw(job):
        text = draw_text(job)
        held_out.append(text.held_out)
        return text

    def calibrate(*args, calibrate=pipeline.calibrate):
        calibrations.append(args)
        return calibrate(*args)

    monkeypatch.setattr(pipeline, "draw_text", draw)
    monkeypatch.setattr(pipeline, "calibrate", calibrate)
    with caplog.at_level(logging.INFO, loss_budget.__name__):
        result = compress(CompressOptions(str(base), out, max_loss=BUDGET, **FEW, **options))
    assert len(calibrations) == 1
    told = re.findall(r"([0-9]+) % removed: loss (\S+) nats, (\w+)", caplog.text)
    within = {int(percent): float(loss) for percent, loss, what in told if what == "within"}
    above = [int(percent) for percent, _, what in told if what == "above"]
    config = RecalkvConfig.from_hf_config(read_hf_config(out))
    assert config.compression == max(within) / 100
    assert min(above) == max(within) + 1
    assert config.settings["max_loss"] == BUDGET
    assert config.settings["loss"] == result["loss"] <= BUDGET
    assert result["loss"] == pytest.approx(within[max(within)], abs=1e-4)
    if "factors_only" in options:
        return
    (windows,) = held_out
    dense, compressed = (
        describe_losses(str(path), transformers_engine.score_windows(path, windows.tolist()))["nll"]
        for path in (base, out)
    )
    assert compressed - dense == pytest.approx(result["loss"], abs=1e-4)
