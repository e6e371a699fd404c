"""Device memory that calls share: the partial results of attention split over cached tokens."""

from __future__ import annotations

import torch

_workspaces: dict[torch.device, list[torch.Tensor]] = {}


def reserve_workspace(device: torch.device, nbytes: int) -> torch.Tensor:
    """The device's workspace, at least ``nbytes`` long; reserve it before graphs are captured.

    Calls on one device share it, so they must be on one stream. A workspace that was outgrown is
    kept, because captured graphs may still write to it.

    Raises:
        RuntimeError: it would have to grow while a CUDA graph is captured.
    """
    kept = _workspaces.setdefault(device, [])
    if not kept or kept[-1].numel() < nbytes:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            found = kept[-1].numel() if kept else 0
            raise RuntimeError(
                f"workspace: expected {nbytes} bytes reserved before graph capture, found {found}"
            )
        kept.append(torch.empty(nbytes, dtype=torch.uint8, device=device))
    return kept[-1]


def partial_bytes(splits: int, rows: int, v_width: int) -> int:
    """Bytes of the partial results of ``rows`` query rows; a single split needs none."""
    return 4 * splits * rows * (v_width + 1) if splits > 1 else 0


def partial_results(
    splits: int, tokens: int, num_heads: int, v_width: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """``o_lat: [splits, tokens, h_q, v_width]`` and ``lse: [splits, tokens, h_q]``, float32.

    They lie in the workspace, and hold until the next call on the device asks for theirs.
    """
    rows = tokens * num_heads
    nbytes = partial_bytes(splits, rows, v_width)
    elements = reserve_workspace(device, nbytes)[:nbytes].view(torch.float32)
    cut = splits * rows * v_width
    o_lat = elements[:cut].view(splits, tokens, num_heads, v_width)
    return o_lat, elements[cut:].view(splits, tokens, num_heads)


def clear_rows(o_lat: torch.Tensor, lse: torch.Tensor, rows: range) -> None:
    """Give ``rows`` what rows of no sequence have, where no kernel does.

    No batch that a graph is captured for has such rows.
    """
    if rows:
        o_lat[rows.start : rows.stop] = 0
        lse[rows.start : rows.stop] = -torch.inf
