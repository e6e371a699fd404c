// Where a block's results go, and results of rows that see nothing.
#pragma once

#include "rows.cuh"
#include "softmax.cuh"

namespace recalkv {

// Where results go without a work list: row `row` over all tokens, `per_kv` of each, of KV head
// `head`.
RECALKV_DEVICE int64_t token_row(const DecodeParams& p, int row, int head) {
  const int per_kv = p.num_heads / p.num_kv_heads;
  return static_cast<int64_t>(row / per_kv) * p.num_heads + head * per_kv + row % per_kv;
}

// The rows of a block as its end needs them: how many, and the first over all tokens.
struct OwnRows {
  int first, count;

  RECALKV_DEVICE OwnRows(const DecodeParams& p, const Rows& rows)
      : first(rows.first_token * (p.num_heads / p.num_kv_heads) + rows.begin),
        count(rows.end - rows.begin) {}
};

// Where results of the block's row `row` go: those of pieces are `[capacity, h_kv, columns]`.
RECALKV_DEVICE int64_t result_row(const DecodeParams& p, const OwnRows& own, int head, int row,
                                  int columns) {
  if (!p.pieces) return token_row(p, own.first + row, head);
  return (static_cast<int64_t>(block_y()) * p.num_kv_heads + head) * columns + row;
}

// Zeros and minus infinity for rows of no sequence.
RECALKV_DEVICE void clear_padding(const DecodeParams& p, const Padding& padding, int first_head,
                                  int v_block, int block_columns) {
  const int count = padding.end - padding.begin;
  const int v_begin = v_block * block_columns;
  const int v_left = p.v_width - v_begin;
  const int v_columns = v_left < block_columns ? v_left : block_columns;
  for (int i = 0; i < p.kernel.heads * count; ++i) {
    const int64_t row = token_row(p, padding.begin + i % count, first_head + i / count);
    if (v_block == 0 && thread_index() == 0) p.lse[row] = kMinusInfinity;
    for (int v = thread_index(); v < v_columns; v += thread_count()) {
      p.out[row * p.v_width + v_begin + v] = 0.0f;
    }
  }
}

// What a block works on: all that its rows see, or a piece of the work list.
struct Work {
  Rows rows;
  TokenRange range;
  bool some;  // else there is nothing to do
};

// `tile`: of the range, in tokens; a piece's tiles are `turn` of these. Rows of no sequence are
// cleared here, or by the merge of pieces.
RECALKV_DEVICE Work find_work(const DecodeParams& p, int row_block, int columns, int first_head,
                              int v_block, int block_columns, int tile, int turn) {
  Work work = {};
  if (p.pieces) {
    const Piece piece = load_piece(p);
    work.some = piece.from < piece.to;
    if (!work.some) return work;
    work.rows = rows_from(p, piece.seq, piece.begin, columns);
    work.range = visible_range(p, work.rows, tile);
    narrow_range(work.range, piece, turn);
    return work;
  }
  work.rows = find_rows(p, row_block, columns);
  const Padding padding = find_padding(p, work.rows, row_block, columns);
  if (padding.begin < padding.end) clear_padding(p, padding, first_head, v_block, block_columns);
  work.some = work.rows.begin < work.rows.end;
  if (work.some) work.range = visible_range(p, work.rows, tile);
  return work;
}

}  // namespace recalkv
