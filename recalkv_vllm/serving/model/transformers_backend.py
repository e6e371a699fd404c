"""Models that vLLM runs as transformers defines them (its "Transformers modeling backend").

Their decoder layers call attention with a batch axis and with the rotation's cosines and sines;
inside, vLLM has put its own fused projections and attention.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel
from vllm.model_executor.layers.rotary_embedding import RotaryEmbedding

from recalkv_vllm.architectures import VARYING_ROPE
from recalkv_vllm.checkpoint import CheckpointError
from recalkv_vllm.serving.model.self_attention import LatentSelfAttention
from recalkv_vllm.serving.model.stock_attention import POSITIONS, StockParts, StockRun


def of_transformers(decoder: Any) -> bool:
    """Whether vLLM's model holds a decoder that transformers defines."""
    return isinstance(decoder, PreTrainedModel)


class TransformersSelfAttention(LatentSelfAttention):
    """:class:`LatentSelfAttention` called as transformers calls attention."""

    def forward(  # type: ignore[override]
        self, hidden_states: torch.Tensor, position_ids: torch.Tensor, **_: Any
    ) -> tuple[torch.Tensor, None]:
        """``hidden_states: [1, tokens, hidden_size]``, ``position_ids: [1, tokens]``."""
        return super().forward(position_ids[0], hidden_states[0])[None], None


class RotaryTable:
    """The rotation of a transformers model as vLLM has it: one table of cosines and sines.

    Args:
        decoder: the model.
        num_positions: rows of the table.

    Raises:
        CheckpointError: its angles depend on more than the position.
    """

    def __init__(self, decoder: Any, num_positions: int):
        rotary: Any = getattr(decoder, "rotary_emb", None)
        name = type(decoder).__name__
        rope_type = getattr(rotary, "rope_type", None)
        if not isinstance(rope_type, str) or rope_type in VARYING_ROPE:
            raise CheckpointError(
                f"recalkv: {name}: expected one RoPE whose angles depend on the position alone, "
                f"found {rope_type}"
            )
        # On the CPU, like the runs of attention modules.
        with torch.device("cpu"):
            positions = torch.arange(num_positions)[None]
            like = torch.zeros(1, 1, dtype=torch.float32)
            cos, sin = copy.deepcopy(rotary).cpu()(like, positions)
        #: As the model's layers take them, ``[1, num_positions, rot_dim]``.
        self.cos, self.sin = cos, sin
        self.rot_dim = cos.shape[-1]
        half = self.rot_dim // 2
        # Each angle is there twice: half a table apart, or side by side.
        apart = torch.equal(cos[..., :half], cos[..., half:])
        cos, sin = (x[0, :, :half] if apart else x[0, :, ::2] for x in (cos, sin))
        #: As vLLM has it, ``[num_positions, rot_dim]``.
        self.table = torch.cat((cos, sin), dim=-1)

    def rotated(self, x: torch.Tensor, positions: torch.Tensor, is_neox: bool) -> torch.Tensor:
        """``x: [tokens, heads, head_dim]``, rotated; the pairing is as in vLLM."""
        cos, sin = self.table[positions].unsqueeze(1).chunk(2, dim=-1)
        turned, rest = x[..., : self.rot_dim], x[..., self.rot_dim :]
        if is_neox:
            a, b = turned.chunk(2, dim=-1)
        else:
            a, b = turned[..., ::2], turned[..., 1::2]
        a, b = a * cos - b * sin, b * cos + a * sin
        pairs = torch.cat((a, b), dim=-1) if is_neox else torch.stack((a, b), dim=-1).flatten(-2)
        return torch.cat((pairs, rest), dim=-1)

    def embedding(self, head_dim: int, is_neox: bool) -> RotaryEmbedding:
        """vLLM's module that rotates by this table."""
        dtype = torch.get_default_dtype()
        made = RotaryEmbedding(head_dim, self.rot_dim, len(self.table), 1.0, is_neox, dtype)
        made.cos_sin_cache.copy_(self.table)
        return made


def transformers_parts(stock: Any, head_dim: int, rotary: RotaryTable) -> StockParts:
    """The parts that an attention module of a transformers model uses, in vLLM's form.

    Raises:
        CheckpointError: it does something that latents are not served with.
    """
    run = StockRun(stock, head_dim, plain=True)
    positions = torch.arange(len(POSITIONS), device="cpu")
    result, *_ = run.run(
        position_embeddings=(rotary.cos[:, positions], rotary.sin[:, positions]),
        position_ids=positions[None],
        attention_mask=None,
        past_key_values=None,
    )
    if not torch.equal(result.reshape(run.q.shape), run.q + 1):
        raise run.refusal("it changes its output")
    got = [x.reshape(len(positions), -1, head_dim) for x in (run.attended_q, run.attended_k)]
    given = [x.reshape(len(positions), -1, head_dim) for x in (run.normed_q, run.normed_k)]
    norms = run.norms()
    parts = partial(
        StockParts,
        q_norm=norms["q_norm"],
        k_norm=norms["k_norm"],
        key_norm=run.key_norm,
        sinks=run.sinks,
    )
    if all(map(torch.equal, got, given)):
        return parts(rotary_emb=None)
    for is_neox in (True, False):
        expected = [rotary.rotated(x, positions, is_neox) for x in given]
        if all(map(partial(torch.allclose, rtol=1e-4, atol=1e-3), got, expected)):
            return parts(rotary_emb=rotary.embedding(head_dim, is_neox))
    raise run.refusal("it changes queries or keys")
