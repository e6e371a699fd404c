"""The GPU side of the kernel benchmark, run small, with torch as the baseline: on the GPU if there
is one, else in Triton's interpreter."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from recalkv_vllm.benchmarks import kernel_gpu
from recalkv_vllm.benchmarks.geometries import Geometry, latent_of
from recalkv_vllm.benchmarks.stock_gpu import Problem, torch_attention
from recalkv_vllm.compression.errors import InputError
from recalkv_vllm.latent_format import LatentFormat
from recalkv_vllm.ops import Batch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TINY = Geometry("tiny", 4, 2, 32, 2, 1e4)


@pytest.mark.parametrize("latent_format", [None, LatentFormat("int4")], ids=str)
def test_runs_of_a_configuration(
    latent_format: LatentFormat | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RECALKV_KERNEL", "triton")
    latent = latent_of(TINY, 0.5, 1, "joint")
    build = (TINY, latent, latent_format, 40, 2)
    runs = kernel_gpu.build(*build, queries=1, dtype=torch.float32, device=DEVICE)
    assert "torch SDPA" in runs.stock
    for run in (runs.ours, runs.reference, *runs.stock.values()):
        run()
    if DEVICE == "cuda":
        return
    assert runs.calls == 2
    assert list(runs.stock) == ["torch SDPA"]
    assert "interpreted" in runs.kernel
    with pytest.raises(InputError, match=r"no stock kernel runs here .*several queries"):
        kernel_gpu.build(*build, queries=2, dtype=torch.float32, device=DEVICE)


def test_torch_baseline_attends_every_head_to_its_own_keys() -> None:
    torch.manual_seed(0)
    context, batch = 21, 3
    q = torch.randn(batch, TINY.num_heads, TINY.head_dim)
    cache = torch.randn(2, 2, batch * 2, 16, TINY.num_kv_heads, TINY.head_dim)
    sequences = Batch(
        block_table=torch.arange(batch * 2, dtype=torch.int32).view(batch, 2),
        seq_lens=torch.full((batch,), context, dtype=torch.int32),
        query_start_loc=torch.arange(batch + 1, dtype=torch.int32),
    )
    problem = Problem(TINY, q, cache, sequences, context, 1)
    for layer in range(2):
        keys, values = (x.view(batch, 32, 2, 32)[:, :context] for x in cache[layer])
        weights = torch.einsum("bhgd,bnhd->bhgn", q.view(batch, 2, 2, 32), keys) * 32**-0.5
        expected = torch.einsum("bhgn,bnhd->bhgd", weights.softmax(-1), values)
        got = torch_attention(problem)(layer)
        torch.testing.assert_close(got, expected.reshape_as(q), rtol=1e-5, atol=1e-5)


MIB, GIB = 1 << 20, 1 << 30


@pytest.mark.parametrize(
    ("dense", "latent", "total", "expected"),
    [
        (4 * MIB, 1 * MIB, 80 * GIB, 200),  # 32 caches of latents would stay in L2
        (32 * MIB, 8 * MIB, 80 * GIB, 32),
        (512 * MIB, 32 * MIB, 80 * GIB, 8),  # 4 GiB of uncompressed ones
        (512 * MIB, 32 * MIB, 8 * GIB, 4),  # a quarter of the memory
        (8 * GIB, 2 * GIB, 80 * GIB, 1),
    ],
)
def test_caches_that_take_turns_exceed_l2_and_fit_memory(
    dense: int, latent: int, total: int, expected: int
) -> None:
    assert kernel_gpu.cache_copies(32, dense, latent, 50 * MIB, total) == expected


@pytest.mark.parametrize(("total", "expected"), [(80, 24), (20, 7)])
def test_largest_cache_leaves_room(
    total: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    properties = SimpleNamespace(total_memory=total * GIB)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: properties)
    assert kernel_gpu.largest_cache_bytes() == expected * GIB
