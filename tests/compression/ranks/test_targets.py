"""Targets: devices, and how long decoding may take there."""

import math

import pytest

from recalkv_vllm.compression.errors import InputError
from recalkv_vllm.compression.ranks.targets import NAMES, Target, parse_target
from recalkv_vllm.cost import CPUS, GPUS


def test_names_and_limits():
    assert parse_target("h100") == Target("h100")
    assert parse_target("h100:0.5") == Target("h100", 0.5)
    assert str(parse_target("cpu:1.25")) == "cpu:1.25"
    for name in NAMES:
        assert parse_target(name).device == (GPUS | CPUS)[name]
    assert parse_target("none").device is None


@pytest.mark.parametrize("bad", ["tpu", "64", "h100:", "h100:x", "h100:0", "h100:-1", "none:1", ""])
def test_what_is_no_target(bad):
    with pytest.raises(InputError, match=f"target '{bad}': expected auto, h100, h200, a100"):
        parse_target(bad)


@pytest.mark.parametrize("name", GPUS)
def test_limits_of_elements_on_gpus_are_on_one_line_through_two_points(name):
    at = {removed: Target(name).limit_at(removed, coded=False) for removed in (0.5, 0.75, 0.86)}
    assert at[0.5] == pytest.approx(0.67)
    assert at[0.75] == pytest.approx(0.45)
    assert (at[0.86] - at[0.75]) / 0.11 == pytest.approx((at[0.75] - at[0.5]) / 0.25)
    assert Target(name).limit_at(0.01, coded=False) == 1
    # Never less than the bytes that are left take.
    assert all(Target(name).limit_at(c / 100, coded=False) > 1 - c / 100 for c in range(1, 100))
    assert Target(name, 0.3).limit_at(0.5, coded=True) == 0.3


@pytest.mark.parametrize("name", GPUS)
def test_codes_are_to_decode_no_slower_than_the_dense_cache_on_gpus(name):
    assert all(Target(name).limit_at(removed, coded=True) == 1 for removed in (0.1, 0.5, 0.95))


def test_without_a_device_there_is_no_limit():
    assert Target().limit_at(0.5, coded=True) == math.inf


@pytest.mark.parametrize("name", CPUS)
def test_fewer_elements_are_to_save_time_on_a_cpu(name):
    limits = [Target(name).limit_at(removed, coded=False) for removed in (0.25, 0.5, 0.75, 0.9)]
    assert limits == sorted(limits, reverse=True)
    assert limits[0] < 2
