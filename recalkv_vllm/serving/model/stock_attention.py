"""What a stock attention module does between its projections, seen by running it once.

vLLM's model classes write the same attention in many ways, and some do more: they gate outputs,
scale queries by position, norm values, leave RoPE out on some layers. Whatever a class computes
besides what latents are served with is found here, and refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.layernorm import GemmaRMSNorm, RMSNorm

from recalkv_vllm.architectures import KeyNorm
from recalkv_vllm.checkpoint import CheckpointError

PROJECTION, NORMS, ROTARY, ATTENTION, OUTPUT = (
    "qkv_proj",
    ("q_norm", "k_norm"),
    "rotary_emb",
    "attn",
    "o_proj",
)
#: Parts of a stock attention that are served, in the order in which its forward may call them.
ORDER = (PROJECTION, *NORMS, ROTARY, ATTENTION, OUTPUT)
#: Flags of modules with kernels for several parts at once, on GPUs; without, they call the parts.
FUSED = ("use_fused_qk_norm_rope_gate",)
#: Of the run's tokens; the last is far out, where scales by position have grown.
POSITIONS = (0, 1, 1 << 24)


@dataclass(frozen=True, slots=True)
class StockParts:
    """The parts of a stock attention module that its forward uses.

    Args:
        q_norm: RMS norm of queries.
        k_norm: of keys; there are both norms or none.
        rotary_emb: vLLM's RoPE; None for a layer without.
        key_norm: what one norm is over.
        sinks: ``[query heads of this rank]``; None for a layer without.
        gated: each query head of the projection comes with a gate of its size behind it, and what
            attention gives is multiplied by the gate's sigmoid.
    """

    q_norm: nn.Module | None
    k_norm: nn.Module | None
    rotary_emb: nn.Module | None
    key_norm: KeyNorm | None
    sinks: nn.Parameter | None
    gated: bool = False


class _Stub(nn.Module):
    """Stands in for a part of the stock module."""

    def __init__(self, answer: Callable[..., Any], **attributes: Any):
        super().__init__()
        self._answer = answer
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._answer(*args, **kwargs)


class StockRun:
    """One run of a stock module's forward with stand-ins for its parts, on the CPU.

    No kernel is started, and what passes from part to part is exact in every dtype that a forward
    may convert to.

    Args:
        stock: the attention module.
        head_dim: of queries and keys.
        plain: its projections give tensors, not vLLM's pairs of a tensor and a bias.
    """

    def __init__(self, stock: Any, head_dim: int, plain: bool = False):
        self._stock, self._head_dim, self._plain = stock, head_dim, plain
        self._name = f"{type(stock).__name__} ({stock.attn.layer_name})"
        self.calls: list[str] = []
        # What both norms can be over; a single head is all of them.
        self._norm_kinds: set[KeyNorm] = {"head", "token"}
        known = {*ORDER}
        if unknown := sorted({name for name, _ in stock.named_children()} - known):
            raise self.refusal(f"it has {', '.join(unknown)}")
        # What its attention layer was given and knows what to do with.
        self.sinks = getattr(getattr(stock.attn, "impl", None), "sinks", None)
        own = stock.named_parameters(recurse=False)
        if parameters := sorted(name for name, x in own if x is not self.sinks):
            raise self.refusal(f"it has {', '.join(parameters)}")
        if missing := sorted({PROJECTION, ATTENTION, OUTPUT} - set(stock._modules)):
            raise self.refusal(f"it has no {', '.join(missing)}")
        widths = stock.qkv_proj.output_partition_sizes
        rows = len(POSITIONS)
        count = torch.arange(rows * sum(widths), device="cpu")
        self._fused = (count.view(rows, -1) % 251).float()
        self._hidden = self._shaped(self._fused[:, 1:3])
        self.q, self.k, self.v = self._fused.split(widths, dim=-1)
        #: Of the rank's heads, ``[tokens, h_q·d]``; None without gates.
        self.gate: torch.Tensor | None = None
        if widths[0] == 2 * stock.attn.num_heads * head_dim:
            heads = self.q.view(rows, -1, 2 * head_dim)
            # Small, so that sigmoids tell them apart.
            heads[..., head_dim:] = heads[..., head_dim:] % 5 - 2
            self.q, self.gate = (x.flatten(1) for x in heads.chunk(2, dim=-1))

    def refusal(self, what: str) -> CheckpointError:
        """The error that says what the module does."""
        return CheckpointError(f"recalkv: {self._name}: {what}, which latents are not served with")

    def run(self, **arguments: Any) -> Any:
        """Call the module with ``arguments`` besides ``hidden_states``; returns what it gives.

        Raises:
            CheckpointError: it does not call its parts in order, or changes values before
                attention, or what attention gives.
        """
        stock = self._stock
        answers: dict[str, Callable[..., Any]] = {
            PROJECTION: self._project,
            **{name: lambda x, name=name: self._norm(name, x) for name in NORMS},
            ROTARY: self._rotate,
            ATTENTION: self._attend,
            OUTPUT: self._output,
        }
        sizes = {
            "tp_size": stock.qkv_proj.tp_size,
            "output_sizes": stock.qkv_proj.output_sizes,
            "has_sink": False,
        }
        parts = [name for name, _ in stock.named_children()]
        stubs = {name: _Stub(answers[name], **sizes) for name in parts}
        stock.eval()  # without dropout
        # Models are built where another device is the default.
        with _replaced(stock, stubs), _without_fused_kernels(stock), torch.device("cpu"):
            try:
                result = stock(hidden_states=self._hidden, **arguments)
            except CheckpointError:
                raise
            except Exception as error:  # whatever a forward does with parts it does not expect
                raise self.refusal(f"its forward is of a kind unknown here ({error})") from error
        necessary = {PROJECTION, ATTENTION, OUTPUT}
        if self.calls != [name for name in ORDER if name in self.calls] or not (
            necessary <= set(self.calls)
        ):
            raise self.refusal(f"it calls {', '.join(self.calls)}")
        if len(set(NORMS) & set(self.calls)) == 1:
            raise self.refusal("it norms queries or keys alone")
        # What the stand-ins of norms give.
        self.normed_q, self.normed_k = (
            x + (name in self.calls) for x, name in zip((self.q, self.k), NORMS, strict=True)
        )
        if not torch.equal(self.attended_v.reshape(self.v.shape), self.v):
            raise self.refusal("it changes values")
        return result

    @property
    def key_norm(self) -> KeyNorm | None:
        """What one norm of keys is over, if there are norms."""
        if not set(NORMS) & set(self.calls):
            return None
        return "head" if "head" in self._norm_kinds else "token"

    def norms(self) -> dict[str, nn.Module | None]:
        """The norms that the forward called.

        Raises:
            CheckpointError: they are of another kind.
        """
        found = {name: getattr(self._stock, name) for name in NORMS if name in self.calls}
        for name, norm in found.items():
            if not isinstance(norm, RMSNorm | GemmaRMSNorm):
                raise self.refusal(f"its {name} is a {type(norm).__name__}")
        return {name: found.get(name) for name in NORMS}

    def _shaped(self, x: torch.Tensor) -> torch.Tensor:
        return x[None] if self._plain else x

    def _paired(self, x: torch.Tensor) -> Any:
        return x if self._plain else (x, None)

    def _project(self, hidden: torch.Tensor) -> Any:
        self.calls.append(PROJECTION)
        if not torch.equal(hidden, self._hidden):
            raise self.refusal("it changes what it projects")
        return self._paired(self._shaped(self._fused.clone()))

    def _norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        self.calls.append(name)
        given = self.q if name == NORMS[0] else self.k
        widths: dict[KeyNorm, int] = {"head": self._head_dim, "token": given.shape[-1]}
        self._norm_kinds &= {kind for kind, width in widths.items() if x.shape[-1] == width}
        if not self._norm_kinds:
            raise self.refusal(f"its {name} is over {x.shape[-1]} elements")
        return x + 1

    def _rotate(self, positions: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> Any:
        self.calls.append(ROTARY)
        if not torch.equal(positions, torch.tensor(POSITIONS)):
            raise self.refusal("it changes positions")
        return q + 2, k + 2

    def _attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        self.calls.append(ATTENTION)
        self.attended_q, self.attended_k, self.attended_v = q, k, v
        return self.q + 1

    def _output(self, x: torch.Tensor) -> Any:
        self.calls.append(OUTPUT)
        self.output = x
        expected = self.q + 1
        if self.gate is not None:
            expected = expected * torch.sigmoid(self.gate)
        if not torch.equal(x.reshape(self.q.shape), expected):
            raise self.refusal("it changes what attention gives")
        return self._paired(x)


@contextmanager
def _replaced(stock: nn.Module, stubs: Mapping[str, nn.Module]) -> Iterator[None]:
    kept = dict(stock._modules)
    stock._modules.update(stubs)
    try:
        yield
    finally:
        stock._modules.update(kept)


@contextmanager
def _without_fused_kernels(stock: nn.Module) -> Iterator[None]:
    kept = {name: getattr(stock, name) for name in FUSED if hasattr(stock, name)}
    for name in kept:
        setattr(stock, name, False)
    try:
        yield
    finally:
        for name, value in kept.items():
            setattr(stock, name, value)


def stock_parts(stock: Any, head_dim: int) -> StockParts:
    """The parts that an attention module of one of vLLM's own classes uses.

    Args:
        stock: the module.
        head_dim: of queries and keys.

    Raises:
        CheckpointError: it does something that latents are not served with.
    """
    run = StockRun(stock, head_dim)
    result = run.run(positions=torch.tensor(POSITIONS, device="cpu"))
    turned = 2 * (ROTARY in run.calls)
    if not torch.equal(run.attended_q.reshape(run.q.shape), run.normed_q + turned):
        raise run.refusal("it changes queries")
    if not torch.equal(run.attended_k.reshape(run.k.shape), run.normed_k + turned):
        raise run.refusal("it changes keys")
    if not torch.equal(result, run.output):
        raise run.refusal("it changes its output")
    rotary_emb = stock.rotary_emb if ROTARY in run.calls else None
    return StockParts(
        **run.norms(),
        rotary_emb=rotary_emb,
        key_norm=run.key_norm,
        sinks=run.sinks,
        gated=run.gate is not None,
    )
