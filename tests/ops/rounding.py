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

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from recalkv_vllm.ops import reference
from tests.ops.cases import AttentionInputs

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
    tokens, num_heads, head_dim = inputs.q.shape
    v_width = inputs.v_spans[0][1] - inputs.v_spans[0][0]
    o_lat = torch.full((tokens, num_heads, v_width), FLOOR, dtype=torch.float64)
    lse = torch.full((tokens, num_heads), FLOOR, dtype=torch.float64)
    unit = unit_roundoff(dtype, inputs.k_up.shape[2] + head_dim)
    for rows, z, logits in _sequences(inputs):
        per_kv = num_heads // (inputs.k_up.shape[0] * inputs.k_up.shape[1] // head_dim)
        sizes = _key_errors(inputs, z).repeat_interleave(per_kv, dim=1)
        queries = inputs.q[rows].cpu().double().norm(dim=-1)
        delta = unit * inputs.scale * torch.einsum("qh,nh->hqn", queries, sizes)
        weighted = logits.softmax(dim=-1) * delta
        values = torch.stack([z[:, start:end] for start, end in inputs.v_spans], dim=1)
        values = values.repeat_interleave(num_heads // len(inputs.v_spans), dim=1)
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


def _sequences(inputs: AttentionInputs) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """Of every sequence with queries and tokens: its rows, latents and logits, float64."""
    starts = inputs.query_start_loc.tolist()
    for i, length in enumerate(inputs.seq_lens.tolist()):
        rows = slice(starts[i], starts[i + 1])
        if rows.start == rows.stop or length == 0:
            continue
        z = reference.cached_latents(
            inputs.kv_cache, inputs.block_table[i], length, inputs.latent_format
        ).double()
        keys = reference.reconstruct_keys(
            z,
            torch.arange(length, device=z.device),
            inputs.k_up,
            inputs.k_spans,
            inputs.q.shape[2],
            cos_sin_cache=inputs.cos_sin_cache,
            is_neox=inputs.is_neox,
            k_bias=inputs.k_bias,
            k_norm_weight=inputs.k_norm_weight,
            k_norm_eps=inputs.k_norm_eps,
        )
        logits = reference.causal_logits(
            inputs.q[rows].double(),
            keys,
            scale=inputs.scale,
            sliding_window=inputs.sliding_window,
            soft_cap=inputs.soft_cap,
        )
        yield rows, z.cpu(), logits.cpu()


def _key_errors(inputs: AttentionInputs, z: torch.Tensor) -> torch.Tensor:
    """``max_i e_i`` of every key, ``[tokens, h_kv]``; rotations mix components."""
    head_dim = inputs.q.shape[2]

    def keys(x: torch.Tensor, square: bool) -> torch.Tensor:
        def of(tensor: torch.Tensor) -> torch.Tensor:
            tensor = tensor.cpu().double()
            return tensor.square() if square else tensor

        pairs = zip(inputs.k_up, inputs.k_spans, strict=True)
        groups = [of(x[:, start:end]) @ of(up).T for up, (start, end) in pairs]
        heads = torch.cat(groups, dim=-1).unflatten(-1, (-1, head_dim))
        return heads if inputs.k_bias is None else heads + of(inputs.k_bias)

    errors = keys(z, square=True).sqrt()
    if inputs.k_norm_weight is not None:
        mean_square = keys(z, square=False).square().mean(dim=-1, keepdim=True)
        errors = errors * torch.rsqrt(mean_square + inputs.k_norm_eps)
        errors = errors * inputs.k_norm_weight.cpu().double().abs()
    if inputs.cos_sin_cache is not None:
        cos, sin = inputs.cos_sin_cache[0].cpu().double().chunk(2)
        errors = errors * torch.hypot(cos, sin).max()  # not one in YaRN's tables
    return errors.amax(dim=-1)
