"""How kernels order the columns of a head, so that what RoPE rotates together lies together."""

from __future__ import annotations

import torch


def pair_order(head_dim: int, rot_dim: int, is_neox: bool) -> torch.Tensor:
    """Columns of a head ``[d]``, with the two members of every rotated pair side by side."""
    order = torch.arange(head_dim)
    if is_neox:
        order[:rot_dim] = order[:rot_dim].view(2, -1).T.flatten()
    return order
