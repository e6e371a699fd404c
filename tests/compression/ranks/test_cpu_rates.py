"""Rates of this machine: measured once, kept, and what they choose."""

from __future__ import annotations

import pytest

from recalkv_vllm.compression.ranks import cpu_rates, targets
from recalkv_vllm.compression.ranks.cpu_rates import CpuRates


@pytest.fixture(autouse=True)
def fresh_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("RECALKV_CACHE", str(tmp_path))


def test_measured_once(monkeypatch, tmp_path):
    rates = cpu_rates.cpu_rates()
    # From a slow core to a large server.
    assert 1e9 < rates.flop_per_s < 1e15
    assert 1e8 < rates.bytes_per_s < 1e13
    monkeypatch.setattr(cpu_rates, "measure", lambda: pytest.fail("measured again"))
    assert cpu_rates.cpu_rates() == rates
    (kept,) = tmp_path.iterdir()
    monkeypatch.setattr(cpu_rates, "measure", lambda: CpuRates(2.0, 1.0))
    for broken in ("", "[]", '{"flop_per_s": 1.0}'):
        kept.write_text(broken)
        assert cpu_rates.cpu_rates() == CpuRates(2.0, 1.0)


def test_another_machine_is_measured(monkeypatch):
    monkeypatch.setattr(cpu_rates, "measure", lambda: CpuRates(2.0, 1.0))
    cpu_rates.cpu_rates()
    monkeypatch.setattr(cpu_rates, "measure", lambda: CpuRates(3.0, 1.0))
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"amx_bf16": True})
    assert cpu_rates.cpu_rates() == CpuRates(3.0, 1.0)


@pytest.mark.parametrize(
    ("amx", "flop_per_byte", "target"),
    [(False, 10, "cpu"), (False, 100, "cpu"), (True, 20, "cpu"), (True, 60, "cpu-amx")],
)
def test_what_they_choose(monkeypatch, amx, flop_per_byte, target):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"avx2": True, "amx_bf16": amx})
    monkeypatch.setattr(targets, "cpu_rates", lambda: CpuRates(flop_per_byte * 2e10, 2e10))
    assert targets.parse_target("auto") == targets.Target(target)
    monkeypatch.setattr("torch.cpu.get_capabilities", dict)
    assert targets.parse_target("auto:0.5") == targets.Target("h100", 0.5)
