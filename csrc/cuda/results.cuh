// Where a block's results go, and results of rows that see nothing.
#pragma once

#include "rows.cuh"
#include "softmax.cuh"

namespace recalkv {

// Where results go: row `row` under KV head `head`, counted from token `first_token`, of `split`.
RECALKV_DEVICE int64_t result_row(const DecodeParams& p, int first_token, int head, int row,
                                  int split) {
  const int per_kv = p.num_heads / p.num_kv_heads;
  const int64_t token = static_cast<int64_t>(split) * p.tokens + first_token + row / per_kv;
  return token * p.num_heads + head * per_kv + row % per_kv;
}

// Zeros and minus infinity for rows of no sequence; splits leave the zeros to the merge.
RECALKV_DEVICE void clear_padding(const DecodeParams& p, const Padding& padding, int first_head,
                                  int v_block, int block_columns) {
  const int count = padding.end - padding.begin;
  const int v_begin = v_block * block_columns;
  const int v_left = p.v_width - v_begin;
  const int v_columns = v_left < block_columns ? v_left : block_columns;
  for (int i = 0; i < p.kernel.heads * count; ++i) {
    const int64_t row =
        result_row(p, 0, first_head + i / count, padding.begin + i % count, block_y());
    if (v_block == 0 && thread_index() == 0) p.lse[row] = kMinusInfinity;
    for (int v = thread_index(); p.kernel.splits == 1 && v < v_columns; v += thread_count()) {
      p.out[row * p.v_width + v_begin + v] = 0.0f;
    }
  }
}

// A split that has seen nothing: the merge does not read its output.
RECALKV_DEVICE void clear_split(const DecodeParams& p, const Rows& rows, int first_head,
                                int columns) {
  for (int i = thread_index(); i < p.kernel.heads * columns; i += thread_count()) {
    const int row = rows.begin + i % columns;
    if (row >= rows.end) continue;
    p.lse[result_row(p, rows.first_token, first_head + i / columns, row, block_y())] =
        kMinusInfinity;
  }
}

}  // namespace recalkv
