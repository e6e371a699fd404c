"""What ``ops.cuda`` runs where, and what it refuses."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from recalkv_vllm.band_format import BandFormat, CacheFormat
from recalkv_vllm.kernels import heuristics
from recalkv_vllm.kernels.heuristics import Target
from recalkv_vllm.latent_format import LatentFormat
from recalkv_vllm.ops import BatchLimits, KernelUnavailableError, cuda
from recalkv_vllm.ops.cuda import CudaLayer, attention, extension
from recalkv_vllm.ops.cuda.hopper import HopperAttention
from recalkv_vllm.ops.cuda.shapes import Limits
from recalkv_vllm.ops.triton.attention import TritonAttention
from recalkv_vllm.ops.triton.layer import TritonLayer
from tests.ops.band_cases import banded
from tests.ops.cases import AttentionCase, build, joint, spanned
from tests.ops.checks import assert_matches_oracle
from tests.ops.padding import PADDED_CALLS, padded_call

Configure = Callable[[int, int], None]
#: Not bfloat16: Triton's interpreter multiplies its bits as integers, up to Triton 3.9 at least.
DTYPE = torch.float16
DEVICE = "cuda" if torch.cuda.is_available() and extension.load_error is None else "cpu"
BATCH = ((1, 45), (2, 50), (1, 1), (20, 70), (9, 9))
CASE = spanned("mixed-sorted", (4, 2, 64), 1, 32, 2, 32, batch=BATCH)


def bind(case: AttentionCase, **changes: object) -> CudaLayer | TritonLayer:
    inputs = build(case, DTYPE, DEVICE)
    return cuda.bind(replace(inputs.layer, **changes))


#: A GPU without the extension: CUDA C++ is emulated on the CPU, where compiled Triton cannot run.
needs_triton = pytest.mark.skipif(
    DEVICE == "cpu" and torch.cuda.is_available(), reason="needs the CUDA extension"
)


@pytest.fixture
def calls(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that run, both kinds free to."""
    monkeypatch.delenv("RECALKV_KERNEL")
    made: list[str] = []
    decode, prefill = attention.DecodeAttention.run, TritonAttention.launches

    def run(self, *arguments, **keywords):
        made.append("cuda")
        return decode(self, *arguments, **keywords)

    def launches(self, *arguments, **keywords):
        made.append("triton")
        return prefill(self, *arguments, **keywords)

    monkeypatch.setattr(attention.DecodeAttention, "run", run)
    monkeypatch.setattr(TritonAttention, "launches", launches)
    return made


@needs_triton
@pytest.mark.parametrize(
    ("hints", "expected"),
    [
        ({}, ["cuda"]),
        ({"num_decodes": 3, "num_decode_tokens": 4, "max_decode_query_len": 2}, ["cuda", "triton"]),
        ({"num_decodes": 5, "num_decode_tokens": 33, "max_seq_len": 70}, ["cuda"]),
    ],
)
def test_mixed_batch(hints: dict[str, int], expected: list[str], calls: list[str]) -> None:
    result = bind(CASE).attend(*build(CASE, DTYPE, DEVICE).change(**hints).call)
    assert calls == expected
    assert_matches_oracle(result, CASE, DTYPE)


@needs_triton
def test_prefill_without_hints_is_tritons(calls: list[str]) -> None:
    case = spanned("prefill-only", (4, 2, 64), 1, 32, 2, 32, batch=((33, 33), (2, 20)))
    result = bind(case).attend(*build(case, DTYPE, DEVICE).call)
    assert calls == ["triton"]
    assert_matches_oracle(result, case, DTYPE)


#: Spans that Triton takes tiles of 64 tokens for on sm_90, and ones that it has only 32 for.
NARROW = spanned("narrow", (4, 2, 64), 1, 32, 2, 32, batch=((1, 45), (1, 50)))
WIDE = spanned("wide", (4, 2, 64), 2, 512, 1, 512, batch=((1, 45), (1, 50)))


@needs_triton
@pytest.mark.parametrize("forced", [False, True])
@pytest.mark.parametrize(
    ("case", "arch", "expected"),
    [(NARROW, 80, "cuda"), (NARROW, 90, "triton"), (WIDE, 80, "cuda"), (WIDE, 90, "cuda")],
    ids=str,
)
def test_preferred_kernel_decodes(
    case: AttentionCase,
    arch: int,
    expected: str,
    forced: bool,
    calls: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By compute capability and spans; a forced one always."""
    if forced:
        monkeypatch.setenv("RECALKV_KERNEL", "cuda")
    layer = bind(case)
    if layer.triton is not None:
        layer.triton.planner.target = Target(arch, 132)
    result = layer.attend(
        *build(case, DTYPE, DEVICE).change(num_decodes=2, num_decode_tokens=2).call
    )
    assert calls == ["cuda" if forced else expected]
    assert_matches_oracle(result, case, DTYPE)


HOPPER = spanned("hopper", (4, 2, 64), 1, 32, 2, 32, batch=((1, 45), (1, 50)))
BANDS = banded(
    joint("hopper-bands", (4, 2, 64), 1, 64, batch=((1, 45), (1, 50))), *[((32, 6), (32, 3))] * 2
)
PAIRS = replace(WIDE, name="hopper-pairs")
WIDEST = spanned("hopper-widest", (4, 2, 64), 1, 512, 2, 512, batch=((1, 45),))


@needs_triton
@pytest.mark.parametrize("forced", [False, True])
@pytest.mark.parametrize(
    ("case", "kernel"),
    [(HOPPER, HopperAttention), (BANDS, HopperAttention), (PAIRS, None), (WIDEST, None)],
    ids=str,
)
def test_hopper_has_a_kernel_of_its_own(
    case: AttentionCase,
    kernel: type | None,
    forced: bool,
    calls: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """For K groups of one head whose tiles fit; it is the one that decodes."""
    monkeypatch.setattr(heuristics, "target_of", lambda device: Target(90, 132))
    if forced:
        monkeypatch.setenv("RECALKV_KERNEL", "cuda")
    layer = bind(case)
    assert type(layer.decode) is (kernel or attention.DecodeAttention)
    inputs = build(case, DTYPE, DEVICE)
    decodes = len(inputs.q)
    result = layer.attend(*inputs.change(num_decodes=decodes, num_decode_tokens=decodes).call)
    assert calls[0] == "cuda"
    assert_matches_oracle(result, case, DTYPE)


@pytest.mark.parametrize("forced", [False, True])
def test_log_says_what_decodes(forced: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heuristics, "target_of", lambda device: Target(90, 132))
    monkeypatch.delenv("RECALKV_KERNEL", raising=False)
    if forced:
        monkeypatch.setenv("RECALKV_KERNEL", "cuda")
    where = "" if forced else " where it is the faster one"
    said = cuda.describe(torch.device("cuda"), DTYPE)
    assert said == f"CUDA C++ for decode{where} on sm_90, Triton for the rest"


def test_empty_batch(configure: Configure) -> None:
    inputs = build(CASE, DTYPE, DEVICE)
    inputs = inputs.change(
        q=inputs.q[:0],
        block_table=inputs.batch.block_table[:0],
        seq_lens=inputs.batch.seq_lens[:0],
        query_start_loc=torch.zeros(1, device=DEVICE).int(),
    )
    o_lat, lse = bind(CASE).attend(*inputs.call)
    assert o_lat.shape == (0, 4, 32)
    assert lse.shape == (0, 4)


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("name", PADDED_CALLS)
def test_rows_of_no_sequence_are_cleared(
    name: str, cut: bool, cutting: Callable[[bool], None]
) -> None:
    """By the kernels, in outputs and a workspace that start as NaN."""
    cutting(cut)
    case, inputs = padded_call(name, DTYPE, DEVICE)
    layer = cuda.bind(inputs.layer)
    chosen = layer.decode.choose(len(inputs.q), len(case.batch), 8, 1024)
    assert (chosen.cut is not None) == cut
    assert_matches_oracle(layer.attend(*inputs.call), case, DTYPE)


def test_rows_without_a_sequence(configure: Configure) -> None:
    inputs = build(CASE, DTYPE, DEVICE)
    inputs = inputs.change(
        block_table=inputs.batch.block_table[:0],
        seq_lens=inputs.batch.seq_lens[:0],
        query_start_loc=torch.zeros(1, device=DEVICE).int(),
    )
    o_lat, lse = bind(CASE).attend(*inputs.call)
    assert o_lat.eq(0).all()
    assert lse.eq(-torch.inf).all()


def test_misaligned_cache_is_refused(configure: Configure) -> None:
    inputs = build(CASE, DTYPE, DEVICE)
    blocks, size, rank = inputs.kv_cache.shape
    storage = torch.zeros(blocks, size, rank + 4, dtype=DTYPE, device=DEVICE)
    layer = bind(CASE)
    for view in (
        storage[..., :rank],
        storage.view(-1)[4:][: blocks * size * rank].view(blocks, size, rank),
    ):
        with pytest.raises(ValueError, match="kv_cache: expected 16-byte aligned rows, found"):
            layer.attend(inputs.q, view, inputs.batch)


def random_table() -> torch.Tensor:
    return torch.randn(1024, 64, generator=torch.Generator().manual_seed(0)).to(DEVICE)


def test_table_of_no_rotations(
    configure: Configure, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Refused when forced; else Triton serves the layer and the log says so."""
    with pytest.raises(KernelUnavailableError, match="RECALKV_KERNEL=cuda: cos_sin_cache"):
        bind(CASE, cos_sin_cache=random_table())
    monkeypatch.delenv("RECALKV_KERNEL")
    with caplog.at_level(logging.WARNING, "recalkv_vllm.ops"):
        assert isinstance(bind(CASE, cos_sin_cache=random_table()), TritonLayer)
    assert "cos_sin_cache: expected angles proportional to the position" in caplog.text


@pytest.mark.parametrize(
    ("latent_format", "name"),
    [(LatentFormat("int8"), "int8"), (BandFormat(((32, 6), (32, 3)) * 2), "bands")],
)
def test_quantized_latents(
    latent_format: CacheFormat,
    name: str,
    configure: Configure,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with pytest.raises(KernelUnavailableError, match=rf"latent_format: .* {name}"):
        bind(CASE, latent_format=latent_format)
    monkeypatch.delenv("RECALKV_KERNEL")
    with caplog.at_level(logging.WARNING, "recalkv_vllm.ops"):
        assert isinstance(bind(CASE, latent_format=latent_format), TritonLayer)
    assert f"latent_format: expected None, found {name}" in caplog.text


def test_spans_that_fit_no_plan(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "device_limits", lambda device: Limits(6, 8 << 10, 8 << 10))
    with pytest.raises(KernelUnavailableError, match="k_spans, v_spans: expected widths that fit"):
        bind(CASE)


def test_kernel_and_plan_must_agree(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layout that differs between Python and C++ never reaches the device."""
    layer = bind(CASE)
    for tiles, (plan, columns) in layer.decode.plans.items():
        changed = replace(plan, shared_bytes=plan.shared_bytes + 16)
        layer.decode.plans[tiles] = changed, columns
    with pytest.raises(RuntimeError, match="shared_bytes: does not agree"):
        layer.attend(*build(CASE, DTYPE, DEVICE).call)


def test_workspace_covers_every_batch(configure: Configure) -> None:
    layer = bind(CASE)
    limits = BatchLimits(num_heads=4, num_seqs=8, decode_query_len=4, seq_len=2048, num_tokens=64)
    reserved = layer.decode.workspace_bytes(limits)
    used = []
    for seqs in range(1, 9):
        for queries in range(1, 5):
            cut = layer.decode.choose(seqs * queries, seqs, 4, 2048).cut
            used.append(0 if cut is None else 4 * cut.bounds.capacity * 2 * cut.rows * 33)
    assert max(used) == reserved > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_reasons() -> None:
    reason = cuda.unsupported_reason(torch.device("cuda"), DTYPE, 128)
    assert reason is not None
    assert "the CUDA extension cannot be loaded" in reason


def test_reason_names_expected_and_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "load_error", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    device = torch.device("cuda")
    assert cuda.unsupported_reason(device, DTYPE, 128) is None
    assert cuda.unsupported_reason(device, DTYPE, None) is None
    assert cuda.unsupported_reason(device, DTYPE, 80) == (
        "expected a head size of 64, 96, 128, found 80"
    )
    assert "found torch.float32" in str(cuda.unsupported_reason(device, torch.float32, 64))
    assert "found cpu" in str(cuda.unsupported_reason(torch.device("cpu"), DTYPE, 64))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "8.0 or newer, found 7.5" in str(cuda.unsupported_reason(device, DTYPE, 64))
    assert CudaLayer.value_up is TritonLayer.value_up
