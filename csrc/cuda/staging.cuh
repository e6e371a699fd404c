// Bringing tiles of the paged cache into a team's ring of shared memory.
#pragma once

#include "rows.cuh"
#include "shape.cuh"

namespace recalkv {

// What a block loads of a token and where its spans lie in that: one row of `tile_columns`. Columns
// that several spans share are loaded once.
struct TileColumns {
  const int32_t* row;
  RECALKV_DEVICE int k_offset() const { return row[0]; }
  RECALKV_DEVICE int chunks() const { return row[1]; }  // of 8 columns, 16 bytes
  RECALKV_DEVICE int v_offset(int head) const { return row[2 + head]; }
  RECALKV_DEVICE int source(int heads, int chunk) const { return row[2 + heads + chunk]; }
};

RECALKV_DEVICE TileColumns tile_columns(const DecodeParams& p, int v_block, int head_block) {
  const int head_blocks = p.num_kv_heads / p.kernel.heads;
  const int width = 2 + p.kernel.heads + p.kernel.tile_width / 8;
  return {p.tile_columns + static_cast<int64_t>(v_block * head_blocks + head_block) * width};
}

// Page of the token that this lane stands for in a tile: asked for one tile ahead of its use, so
// that copies never wait for the block table.
template <typename S>
RECALKV_DEVICE int fetch_page(const DecodeParams& p, int seq, const TokenRange& range, int tile,
                              int lane) {
  const int position = tile * S::kTokens + lane;
  const bool live = lane < S::kTokens && position >= range.first && position < range.end;
  return live ? p.block_table[seq * p.table_stride + position / p.block_size] : -1;
}

// Start the copies of one tile into `stage`: its tokens' columns, then the rotation of its first
// position. Tokens that no row sees, and slots past the sequence's end, become zeros: their memory
// may hold anything, and 0 * NaN would reach the output.
template <typename S>
RECALKV_DEVICE void load_tile(const DecodeParams& p, const SharedLayout<S>& shared,
                              unsigned char* stage, const int32_t* sources, int chunks, int tile,
                              int page, int team_warp, int lane) {
  const int slot = (tile * S::kTokens + lane) % p.block_size;
  const int64_t lane_offset =
      page < 0 ? -1 : page * p.cache_block_stride + slot * p.cache_slot_stride;
  for (int pass = team_warp; pass < S::kTokens / 4; pass += p.kernel.heads) {
    const int row = pass * 4 + lane / 8;
    const int64_t offset = shuffle(lane_offset, row);
    const uint16_t* from = p.kv_cache + (offset < 0 ? 0 : offset);
    unsigned char* to = stage + row * shared.tile_stride * 2;
    for (int chunk = lane % 8; chunk < chunks; chunk += 8) {
      copy_async(to + chunk * 16, from + sources[chunk], offset >= 0);
    }
  }
  if (team_warp == 0 && lane < S::kPairs / 2) {
    const float* from = p.base_rotation + tile * S::kRowTiles * p.base_rotation_stride;
    copy_async(stage + S::kTokens * shared.tile_stride * 2 + lane * 16, from + lane * 4, true);
  }
}

// Wait until at most `pending` of this thread's groups of copies are under way; `pending` < 4.
RECALKV_DEVICE void wait_copies(int pending) {
  if (pending == 0) {
    copy_wait<0>();
  } else if (pending == 1) {
    copy_wait<1>();
  } else if (pending == 2) {
    copy_wait<2>();
  } else {
    copy_wait<3>();
  }
}

// Columns of q that make pair `pair`; a key's columns are in this order already.
RECALKV_DEVICE void pair_columns(const DecodeParams& p, int pair, int& first, int& second) {
  const bool halves = pair < p.rotated_half;
  first = halves ? pair : 2 * pair;
  second = halves ? pair + p.rotated_half : 2 * pair + 1;
}

// What stays in shared memory for the block's life, apart from the factor: query rows in pair order
// (zeros where there is no row), the local rotation, bias, column sources.
template <typename S>
RECALKV_DEVICE void load_constants(const DecodeParams& p, const SharedLayout<S>& shared,
                                   unsigned char* memory, const Rows& rows, const TileColumns& tile,
                                   int first_head) {
  const int per_kv = p.num_heads / p.num_kv_heads;
  uint32_t* query = reinterpret_cast<uint32_t*>(memory + shared.query);
  for (int i = thread_index(); i < p.kernel.heads * S::kColumns * S::kPairs; i += thread_count()) {
    const int pair = i % S::kPairs;
    const int column = i / S::kPairs;
    const int row = rows.begin + column % S::kColumns;
    uint32_t value = 0;
    if (row < rows.end) {
      const int head = (first_head + column / S::kColumns) * per_kv + row % per_kv;
      const uint16_t* from =
          p.q + (rows.first_token + row / per_kv) * p.q_token_stride + head * S::kHeadDim;
      int first, second;
      pair_columns(p, pair, first, second);
      value = from[first] | static_cast<uint32_t>(from[second]) << 16;
    }
    query[column * (S::kQueryStride / 2) + pair] = value;
  }
  float2* rotation = reinterpret_cast<float2*>(memory + shared.rotation);
  const float2* local = reinterpret_cast<const float2*>(p.local_rotation);
  for (int i = thread_index(); i < S::kTokens * S::kPairs; i += thread_count()) {
    rotation[i / S::kPairs * S::kRotationStride + i % S::kPairs] = local[i];
  }
  if (p.k_bias) {
    float* bias = reinterpret_cast<float*>(memory + shared.bias);
    for (int i = thread_index(); i < p.kernel.heads * S::kHeadDim; i += thread_count()) {
      bias[i] = p.k_bias[first_head * S::kHeadDim + i];
    }
  }
  int32_t* sources = reinterpret_cast<int32_t*>(memory + shared.columns);
  for (int i = thread_index(); i < tile.chunks(); i += thread_count()) {
    sources[i] = tile.source(p.kernel.heads, i);
  }
}

}  // namespace recalkv
