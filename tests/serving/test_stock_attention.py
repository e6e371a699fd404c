"""What a stock attention does is seen by running it once; what latents lack is refused by name."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.layernorm import RMSNorm

from recalkv_vllm.checkpoint import CheckpointError
from recalkv_vllm.serving.model.stock_attention import stock_parts

HEAD_DIM, WIDTHS, GATED_WIDTHS = 16, [64, 32, 32], [128, 32, 32]


class Unused(nn.Module):
    """A part that must not run: the stand-ins do."""

    def forward(self, *_: torch.Tensor) -> torch.Tensor:
        raise AssertionError


class Projection(Unused):
    output_partition_sizes = output_sizes = WIDTHS
    tp_size = 1


class Stock(nn.Module):
    """An attention as vLLM's classes have it; subclasses change one thing."""

    use_rope = True

    def __init__(self) -> None:
        super().__init__()
        self.qkv_proj, self.o_proj, self.rotary_emb = Projection(), Unused(), Unused()
        self.attn = Unused()
        self.attn.num_heads = 4
        self.attn.layer_name = "model.layers.3.self_attn.attn"

    def project(self, hidden_states):
        return self.qkv_proj(hidden_states)[0].split(WIDTHS, dim=-1)

    def rotate(self, positions, q, k):
        return self.rotary_emb(positions, q, k) if self.use_rope else (q, k)

    def finish(self, q, k, v):
        return self.o_proj(self.attn(q, k, v))[0]

    def forward(self, positions, hidden_states):
        q, k, v = self.project(hidden_states)
        return self.finish(*self.rotate(positions, q, k), v)


class Normed(Stock):
    def __init__(self, q_dim=HEAD_DIM, k_dim=HEAD_DIM):
        super().__init__()
        self.q_norm, self.k_norm = (self.norm(q_dim), self.norm(k_dim))
        self.dims = q_dim, k_dim

    def norm(self, dim):
        return RMSNorm(dim)

    def normed(self, q, k):
        q = self.q_norm(q.unflatten(-1, (-1, self.dims[0]))).flatten(-2)
        return q, self.k_norm(k.unflatten(-1, (-1, self.dims[1]))).flatten(-2)

    def forward(self, positions, hidden_states):
        q, k, v = self.project(hidden_states)
        return self.finish(*self.rotate(positions, *self.normed(q, k)), v)


@pytest.fixture(autouse=True, scope="module")
def vllm_config():
    """For vLLM's norms, which ask how to run."""
    with set_current_vllm_config(VllmConfig()):
        yield


def test_plain_attention():
    stock = Stock()
    parts = stock_parts(stock, HEAD_DIM)
    assert parts.rotary_emb is stock.rotary_emb
    assert parts.q_norm is parts.k_norm is None
    assert isinstance(stock.qkv_proj, Projection)  # stand-ins are gone


def test_norms_of_single_heads():
    stock = Normed()
    parts = stock_parts(stock, HEAD_DIM)
    assert (parts.q_norm, parts.k_norm, parts.key_norm) == (stock.q_norm, stock.k_norm, "head")


def test_norms_of_all_heads():
    stock = Normed(64, 32)
    parts = stock_parts(stock, HEAD_DIM)
    assert (parts.q_norm, parts.k_norm, parts.key_norm) == (stock.q_norm, stock.k_norm, "token")


def test_parts_that_a_layer_has_but_does_not_use():
    stock = Normed()
    stock.use_rope = False
    stock.normed = lambda q, k: (q, k)
    parts = stock_parts(stock, HEAD_DIM)
    assert parts.q_norm is parts.k_norm is parts.rotary_emb is None


class NormedAfterRope(Normed):
    def forward(self, positions, hidden_states):
        q, k, v = self.project(hidden_states)
        return self.finish(*self.normed(*self.rotate(positions, q, k)), v)


class NormedKeys(Normed):
    def normed(self, q, k):
        return q, self.k_norm(k.unflatten(-1, (-1, self.dims[1]))).flatten(-2)


class DroppedNorm(Normed):
    def normed(self, q, k):
        return q, super().normed(q, k)[1]


class LayerNormed(Normed):
    def norm(self, dim):
        return nn.LayerNorm(dim)


class ScaledByPosition(Stock):
    """As Llama 4: nothing changes at the first positions."""

    def forward(self, positions, hidden_states):
        q, k, v = self.project(hidden_states)
        scale = 1 + 0.1 * torch.log(1 + torch.floor(positions / 8192))
        return self.finish(*self.rotate(positions, q * scale[:, None], k), v)


class Clipped(Stock):
    def project(self, hidden_states):
        return [x.clamp(-8, 8) for x in super().project(hidden_states)]


class ScaledInput(Stock):
    def project(self, hidden_states):
        return super().project(2 * hidden_states)


class ShiftedPositions(Stock):
    def rotate(self, positions, q, k):
        return super().rotate(positions + 1, q, k)


class ScaledValues(Stock):
    def finish(self, q, k, v):
        return super().finish(q, k, v / math.sqrt(2))


class Gated(Stock):
    def finish(self, q, k, v):
        return self.o_proj(self.attn(q, k, v) * q.sigmoid())[0]


class ScaledOutput(Stock):
    def finish(self, q, k, v):
        return 2 * super().finish(q, k, v)


class Unknown(Stock):
    def forward(self, hidden_states):
        return hidden_states


class GatedProjection(Unused):
    output_partition_sizes = output_sizes = GATED_WIDTHS
    tp_size = 1


class GatedHeads(Stock):
    """As Qwen3-Next: a gate behind every query head."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv_proj = GatedProjection()

    def halves(self, q):
        return (x.flatten(-2) for x in q.unflatten(-1, (-1, 2 * HEAD_DIM)).chunk(2, dim=-1))

    def gated(self, x, gate):
        return x * torch.sigmoid(gate)

    def forward(self, positions, hidden_states):
        q, k, v = self.qkv_proj(hidden_states)[0].split(GATED_WIDTHS, dim=-1)
        q, gate = self.halves(q)
        q, k = self.rotate(positions, q, k)
        return self.o_proj(self.gated(self.attn(q, k, v), gate))[0]


class AllGatesBehindAllQueries(GatedHeads):
    def halves(self, q):
        return q.chunk(2, dim=-1)


class OtherGates(GatedHeads):
    def gated(self, x, gate):
        return x * torch.nn.functional.silu(gate)


class UnusedGates(GatedHeads):
    def gated(self, x, gate):
        return x


class FusedOnGpus(GatedHeads):
    use_fused_qk_norm_rope_gate = True

    def forward(self, positions, hidden_states):
        assert not self.use_fused_qk_norm_rope_gate, "a kernel would run"
        return super().forward(positions, hidden_states)


@pytest.mark.parametrize("make", [GatedHeads, FusedOnGpus])
def test_gates_of_query_heads(make):
    stock = make()
    assert stock_parts(stock, HEAD_DIM).gated
    assert getattr(stock, "use_fused_qk_norm_rope_gate", None) is (make is FusedOnGpus or None)
    assert not stock_parts(Stock(), HEAD_DIM).gated


def with_child():
    stock = Stock()
    stock.gate_proj = nn.Linear(8, 8)
    return stock


def with_sinks():
    stock = Stock()
    stock.sinks = nn.Parameter(torch.zeros(4))
    return stock


def test_sinks_that_its_attention_layer_has():
    stock = with_sinks()
    stock.attn.impl = SimpleNamespace(sinks=stock.sinks)
    assert stock_parts(stock, HEAD_DIM).sinks is stock.sinks
    assert stock_parts(Stock(), HEAD_DIM).sinks is None


def test_a_part_that_is_none():
    stock = Stock()
    stock.rotary_emb = None
    stock.rotate = lambda positions, q, k: (q, k) if stock.rotary_emb is None else (k, q)
    assert stock_parts(stock, HEAD_DIM).rotary_emb is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Normed(64, HEAD_DIM), f"its k_norm is over {HEAD_DIM} elements"),
        (lambda: Normed(32, 32), "its q_norm is over 32 elements"),
        (NormedAfterRope, "it calls qkv_proj, rotary_emb, q_norm, k_norm, attn, o_proj"),
        (NormedKeys, "it norms queries or keys alone"),
        (DroppedNorm, "it changes queries"),
        (LayerNormed, "its q_norm is a LayerNorm"),
        (ScaledByPosition, "it changes queries"),
        (ScaledInput, "it changes what it projects"),
        (ShiftedPositions, "it changes positions"),
        (Clipped, "it changes values"),
        (ScaledValues, "it changes values"),
        (Gated, "it changes what attention gives"),
        (AllGatesBehindAllQueries, "it changes what attention gives"),
        (OtherGates, "it changes what attention gives"),
        (UnusedGates, "it changes what attention gives"),
        (ScaledOutput, "it changes its output"),
        (Unknown, "its forward is of a kind unknown here"),
        (with_child, "it has gate_proj"),
        (with_sinks, "it has sinks"),
    ],
)
def test_refused(make, message):
    stock = make()
    with pytest.raises(CheckpointError) as caught:
        stock_parts(stock, HEAD_DIM)
    assert message in str(caught.value)
    assert stock.attn.layer_name in str(caught.value)
