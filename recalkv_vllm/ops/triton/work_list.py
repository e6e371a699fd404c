"""The work list of a call, from its shapes to the launch that cuts it; one serves equal layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from recalkv_vllm.kernels.columns import next_power_of_2
from recalkv_vllm.kernels.pieces import MAX_PIECES, MAX_WAVES, START_UP, Bounds
from recalkv_vllm.kernels.work_list import cut_batch
from recalkv_vllm.ops.contract import Batch
from recalkv_vllm.ops.triton.launch import Launch
from recalkv_vllm.ops.workspace import partial_results


class Cut(NamedTuple):
    """How a kernel wants a batch cut.

    Args:
        rows: query rows of a row block under each KV head.
        per_kv: query heads of a KV head.
        tile: tokens of what pieces are counted in.
        window: newest tokens that a query sees; 0 for all.
    """

    rows: int
    per_kv: int
    tile: int
    window: int
    bounds: Bounds


@dataclass(frozen=True, slots=True)
class WorkList:
    """A part of a batch, cut.

    Args:
        pieces: ``[capacity, 4]`` int32: sequence, first row, first tile and end tile of each.
        first_piece: ``[row_blocks + 1]`` int32, of each row block.
        query_start_loc: ``[num_seqs + 1]`` int32, of the part's sequences.
        first_token: row of ``q`` that the part's first sequence starts at.
    """

    cut: Cut
    pieces: torch.Tensor
    first_piece: torch.Tensor
    query_start_loc: torch.Tensor
    first_token: int

    @property
    def num_seqs(self) -> int:
        return len(self.query_start_loc) - 1


@dataclass(frozen=True, slots=True)
class Partial:
    """Results of pieces, float32, valid until another call on the device.

    Args:
        o_lat: ``[capacity, h_kv, rows, v_width]``.
        lse: ``[capacity, h_kv, rows]``.
    """

    work: WorkList
    o_lat: torch.Tensor
    lse: torch.Tensor

    @classmethod
    def of(cls, work: WorkList, num_kv_heads: int, v_width: int) -> Partial:
        """Room for the results of a work list, in the device's workspace."""
        rows = (work.cut.bounds.capacity, num_kv_heads, work.cut.rows)
        return cls(work, *partial_results(rows, v_width, work.pieces.device))


def work_list(
    batch: Batch, sequences: range, tokens: range, cut: Cut
) -> tuple[WorkList, tuple[Launch, ...]]:
    """The work list of ``sequences``, which own the rows ``tokens`` of ``q``.

    Returns:
        The list, and the launch that cuts it: none if the batch holds one that is cut alike.
    """
    # What was cut before a CUDA graph is captured would not be cut again when it is replayed.
    captured = batch.seq_lens.is_cuda and torch.cuda.is_current_stream_capturing()
    key = (sequences, tokens, cut, captured)
    if batch.work_lists is not None and key in batch.work_lists:
        return batch.work_lists[key], ()
    seq_lens = batch.seq_lens[sequences.start : sequences.stop]
    query_start_loc = batch.query_start_loc[sequences.start : sequences.stop + 1]
    blocks = len(sequences)
    blocks += tokens.stop * cut.per_kv // cut.rows - tokens.start * cut.per_kv // cut.rows
    work = WorkList(
        cut,
        seq_lens.new_empty(cut.bounds.capacity, 4),
        seq_lens.new_empty(blocks + 1),
        query_start_loc,
        tokens.start,
    )
    if batch.work_lists is not None:
        batch.work_lists[key] = work
    return work, (cut_launch(work, seq_lens),)


def cut_launch(work: WorkList, seq_lens: torch.Tensor) -> Launch:
    """The launch of ``work_list.py``: one program, whatever the batch."""
    cut = work.cut
    return Launch(
        cut_batch,
        (1,),
        {
            "seq_lens": seq_lens,
            "query_start_loc": work.query_start_loc,
            "pieces": work.pieces,
            "first_piece": work.first_piece,
            "num_seqs": work.num_seqs,
            "num_blocks": len(work.first_piece) - 1,
            "capacity": cut.bounds.capacity,
            "at_once": cut.bounds.at_once,
            "rows": cut.rows,
            "per_kv": cut.per_kv,
            "tile": cut.tile,
            "window": cut.window,
            "LANES": next_power_of_2(MAX_WAVES * cut.bounds.at_once),
            "MAX_PIECES": MAX_PIECES,
            "MAX_WAVES": MAX_WAVES,
            "START_UP": START_UP,
        },
    )
