"""How far rounding can move a result: the tolerance of every test that compares a fast version.

A bound follows from the sizes of what is multiplied, so that it is the same on every processor and
for every draw. With ``u`` the unit roundoff, a key's component ``k_i = Σ_j L_ij z_j + b_i`` that a
fast version gets out of rounded latents, factors or products is off by a random amount of the size

    u · e_i,    e_i² = Σ_j L_ij² z_j² + b_i²,

a logit by ``u · scale · ‖q‖ · max_i e_i`` at most, and what follows from logits by the sums below.
Each is taken :data:`SLACK` times: several roundings add up (latents, factors, rotation, keys,
queries), and the largest of many random errors is a few times their usual size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from recalkv_vllm.ops import LatentLayer, reference
from recalkv_vllm.ops.key_norm import key_scales
from recalkv_vllm.ops.sinks import shares_beside_sinks
from tests.ops.cases import AttentionInputs, attend_in_torch

SLACK = 3.0
#: Of sums and elementary functions in float32, whatever the operands' precision.
FLOOR = 2e-6


def unit_roundoff(dtype: torch.dtype, terms: int = 1) -> float:
    """Largest relative error of one rounding to ``dtype``, and of ``terms`` float32 additions."""
    accumulation = terms**0.5 * torch.finfo(torch.float32).eps / 2
    return torch.finfo(dtype).eps / 2 + accumulation


@dataclass(frozen=True, slots=True)
class Allowed:
    """Largest errors allowed, element by element; shapes as the results'."""

    o_lat: torch.Tensor
    lse: torch.Tensor


def allowed_attention_error(inputs: AttentionInputs, dtype: torch.dtype) -> Allowed:
    """Of ``paged_latent_attention`` computed with operands of ``dtype``.

    With logits off by ``δ_n`` the probabilities ``p`` move a row's log-sum-exp by ``Σ p_n δ_n`` and
    its output by ``Σ p_n δ_n (v_n - o)``; probabilities and values are rounded themselves.
    """
    return _allowed_sums(inputs, dtype, _value_latents, inputs.layer.v_width)


def allowed_heads_error(inputs: AttentionInputs, dtype: torch.dtype) -> torch.Tensor:
    """Of ``attend_heads`` with operands of ``dtype``, whichever way it takes: ``[tokens, h_q, d]``.

    Sums of reconstructed values, which are rounded, or value latents that are summed, rounded and
    projected. With a sink, a head's share ``s`` of its sum is multiplied in, which an error ``δ``
    of the log-sum-exp moves by ``s (1 - s) δ``.
    """
    layer = inputs.layer
    o_lat, lse = attend_in_torch(inputs, torch.float64)
    sums = _allowed_sums(inputs, dtype, _values, layer.head_dim)
    allowed = sums.o_lat + allowed_value_up_error(o_lat, layer.v_up, layer.v_bias)
    if layer.sinks is None:
        return allowed
    shares = shares_beside_sinks(lse, layer.sinks).cpu()
    moved = shares * (1 - shares) * sums.lse + unit_roundoff(torch.float32) * shares
    heads = reference.latent_value_up(
        o_lat, layer.v_up, layer.v_bias, out_dtype=torch.float64, compute_dtype=torch.float64
    )
    return shares[..., None] * allowed + moved[..., None] * heads.cpu().abs() + FLOOR


def _allowed_sums(
    inputs: AttentionInputs,
    dtype: torch.dtype,
    values_of: Callable[[LatentLayer, torch.Tensor], torch.Tensor],
    width: int,
) -> Allowed:
    """Of sums of ``values_of(layer, latents)``: ``[tokens, groups of heads, width]``."""
    layer = inputs.layer
    tokens, num_heads, head_dim = inputs.q.shape
    o_lat = torch.full((tokens, num_heads, width), FLOOR, dtype=torch.float64)
    lse = torch.full((tokens, num_heads), FLOOR, dtype=torch.float64)
    unit = unit_roundoff(dtype, layer.k_width + head_dim)
    for rows, z, logits in _sequences(inputs):
        per_kv = num_heads // layer.num_kv_heads
        sizes = _key_errors(layer, z).repeat_interleave(per_kv, dim=1)
        queries = inputs.q[rows].cpu().double().norm(dim=-1)
        delta = unit * layer.scale * torch.einsum("qh,nh->hqn", queries, sizes)
        weighted = logits.softmax(dim=-1) * delta
        values = values_of(layer, z)
        values = values.repeat_interleave(num_heads // values.shape[1], dim=1)
        output = torch.einsum("hqn,nhr->qhr", logits.softmax(dim=-1), values)
        rounded = unit_roundoff(dtype, len(z)) * logits.softmax(dim=-1)
        o_lat[rows] += SLACK * torch.einsum("hqn,nhr->qhr", weighted + rounded, values.abs())
        o_lat[rows] += SLACK * weighted.sum(dim=-1).T[..., None] * output.abs()
        lse[rows] += SLACK * weighted.sum(dim=-1).T
        lse[rows] += unit_roundoff(torch.float32) * logits.logsumexp(dim=-1).T.abs()
    return Allowed(o_lat, lse)


def allowed_value_up_error(
    o_lat: torch.Tensor,
    v_up: torch.Tensor,
    v_bias: torch.Tensor | None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Of ``latent_value_up`` with operands of ``v_up``'s dtype: ``[tokens, h_q, d]``."""
    wide = [None if x is None else x.cpu().double() for x in (o_lat, v_up, v_bias)]
    latents, factors, bias = wide
    exact = reference.latent_value_up(latents, factors, bias, compute_dtype=torch.float64)
    squares = None if bias is None else bias.square()
    size = reference.latent_value_up(
        latents.square(), factors.square(), squares, compute_dtype=torch.float64
    ).sqrt()
    unit = unit_roundoff(v_up.dtype, v_up.shape[2])
    return SLACK * unit * size + unit_roundoff(out_dtype or v_up.dtype) * exact.abs() + FLOOR


def _value_latents(layer: LatentLayer, z: torch.Tensor) -> torch.Tensor:
    return torch.stack([z[:, start:end] for start, end in layer.v_spans], dim=1)


def _values(layer: LatentLayer, z: torch.Tensor) -> torch.Tensor:
    factors = layer.v_up.cpu().double()
    latents = _value_latents(layer, z)
    latents = latents.repeat_interleave(len(factors) // latents.shape[1], dim=1)
    return torch.einsum("nhr,hdr->nhd", latents, factors)


def _sequences(inputs: AttentionInputs) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """Of every sequence with queries and tokens: its rows, latents and logits, float64."""
    layer, batch = inputs.layer, inputs.batch
    starts = batch.query_start_loc.tolist()
    for i, length in enumerate(batch.seq_lens.tolist()):
        rows = slice(starts[i], starts[i + 1])
        if rows.start == rows.stop or length == 0:
            continue
        z, scales = reference.cached_tokens(layer, inputs.kv_cache, batch.block_table[i], length)
        z = z.double()
        positions = torch.arange(length, device=z.device)
        keys = reference.reconstruct_keys(layer, z, positions, scales)
        logits = reference.causal_logits(layer, inputs.q[rows].double(), keys)
        yield rows, z.cpu(), logits.cpu()


def _key_errors(layer: LatentLayer, z: torch.Tensor) -> torch.Tensor:
    """``max_i e_i`` of every key, ``[tokens, h_kv]``; rotations mix components."""

    def squares(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.cpu().double().square()

    pairs = zip(layer.k_up, layer.k_spans, strict=True)
    groups = [squares(z[:, start:end]) @ squares(up).T for up, (start, end) in pairs]
    heads = torch.cat(groups, dim=-1).unflatten(-1, (-1, layer.head_dim))
    if layer.k_bias is not None:
        heads = heads + squares(layer.k_bias)
    errors = heads.sqrt()
    if layer.k_norm_weight is not None:
        scales = key_scales(layer, z.to(layer.k_up.device), torch.float64).cpu()
        errors = errors * scales[..., None] * layer.k_norm_weight.cpu().double().abs()
    if layer.cos_sin_cache is not None:
        cos, sin = layer.cos_sin_cache[0].cpu().double().chunk(2)
        errors = errors * torch.hypot(cos, sin).max()  # not one in YaRN's tables
    return errors.amax(dim=-1)
