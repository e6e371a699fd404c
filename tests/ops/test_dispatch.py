from __future__ import annotations

import logging
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from recalkv_vllm import ops
from recalkv_vllm.ops import KernelUnavailableError, cpu, dispatch, reference
from recalkv_vllm.ops.cpu import extension
from recalkv_vllm.ops.cpu.plan import DTYPES, instruction_set, instruction_sets
from tests.ops.cases import build, spanned

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("RECALKV_KERNEL", raising=False)
    monkeypatch.delenv("RECALKV_CPU_ISA", raising=False)
    dispatch._choose.cache_clear()
    dispatch._log_once.cache_clear()
    yield
    dispatch._choose.cache_clear()


def test_cpu_tensors_run_in_cpp() -> None:
    assert dispatch.implementation(CPU, torch.bfloat16, 128) is cpu


def test_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECALKV_KERNEL", "reference")
    assert dispatch.implementation(CPU, torch.bfloat16, 128) is reference


def test_forced_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECALKV_KERNEL", "fast")
    with pytest.raises(KernelUnavailableError, match=r"expected one of reference, .*found 'fast'"):
        dispatch.implementation(CPU, torch.float32, 64)


def test_forced_that_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECALKV_KERNEL", "cuda")
    with pytest.raises(KernelUnavailableError, match="RECALKV_KERNEL=cuda: no kernel for float32"):
        dispatch.implementation(CPU, torch.float32, 64)


def test_forced_isa_of_another_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECALKV_CPU_ISA", "neon")
    with pytest.raises(KernelUnavailableError, match=r"RECALKV_CPU_ISA: .* avx2.* found 'neon'"):
        dispatch.implementation(CPU, torch.float32, 64)


def test_forced_isa_is_for_dtypes_that_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    sets = torch.ops.recalkv_cpu.instruction_sets
    for isa in instruction_sets():
        monkeypatch.setenv("RECALKV_CPU_ISA", isa)
        for dtype in DTYPES:
            expected = isa if isa in sets(dtype) else sets(dtype)[0]
            assert instruction_set(dtype) == expected, (isa, dtype)


def test_missing_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "load_error", "no _cpu")
    with pytest.raises(KernelUnavailableError, match=r"pip install .*RECALKV_KERNEL=reference"):
        dispatch.implementation(CPU, torch.float32, 64)


def test_gpu_without_the_cuda_extension_runs_triton(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """No nvcc, or another CUDA's, costs the CUDA kernels; one line says so."""
    pytest.importorskip("triton")
    from recalkv_vllm.kernels.heuristics import Target
    from recalkv_vllm.ops import cuda, triton

    monkeypatch.setattr(cuda.extension, "load_error", "not built")
    monkeypatch.setattr(triton, "target_of", lambda device: Target(90, 132))
    with caplog.at_level(logging.INFO, logger="recalkv_vllm"):
        assert dispatch.implementation(torch.device("cuda"), torch.bfloat16, 128) is triton
    (record,) = caplog.records
    assert record.message.endswith("not cuda: the CUDA extension cannot be loaded (not built))")


def test_unknown_device() -> None:
    with pytest.raises(KernelUnavailableError, match="float32 on meta: unknown device"):
        dispatch.implementation(torch.device("meta"), torch.float32)


def test_logs_the_choice_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="recalkv_vllm"):
        for head_dim in (64, 128, 64):
            dispatch.implementation(CPU, torch.bfloat16, head_dim)
    assert [record.message for record in caplog.records] == [
        f"recalkv kernels for bfloat16 on cpu: cpu, {cpu.describe(CPU, torch.bfloat16)} "
        "(first that runs here)"
    ]


def test_imports_neither_vllm_nor_triton() -> None:
    code = (
        "import sys, torch; from recalkv_vllm.ops import LatentLayer, bind; "
        "up = torch.ones(1, 32, 16); "
        "layer = LatentLayer(k_up=up, v_up=up, k_spans=((0, 16),), v_spans=((0, 16),), "
        "head_dim=32, scale=1.0); bind(layer).value_up(torch.ones(1, 1, 16)); "
        "print([m for m in ('vllm', 'triton', 'transformers') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr


@pytest.fixture
def bfloat16_by_default():
    """As while vLLM loads a model."""
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("kernel", ["cpu", "triton", "reference"])
def test_layers_are_bound_alike_under_any_default_dtype(
    kernel: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Factors are packed while vLLM has made the model's dtype torch's default."""
    monkeypatch.setenv("RECALKV_KERNEL", kernel)
    case = spanned("default-dtype", (4, 2, 64), 1, 32, 2, 32, batch=((1, 300), (20, 40)))
    dtype = torch.float16 if kernel == "triton" else torch.bfloat16
    # Triton's interpreter, which takes CPU tensors, is off where there is a GPU.
    on_gpu = kernel == "triton" and torch.cuda.is_available()
    inputs = build(case, dtype, "cuda" if on_gpu else "cpu")
    expected = ops.bind(inputs.layer).attend(*inputs.call)
    # Tables are remembered by the tensor that they were made from.
    layer = replace(inputs.layer, cos_sin_cache=inputs.layer.cos_sin_cache.clone())
    request.getfixturevalue("bfloat16_by_default")
    bound = ops.bind(layer)
    for got, wanted in zip(bound.attend(*inputs.call), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True)
