// Which query rows and which cached tokens a block works on.
#pragma once

#include "shape.cuh"

namespace recalkv {

// Row `r` of a sequence is query `r / per_kv` of query head `r % per_kv` under each KV head.
struct Rows {
  int seq;          // index of the sequence
  int first_token;  // row of q with the sequence's first query
  int begin, end;   // rows of this block; none unless begin < end
  int num_queries;
  int length;  // cached tokens of the sequence
};

// Up to `columns` rows of sequence `seq` from `begin` on.
RECALKV_DEVICE Rows rows_from(const DecodeParams& p, int seq, int begin, int columns) {
  const int start = p.query_start_loc[seq];
  const int num_queries = p.query_start_loc[seq + 1] - start;
  const int rows = num_queries * (p.num_heads / p.num_kv_heads);
  const int end = begin + columns < rows ? begin + columns : rows;
  return {seq, start, begin, end, num_queries, p.seq_lens[seq]};
}

// Sequence `i` owns the row blocks from `start[i] * per_kv / columns + i` on: never fewer than it
// needs, and `tokens * per_kv / columns + num_seqs` in all, whatever the query lengths are.
RECALKV_DEVICE Rows find_rows(const DecodeParams& p, int row_block, int columns) {
  const int per_kv = p.num_heads / p.num_kv_heads;
  int low = 0;
  int high = p.num_seqs;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    const int first = p.query_start_loc[middle] * per_kv / columns + middle;
    (first <= row_block ? low : high) = middle;
  }
  const int begin = (row_block - p.query_start_loc[low] * per_kv / columns - low) * columns;
  return rows_from(p, low, begin, columns);
}

// Rows of no sequence, which a padded batch has after the last one's. A block with fewer rows than
// columns takes as many of these, in order: all blocks together have a column for each.
struct Padding {
  int begin, end;  // counted over all tokens, `per_kv` rows each
};

RECALKV_DEVICE Padding find_padding(const DecodeParams& p, const Rows& rows, int row_block,
                                    int columns) {
  const int per_kv = p.num_heads / p.num_kv_heads;
  const int all = rows.num_queries * per_kv;
  const int before = rows.first_token * per_kv + (rows.begin < all ? rows.begin : all);
  const int own = rows.begin < rows.end ? rows.end - rows.begin : 0;
  const int begin = p.query_start_loc[p.num_seqs] * per_kv + row_block * columns - before;
  const int end = begin + columns - own;
  return {begin, end < p.tokens * per_kv ? end : p.tokens * per_kv};
}

// Tokens [first, end) are visible to some row; the block attends tiles [tile_from, tile_to).
struct TokenRange {
  int first, end, tile_from, tile_to;
};

// All tiles that some row sees.
RECALKV_DEVICE TokenRange visible_range(const DecodeParams& p, const Rows& rows, int tile) {
  const int per_kv = p.num_heads / p.num_kv_heads;
  const int context = rows.length - rows.num_queries;
  const int oldest = context + rows.begin / per_kv - p.window + 1;
  const int newest = context + (rows.end - 1) / per_kv;
  TokenRange range;
  range.first = oldest > 0 ? oldest : 0;
  range.end = rows.length == 0 ? 0 : newest + 1;
  range.tile_from = range.first / tile;
  range.tile_to = (range.end + tile - 1) / tile;
  return range;
}

// A piece of the work list: rows of one sequence from `begin` on, and tiles, each as long as what
// all teams of a block take in a turn. An empty one is no work.
struct Piece {
  int seq, begin, from, to;
};

RECALKV_DEVICE Piece load_piece(const DecodeParams& p) {
  const int32_t* entry = p.pieces + 4 * block_y();
  return {entry[0], entry[1], entry[2], entry[3]};
}

// Narrow a range to a piece, of whose tiles each is `turn` of the range's.
RECALKV_DEVICE void narrow_range(TokenRange& range, const Piece& piece, int turn) {
  if (piece.from * turn > range.tile_from) range.tile_from = piece.from * turn;
  if (piece.to * turn < range.tile_to) range.tile_to = piece.to * turn;
}

// The factor on a token's key, which is in the cache; zero for tokens that no row sees, whose
// memory may hold anything. `table` is the sequence's row of the block table.
RECALKV_DEVICE float key_scale(const DecodeParams& p, const int32_t* table, const TokenRange& range,
                               int position, int kv_head) {
  if (position < range.first || position >= range.end) return 0.0f;
  const float* scales = p.key_scales + table[position / p.block_size] * p.key_scale_block_stride;
  return scales[position % p.block_size * p.key_scale_slot_stride +
                kv_head * p.key_scale_head_stride];
}

}  // namespace recalkv
