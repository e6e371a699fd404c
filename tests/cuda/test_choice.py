"""Which kernel decodes a layer: the one that is measured to be faster. Times are made up here."""

from __future__ import annotations

import json
import logging
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from recalkv_vllm import ops
from recalkv_vllm.ops import BatchLimits, checked, cuda, triton
from recalkv_vllm.ops.cuda import CudaLayer, choice, identity, times, timing
from recalkv_vllm.ops.cuda.trial import MOST_BYTES, Slot, Trial
from tests.cuda.test_binding import CASE, DEVICE, DTYPE, Configure, needs_triton
from tests.ops.cases import build

pytestmark = needs_triton
LIMITS = BatchLimits(num_heads=4, num_seqs=3, decode_query_len=2, seq_len=40, num_tokens=64)


@dataclass
class Stopwatch:
    """Runs what it times, and gives the times that it is told: CUDA C++ first, then Triton."""

    cuda: float = 1.0
    triton: float = 2.0
    timed: int = 0

    def __call__(self, call: Callable[[], object]) -> float:
        call()
        self.timed += 1
        return self.cuda if self.timed % 2 else self.triton


@pytest.fixture
def stopwatch(configure: Configure, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Stopwatch:
    """What times a device that can be asked, for which Triton is predicted to be faster."""
    made = Stopwatch()
    monkeypatch.delenv("RECALKV_KERNEL")
    monkeypatch.setenv("RECALKV_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(choice, "timer_of", lambda device: made)
    monkeypatch.setattr(identity, "device_name", lambda device: "NVIDIA Test, 9.0")
    monkeypatch.setattr(cuda.CudaLayer, "_predicted", lambda *_: False)
    start_anew(monkeypatch)
    return made


def start_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget what a process knows."""
    monkeypatch.setattr(times, "_known", {})
    choice._log_once.cache_clear()


def decodes(limits: BatchLimits = LIMITS, **changes: object) -> bool:
    """Whether CUDA C++ decodes a layer that is bound anew."""
    layer = cuda.bind(replace(build(CASE, DTYPE, DEVICE).layer, **changes))
    layer.reserve(limits)
    return layer.decodes(limits.num_heads, limits.decode_query_len)


def nothing() -> dict[str, Callable[[], object]]:
    """Two kernels that take no time."""
    return {"cuda": lambda: None, "triton": lambda: None}


@pytest.mark.parametrize(("cuda_ms", "triton_ms"), [(1.0, 2.0), (2.0, 1.0)])
def test_the_faster_one_decodes(
    cuda_ms: float,
    triton_ms: float,
    stopwatch: Stopwatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    stopwatch.cuda, stopwatch.triton = cuda_ms, triton_ms
    name = "CUDA C++" if cuda_ms < triton_ms else "Triton"
    with caplog.at_level(logging.INFO, "recalkv_vllm.ops"):
        assert decodes() == (cuda_ms < triton_ms)
        assert decodes() == (cuda_ms < triton_ms)
    assert [record.getMessage() for record in caplog.records] == [
        "recalkv: decode of 2 queries by 4 heads, 2 KV heads in K groups of 1, spans of 32 and 32 "
        f"columns: {name} (measured: CUDA C++ {cuda_ms:.3f} ms, Triton {triton_ms:.3f} ms)"
    ]


def test_one_measurement_for_equal_layers(stopwatch: Stopwatch) -> None:
    layer = build(CASE, DTYPE, DEVICE).layer
    decodes()
    decodes(k_up=layer.k_up + 1)
    assert stopwatch.timed == 2
    decodes(sliding_window=16)
    assert stopwatch.timed == 4
    decodes(replace(LIMITS, decode_query_len=1))
    assert stopwatch.timed == 6


def test_measured_once_for_all_processes(
    stopwatch: Stopwatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert decodes()
    start_anew(monkeypatch)
    assert decodes()
    assert stopwatch.timed == 2


@pytest.mark.parametrize("part", ["device", "torch", "triton", "recalkv"])
def test_another_device_or_version_is_measured_anew(
    part: str, stopwatch: Stopwatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    decodes()
    if part == "device":
        monkeypatch.setattr(identity, "device_name", lambda device: "NVIDIA Other, 9.0")
    else:
        changed = {**identity.versions(), part: "0"}
        monkeypatch.setattr(identity, "versions", lambda: changed)
    decodes()
    assert stopwatch.timed == 4


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:-5],
        lambda text: "\0",
        lambda text: "[]",
        lambda text: json.dumps({**json.loads(text), "key": "another layer's"}),
        lambda text: json.dumps({**json.loads(text), "milliseconds": {"cuda": 1}}),
        lambda text: json.dumps({**json.loads(text), "milliseconds": {"cuda": -1, "triton": 1}}),
    ],
    ids=["cut off", "no text", "no object", "foreign", "one kernel", "negative"],
)
def test_damaged_or_foreign_file_is_measured_anew(
    damage: Callable[[str], str],
    stopwatch: Stopwatch,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    measured = times.decode_times("layer", stopwatch, nothing)
    path = times.times_file("layer")
    whole = path.read_text()
    path.write_text(damage(whole))
    start_anew(monkeypatch)
    assert times.decode_times("layer", stopwatch, nothing) == measured
    assert stopwatch.timed == 4
    assert path.read_text() == whole
    assert list(path.parent.iterdir()) == [path]


def test_folder_that_cannot_be_written_is_a_warning(
    stopwatch: Stopwatch,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("RECALKV_CACHE", str(tmp_path / "file"))
    for timed in (2, 4):
        for _ in range(2):
            assert times.decode_times("layer", stopwatch, nothing) == {"cuda": 1, "triton": 2}
            assert stopwatch.timed == timed
        assert "recalkv: times of kernels are not kept in RECALKV_CACHE: " in caplog.text
        start_anew(monkeypatch)


@pytest.mark.parametrize("forced", ["cuda", "triton"])
def test_a_forced_kernel_measures_nothing(
    forced: str, stopwatch: Stopwatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RECALKV_KERNEL", forced)
    module = {"cuda": cuda, "triton": triton}[forced]
    module.bind(build(CASE, DTYPE, DEVICE).layer).reserve(LIMITS)
    assert stopwatch.timed == 0


@pytest.mark.parametrize("capturing", [False, True])
def test_only_a_gpu_that_captures_nothing_is_asked(
    capturing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    assert (timing.timer_of(torch.device("cuda", 0)) is None) == capturing
    assert timing.timer_of(torch.device("cpu")) is None


class Event:
    """One of a device on which the calls that were made take this many milliseconds each."""

    DURATIONS = (50, 50, 50, 9, 3, 1, 3, 3, 3, 1, 3, 40, 3)
    calls = 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = sum(self.DURATIONS[: Event.calls])

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: Event) -> float:
        return end.at - self.at


def test_median_of_calls_without_those_that_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "_sleep", lambda clocks: None)
    monkeypatch.setattr(Event, "calls", 0)

    def call() -> None:
        Event.calls += 1

    assert timing.milliseconds(torch.device("cuda"), call) == 3
    assert Event.calls == len(Event.DURATIONS)


@pytest.mark.parametrize("predicted", [False, True])
def test_else_the_cost_model_decides(
    predicted: bool,
    stopwatch: Stopwatch,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(choice, "timer_of", lambda device: None)
    monkeypatch.setattr(CudaLayer, "_predicted", lambda *_: predicted)
    with caplog.at_level(logging.INFO, "recalkv_vllm.ops"):
        assert decodes() == predicted
    name = "CUDA C++" if predicted else "Triton"
    assert f"{name} (predicted; the device cannot be asked now)" in caplog.text
    assert stopwatch.timed == 0


def test_no_memory_to_measure_in(stopwatch: Stopwatch, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(call: Callable[[], object]) -> float:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(choice, "timer_of", lambda device: full)
    assert not decodes()


def test_memory_is_free_again(stopwatch: Stopwatch, monkeypatch: pytest.MonkeyPatch) -> None:
    caches: list[weakref.ref[torch.Tensor]] = []
    decode_heads = CudaLayer._decode_heads

    def noting(self, q, kv_cache, batch, heads):
        caches.append(weakref.ref(kv_cache))
        return decode_heads(self, q, kv_cache, batch, heads)

    monkeypatch.setattr(CudaLayer, "_decode_heads", noting)
    decodes()
    assert [cache() for cache in caches] == [None]


def test_new_weights_are_served_by_the_same_kernel(
    stopwatch: Stopwatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checked, "implementation", lambda *_: cuda)
    layer = build(CASE, DTYPE, DEVICE).layer
    bound = ops.bind(layer)
    bound.reserve(LIMITS)
    for captured in (False, True):
        bound.rebind(replace(layer, k_up=layer.k_up.clone()), captured=captured)
        assert bound._bound.decodes(4, 2)
    assert stopwatch.timed == 2


@pytest.mark.parametrize(
    ("limits", "num_seqs", "tokens"),
    [
        (BatchLimits(32, 256, 1, 1 << 17, 8192), 32, 4096),
        (BatchLimits(32, 5, 1, 100, 8192), 5, 100),
        (BatchLimits(32, 256, 4, 100, 31), 7, 100),
        (BatchLimits(32, 256, 4, 100, 2), 1, 100),
    ],
)
def test_trial_is_within_limits(limits: BatchLimits, num_seqs: int, tokens: int) -> None:
    trial = Trial.of(Slot(1024, torch.bfloat16), limits)
    assert (trial.num_seqs, trial.tokens) == (num_seqs, tokens)
    wide = Trial.of(Slot(8192, torch.bfloat16), limits)
    assert wide.num_seqs * -(-tokens // 16) * 16 * 8192 * 2 <= MOST_BYTES
