"""What is launched instead of a kernel that spills."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recalkv_vllm.kernels import heuristics
from recalkv_vllm.ops.triton import spills
from recalkv_vllm.ops.triton.launch import Launch
from recalkv_vllm.ops.triton.spills import SpillFree
from tests.kernels.test_layout import shapes


@given(
    shape=shapes(),
    arch=st.sampled_from((80, 89, 90, 100)),
    queries=st.sampled_from((1, 4, 64)),
)
def test_leaner_attention_is_the_same_grid_and_fits(
    shape: heuristics.AttentionShape, arch: int, queries: int
) -> None:
    target = heuristics.Target(arch, 100)
    config = heuristics.attention_config(shape, target, queries)
    leaner = list(heuristics.leaner_attention(shape, config, target))
    assert leaner[0] == config
    assert len(set(leaner)) == len(leaner)
    for each in leaner:
        free = ("stages", "stream", "local_rope", "late_values")
        assert replace(config, **{name: getattr(each, name) for name in free}) == each
        assert each.stream or not each.late_values
        assert heuristics.shared_memory(shape, each, target) <= target.shared_bytes
        assert each.stages <= config.stages
        assert each.local_rope <= config.local_rope
        assert each.stream == config.stream or config.heads == 1
        assert each.stream == 0 or shape.k_width % each.stream == 0


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_leaner_reconstruction_is_the_same_grid(dim: int) -> None:
    target = heuristics.Target(90, 132)
    config = heuristics.reconstruction_config(dim, 2, 64, False, target)
    leaner = list(heuristics.leaner_reconstruction(config))
    assert leaner[0] == config
    assert {each.tile for each in leaner} == {config.tile}
    assert {each.stream for each in leaner} == {config.stream, config.stream // 2}
    assert leaner[-1].stages == 1


def launch(stages: int) -> Launch:
    return Launch(None, (1,), {}, stages=stages)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Stages of what was compiled; one, two and three spill 4, 2 and 9 registers, five none."""
    stages: list[int] = []

    def spilled(launch: Launch) -> int:
        stages.append(launch.stages)
        return {1: 4, 2: 2, 3: 9, 5: 0}[launch.stages]

    monkeypatch.setattr(spills, "INTERPRETED", False)
    monkeypatch.setattr(Launch, "spills", spilled)
    return stages


def test_first_that_does_not_spill_is_launched(compiled: list[int]) -> None:
    assert SpillFree[int]().launch("kernel", (3, 5, 1), launch) == launch(5)
    assert compiled == [3, 5]


def test_kernels_are_compiled_for_their_spills_once(compiled: list[int]) -> None:
    spill_free = SpillFree[int]()
    for _ in range(2):
        assert spill_free.launch("kernel", (3, 5, 1), launch) == launch(5)
    assert compiled == [3, 5]
    assert spill_free.launch("other", (5,), launch) == launch(5)
    assert compiled == [3, 5, 5]


def test_the_least_spills_are_launched_and_told_of(
    compiled: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    spills._warn.cache_clear()
    with caplog.at_level(logging.WARNING, logger=spills.__name__):
        for _ in range(2):  # layers
            assert SpillFree[int]().launch("kernel", (3, 2, 1), launch) == launch(2)
    assert [record.getMessage() for record in caplog.records] == ["2 registers spilled with 2"]


def test_interpreter_launches_the_first_without_compiling(
    compiled: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spills, "INTERPRETED", True)
    assert SpillFree[int]().launch("kernel", (3, 5), launch) == launch(3)
    assert not compiled
