"""The GPU side of the kernel benchmark, run small: Triton in its interpreter, torch as baseline."""

from __future__ import annotations

import pytest
import torch

from recalkv_vllm.benchmarks import kernel_gpu
from recalkv_vllm.benchmarks.geometries import Geometry, latent_of
from recalkv_vllm.benchmarks.stock_gpu import Problem, torch_attention
from recalkv_vllm.compression.errors import InputError
from recalkv_vllm.latent_format import LatentFormat
from recalkv_vllm.ops import Batch

TINY = Geometry("tiny", 4, 2, 32, 2, 1e4)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the benchmark itself runs on a GPU")
@pytest.mark.parametrize("latent_format", [None, LatentFormat("int4")], ids=str)
def test_runs_of_a_configuration(
    latent_format: LatentFormat | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RECALKV_KERNEL", "triton")
    latent = latent_of(TINY, 0.5, 1, "joint")
    build = (TINY, latent, latent_format, 40, 2)
    runs = kernel_gpu.build(*build, queries=1, dtype=torch.float32, device="cpu")
    assert runs.calls == 2
    assert list(runs.stock) == ["torch SDPA"]
    assert "interpreted" in runs.kernel
    for run in (runs.ours, runs.value_up, runs.reference, *runs.stock.values()):
        run()
    with pytest.raises(InputError, match=r"no stock kernel runs here .*several queries"):
        kernel_gpu.build(*build, queries=2, dtype=torch.float32, device="cpu")


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
