// The producer warps of the decode kernel for Hopper: one copies latents into the ring, one for
// every four query rows turns these back by each tile's position.
#pragma once

#include "hopper_primitives.cuh"
#include "hopper_shape.cuh"
#include "rows.cuh"
#include "softmax.cuh"
#include "staging.cuh"

namespace recalkv {

// Where the 16 tokens of a quarter of a tile are: pages are multiples of 16 tokens. Eight lanes
// follow a quarter from tile to tile, without a division, and ask for its page one tile ahead.
struct PageWalk {
  int position;  // of the quarter's first token
  int index;     // of its page in the block table
  int slot;      // in its page
  int page;
  int index_step, slot_step;

  RECALKV_DEVICE PageWalk(const DecodeParams& p, const TokenRange& range, const int32_t* table,
                          int lane) {
    position = range.tile_from * 64 + lane / 8 * 16;
    index = position / p.block_size;
    slot = position % p.block_size;
    index_step = 64 / p.block_size;
    slot_step = 64 % p.block_size;
    fetch(range, table);
  }

  // Quarters without a visible token are not copied: any page will do.
  RECALKV_DEVICE void fetch(const TokenRange& range, const int32_t* table) {
    page = position + 16 > range.first && position < range.end ? table[index] : 0;
  }

  // Bit i: whether a row sees token i.
  RECALKV_DEVICE uint32_t seen(const TokenRange& range) const {
    const int end = range.end - position;
    const int first = range.first - position;
    const uint32_t before_end = end < 16 ? (1u << (end > 0 ? end : 0)) - 1 : ~0u;
    return before_end & ~((1u << (first < 0 ? 0 : first > 16 ? 16 : first)) - 1);
  }

  RECALKV_DEVICE void next(const DecodeParams& p, const TokenRange& range, const int32_t* table) {
    position += 64;
    index += index_step;
    slot += slot_step;
    if (slot >= p.block_size) {
      slot -= p.block_size;
      ++index;
    }
    fetch(range, table);
  }
};

// Start the copies of 16-byte chunks of 16 rows into `to`, by eight lanes; `from` is the first row.
// A row has `kLanes` of them. Bit i of `live`: whether row i + lane % 8 / kLanes is copied, else
// zeroed; `kWhole`: all are. Lanes copy `kLines` times `kLanes` chunks at a time, which lie one
// after the other.
template <bool kWhole, int kLanes, int kLines>
RECALKV_DEVICE void copy_rows(unsigned char* to, int row_bytes, const char* from, int slot_bytes,
                              const int32_t* sources, int chunks, uint32_t live, int lane) {
  constexpr int kRows = 8 / kLanes;  // at once
  const int row = lane % 8 / kLanes;
#pragma unroll 1
  for (int chunk = lane % kLanes; chunk < chunks; chunk += kLanes * kLines) {
    const char* slot = from + (2 * sources[chunk] + row * slot_bytes);
    unsigned char* place = to + row * row_bytes + chunk * 16;
#pragma unroll
    for (int i = 0; i < 16; i += kRows) {
#pragma unroll
      for (int line = 0; line < kLines; ++line) {
        copy_async(place + line * 16 * kLanes, slot + line * 16 * kLanes,
                   kWhole || (live >> i & 1));
      }
      place += kRows * row_bytes;
      slot += kRows * slot_bytes;
    }
  }
}

// The same of scales, as a page has them: those of 16 tokens lie together.
RECALKV_DEVICE void copy_scales(unsigned char* to, const unsigned char* from, int token_scales,
                                int lane) {
  to += lane % 8 * 16;
  from += lane % 8 * 16;
#pragma unroll 1
  for (int chunk = lane % 8; chunk < token_scales; chunk += 32) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (chunk + 8 * i < token_scales) copy_async(to + 128 * i, from + 128 * i, true);
    }
    to += 4 * 128;
    from += 4 * 128;
  }
}

// The same at an edge of what is seen: bytes, and zeros for tokens that no row sees. Bit i of
// `live`: whether token i is seen.
RECALKV_DEVICE void copy_edge_scales(unsigned char* to, const unsigned char* from, int token_scales,
                                     uint32_t live, int lane) {
#pragma unroll 1
  for (int token = 0; token < 16; ++token) {
    for (int i = lane % 8; i < token_scales; i += 8) {
      const int place = token * token_scales + i;
      to[place] = live >> token & 1 ? from[place] : 0;
    }
  }
}

// The lane's share of four query rows, as float: of row lane/8, the pairs 16m + 2 (lane%8) + h.
//
// Slow pairs turn back to the middle of the tile, and their score is the first two terms in the
// offset from it. `slow_rotation` has, of each pair, the first term's factor, the second's relative
// to it, and the cosine and sine of the way to the middle; those of a fast pair are 2, 0, 1, 0,
// since it turns by halves.
template <typename S>
struct QueryShare {
  static constexpr int kSteps = S::kHeadDim / 32;
  float2 query[kSteps][2];
  float second[kSteps][2];
  float4 base[kSteps];  // of the next tile

  RECALKV_DEVICE static int pair_of(int lane, int m, int half) {
    return 16 * m + lane % 8 * 2 + half;
  }

  RECALKV_DEVICE void fetch_base(const float* row, int lane) {
#pragma unroll
    for (int m = 0; m < kSteps; ++m) {
      base[m] = reinterpret_cast<const float4*>(row)[8 * m + lane % 8];
    }
  }

  // `first_row` is the first of the four.
  RECALKV_DEVICE void load(const DecodeParams& p, const Rows& rows, int first_row, int kv_head,
                           int lane) {
    const int per_kv = p.num_heads / p.num_kv_heads;
    const float unit = S::kBands ? 1 << kKeyScale : 1;
    const float scale = unit * (p.soft_cap > 0.0f ? p.scale : p.scale * kLog2E);
    const int row = first_row + lane / 8;
    const int head = kv_head * per_kv + row % per_kv;
    const uint16_t* from =
        p.q + (rows.first_token + row / per_kv) * p.q_token_stride + head * S::kHeadDim;
#pragma unroll
    for (int m = 0; m < kSteps; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int pair = pair_of(lane, m, half);
        const float4 slow = reinterpret_cast<const float4*>(p.slow_rotation)[pair];
        second[m][half] = slow.y;
        float2 q = {0.0f, 0.0f};
        if (row < rows.end) {
          int first, second;
          pair_columns(p, pair, first, second);
          q = unpack<typename S::Element>(from[first] | static_cast<uint32_t>(from[second]) << 16);
        }
        const float first_term = slow.x * scale;
        query[m][half] = rotate({q.x * first_term, q.y * first_term}, {slow.z, -slow.w});
      }
    }
  }

  // Right-hand fragments of the tile's scores, in float16; columns 2r and 2r + 1 are row r's two
  // terms.
  RECALKV_DEVICE void store(unsigned char* to, int lane) const {
#pragma unroll
    for (int m = 0; m < kSteps; ++m) {
      const float2 first = rotate(query[m][0], {base[m].x, -base[m].y});
      const float2 other = rotate(query[m][1], {base[m].z, -base[m].w});
      const float* term = second[m];
      const uint2 value = {pack_finite(first.x, other.x), pack_finite(first.y, other.y)};
      const uint2 derivative = {pack_finite(first.y * term[0], other.y * term[1]),
                                pack_finite(-(first.x * term[0]), -(other.x * term[1]))};
      uint2* place =
          reinterpret_cast<uint2*>(to) + (m * 32 + lane / 8 * 8 + lane % 4) * 2 + lane / 4 % 2;
      place[0] = value;
      // Those of fast pairs are the zeros that the ring began with.
      if (16 * m + 16 > 8 * S::kFastSteps) place[8] = derivative;
    }
  }
};

template <typename S>
RECALKV_DEVICE void produce_latents(const DecodeParams& p, const HopperLayout<S>& shared,
                                    unsigned char* memory, const HopperBarriers& barriers,
                                    const Rows& rows, const TokenRange& range,
                                    const TileColumns& columns, int factor_index, int lane) {
  if (lane == 0) {
    // One head's factor, as it lies in shared memory, and the rotations of the fast pairs.
    const int factor_bytes = shared.factor_bytes;
    const int rotation_bytes = S::kFastSteps * 2048;
    const char* factor = static_cast<const char*>(p.k_factor);
    barrier_expect(barriers.factor, factor_bytes + rotation_bytes);
    copy_bulk(memory + shared.factor, factor + static_cast<int64_t>(factor_index) * factor_bytes,
              factor_bytes, barriers.factor);
    copy_bulk(memory + shared.rotation, p.local_rotation, rotation_bytes, barriers.factor);
  }
  const int32_t* sources = reinterpret_cast<const int32_t*>(memory + shared.columns);
  const int64_t row = reinterpret_cast<int64_t>(p.block_table + rows.seq * p.table_stride);
  const auto* table = reinterpret_cast<const int32_t*>(shuffle(row, lane));
  const int chunks = columns.chunks();
  // Whether the columns are one piece of whole pairs of lines of 128 bytes.
  bool pieces = chunks % 16 != 0;
  for (int i = lane; i < chunks; i += 32) pieces = pieces || sources[i] != sources[0] + 8 * i;
  const bool pairs_of_lines = !warp_any(pieces);
  PageWalk pages(p, range, table, lane);
  const int quarter = lane / 8 * 16;  // its first row in a tile
  // Handed from each lane to itself, or they would be computed anew for every tile.
  const int64_t cache = shuffle(reinterpret_cast<int64_t>(p.kv_cache), lane);
  const int64_t page_bytes = shuffle(2 * p.cache_block_stride, lane);
  const int slot_bytes = static_cast<int>(shuffle(2 * p.cache_slot_stride, lane));
  const int64_t codes = shuffle(cache + 2 * p.block_size * p.cache_slot_stride, lane);
  RingPlace place = {0, 1};
#pragma unroll 1
  for (int tile = range.tile_from; tile < range.tile_to; ++tile) {
    const int position = tile * S::kTokens;
    uint64_t* full = barriers.full + place.stage;
    barrier_wait(barriers.empty + place.stage, place.parity);
    const int64_t page = static_cast<uint32_t>(pages.page) * page_bytes;
    const auto* from = reinterpret_cast<const char*>(cache + page) + pages.slot * slot_bytes;
    const auto* scales =
        reinterpret_cast<const unsigned char*>(codes + page) + pages.slot * p.token_scales;
    unsigned char* stage = memory + shared.ring + place.stage * shared.stage_bytes;
    unsigned char* to = stage + quarter * shared.row_bytes;
    unsigned char* scales_to = stage + shared.scales + quarter * p.token_scales;
    if (range.first <= position && position + S::kTokens <= range.end) {
      if (S::kBands && chunks <= 4) {
        copy_rows<true, 4, 1>(to, shared.row_bytes, from, slot_bytes, sources, chunks, 0, lane);
      } else if (pairs_of_lines) {
        copy_rows<true, 8, 2>(to, shared.row_bytes, from, slot_bytes, sources, chunks, 0, lane);
      } else {
        copy_rows<true, 8, 1>(to, shared.row_bytes, from, slot_bytes, sources, chunks, 0, lane);
      }
      if (S::kBands) copy_scales(scales_to, scales, p.token_scales, lane);
      copy_arrive(full);
    } else {
      // Tokens that no row sees, and slots past the sequence's end, become zeros: see `load_tile`.
      const uint32_t live = pages.seen(range);
      copy_rows<false, 8, 1>(to, shared.row_bytes, from, slot_bytes, sources, chunks, live, lane);
      if (S::kBands) copy_edge_scales(scales_to, scales, p.token_scales, live, lane);
      copy_commit();
      copy_wait<0>();
      barrier_arrive(full);
    }
    pages.next(p, range, table);
    place.advance(1, p.kernel.stages);
  }
  copy_wait<0>();
}

// Of four of the block's rows, the `column_tile`-th.
template <typename S>
RECALKV_DEVICE void produce_queries(const DecodeParams& p, const HopperLayout<S>& shared,
                                    unsigned char* memory, const HopperBarriers& barriers,
                                    const Rows& rows, const TokenRange& range, int column_tile,
                                    int kv_head, int lane) {
  QueryShare<S> queries;
  queries.load(p, rows, rows.begin + 4 * column_tile, kv_head, lane);
  const int query = shared.query + column_tile * S::kQueryBytes;
  const float* base = p.base_rotation + range.tile_from * 4 * p.base_rotation_stride;
  queries.fetch_base(base, lane);
  RingPlace place = {0, 1};
#pragma unroll 1
  for (int tile = range.tile_from; tile < range.tile_to; ++tile) {
    unsigned char* stage = memory + shared.ring + place.stage * shared.stage_bytes;
    barrier_wait(barriers.empty + place.stage, place.parity);
    queries.store(stage + query, lane);
    warp_sync();
    if (lane == 0) barrier_arrive(barriers.full + place.stage);
    base += 4 * p.base_rotation_stride;
    // The last turn may have a tile with no token, and the table no row for it.
    if ((tile + 1) * S::kTokens < range.end) queries.fetch_base(base, lane);
    place.advance(1, p.kernel.stages);
  }
}

}  // namespace recalkv
