"""Device memory that calls share: the partial results of cached tokens cut into pieces."""

from __future__ import annotations

import math

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


def partial_bytes(rows: int, v_width: int) -> int:
    """Bytes of the partial results of ``rows`` rows of all pieces together."""
    return 4 * rows * (v_width + 1)


def partial_results(
    rows: tuple[int, ...], v_width: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """``o_lat: [*rows, v_width]`` and ``lse: [*rows]``, float32.

    They lie in the workspace, and hold until the next call on the device asks for theirs.
    """
    count = math.prod(rows)
    nbytes = partial_bytes(count, v_width)
    elements = reserve_workspace(device, nbytes)[:nbytes].view(torch.float32)
    cut = count * v_width
    return elements[:cut].view(*rows, v_width), elements[cut:].view(rows)


def clear_rows(o_lat: torch.Tensor, lse: torch.Tensor, rows: range) -> None:
    """Give ``rows`` what rows of no sequence have, where no kernel does.

    No batch that a graph is captured for has such rows.
    """
    if rows:
        o_lat[rows.start : rows.stop] = 0
        lse[rows.start : rows.stop] = -torch.inf
