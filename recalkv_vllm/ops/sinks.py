"""Attention sinks: a logit per query head that joins the softmax's sum, and has no value.

A sink changes nothing but the sum that weights are divided by, so attention runs without it and its
outputs are multiplied once, by the share of the sum that is not the sink's.
"""

from __future__ import annotations

import torch


def shares_beside_sinks(lse: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
    """``exp(lse) / (exp(lse) + exp(sink))``, in ``lse``'s dtype.

    Args:
        lse: ``[tokens, h_q]``, natural log-sum-exp of logits without sinks.
        sinks: ``[h_q]``.
    """
    return torch.sigmoid(lse - sinks.to(lse.dtype))
