"""Exploring: plans are those that ``compress`` carries out, made of one calibration."""

from dataclasses import replace
from pathlib import Path

import pytest

from recalkv_vllm.checkpoint import RecalkvConfig, read_hf_config
from recalkv_vllm.compression import explore as explore_module
from recalkv_vllm.compression.errors import InputError
from recalkv_vllm.compression.explore import explore
from recalkv_vllm.compression.options import CompressOptions
from recalkv_vllm.compression.pipeline import compress

FEW = {"num_samples": 8, "seq_len": 32}


@pytest.fixture
def options(tiny) -> CompressOptions:
    return CompressOptions(str(tiny), Path(), target="none", **FEW)


def test_expected_losses_are_those_that_compress_records(tiny, options, tmp_path, monkeypatch):
    calibrations = []

    def calibrate(*args, calibrate=explore_module.calibrate):
        calibrations.append(args)
        return calibrate(*args)

    monkeypatch.setattr(explore_module, "calibrate", calibrate)
    options = replace(options, target="cpu")
    explored = explore(options, (0.8, 0.5), ("bands", "bf16", "int4"))
    assert len(calibrations) == 1
    assert {each.job.options.k_group_size for each in explored} == {1, 2, 4}
    for index, each in enumerate(explored):
        out = tmp_path / str(index)
        compress(replace(each.job.options, out=out, output_refit=False))
        config = RecalkvConfig.from_hf_config(read_hf_config(out))
        assert config.layers == each.plan.layouts
        assert config.latent_quantization == each.plan.uniform_format
        assert config.settings["expected_loss"] == each.plan.expected_loss


def test_the_front_is_not_beaten(options):
    options = replace(options, target="cpu:1.1")
    explored = explore(options, (0.5, 0.6, 0.7, 0.8), ("bands", "bf16"))
    costs = {
        each: (each.plan.token_bytes(2), each.plan.expected_loss, each.decode_time)
        for each in explored
    }
    for each, cost in costs.items():
        beaten = any(
            other != cost and all(a <= b for a, b in zip(other, cost, strict=True))
            for other in costs.values()
        )
        assert each.on_front == (not beaten)
    assert 0 < sum(each.on_front for each in explored) < len(explored)


def test_no_device_no_decode_time(options):
    assert {each.decode_time for each in explore(options, (0.5,), ("bands",))} == {None}


def test_what_cannot_be_reached_is_left_out(options, caplog):
    with caplog.at_level("INFO", explore_module.__name__):
        explored = explore(options, (0.5, 0.82), ("bf16",))
    reached = [(each.job.compression, each.job.options.k_group_size) for each in explored]
    assert reached == [(0.5, 1), (0.5, 2), (0.5, 4), (0.82, 4)]
    own = (record for record in caplog.records if record.name == explore_module.__name__)
    told = [record.getMessage() for record in own]
    assert [line.partition(", less")[0] for line in told] == [
        f"left out: bf16, k_group_size {size}: compression 0.82: leaves 32 cached elements per "
        "token"
        for size in (1, 2)
    ]


def test_full_rank_is_left_out(options, caplog):
    """Four bits alone remove more than half; what that loses is not known."""
    with caplog.at_level("INFO", explore_module.__name__):
        explored = explore(options, (0.5, 0.8), ("int4",))
    assert {each.job.compression for each in explored} == {0.8}
    assert "compression 0.5: int4 removes more than that at full rank" in caplog.text


def test_one_plan_is_told_of_once(options):
    """Eight bits for all columns remove nearly half: a lower compression adds none."""
    explored = explore(options, (0.1, 0.2, 0.7), ("bands",))
    kept = [(each.job.compression, each.job.options.k_group_size) for each in explored]
    assert kept == [(0.2, 1), (0.2, 2), (0.2, 4), (0.7, 1), (0.7, 2), (0.7, 4)]


def test_nothing_can_be_reached(options, monkeypatch):
    monkeypatch.setattr(explore_module, "calibrate", None)  # said before that
    with pytest.raises(InputError, match=r"largest possible compression with these groups is 0\.5"):
        explore(options, (0.99,), ("bf16",))


@pytest.mark.parametrize("compression", [0.0, 1.0, -0.5, float("nan")])
def test_compressions_outside_their_range(options, compression):
    with pytest.raises(InputError, match="expected fractions above 0 and below 1"):
        explore(options, (0.5, compression), ("bands",))
