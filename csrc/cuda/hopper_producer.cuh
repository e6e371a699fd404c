// The producer warps of the decode kernel for Hopper: one copies latents into the ring, one turns
// the queries back by each tile's position.
#pragma once

#include "hopper_primitives.cuh"
#include "hopper_shape.cuh"
#include "rows.cuh"
#include "softmax.cuh"
#include "staging.cuh"

namespace recalkv {

// Where the 16 tokens of a quarter of a tile are: pages are multiples of 16 tokens. Lane i < 4
// follows quarter i from tile to tile, without a division, and asks for its page one tile ahead.
struct PageWalk {
  int position;  // of the quarter's first token
  int index;     // of its page in the block table
  int slot;      // in its page
  int page;
  int index_step, slot_step;

  RECALKV_DEVICE PageWalk(const DecodeParams& p, const TokenRange& range, const int32_t* table,
                          int lane) {
    position = range.tile_from * 64 + lane % 4 * 16;
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

// Start the copies of 16-byte chunks of 64 rows into `to`; `from` has the first row of every 16. A
// row has `kLanes` lanes. Bit i of `live`: whether row 4i + lane/8 is copied, else zeroed;
// `kWhole`: all are. Lanes copy `kLines` times `kLanes` chunks at a time, which lie one after the
// other.
template <bool kWhole, int kLanes, int kLines>
RECALKV_DEVICE void copy_rows(const DecodeParams& p, unsigned char* to, int row_bytes,
                              const int32_t* sources, int chunks, const char* const (&from)[4],
                              uint32_t live, int lane) {
  constexpr int kRows = 32 / kLanes;  // at once
  const int row = lane / kLanes;
  const int64_t step = 2 * kRows * p.cache_slot_stride;
#pragma unroll 1
  for (int chunk = lane % kLanes; chunk < chunks; chunk += kLanes * kLines) {
    const int64_t source = 2 * (sources[chunk] + row * p.cache_slot_stride);
    unsigned char* place = to + row * row_bytes + chunk * 16;
#pragma unroll
    for (int quarter = 0; quarter < 4; ++quarter) {
      const char* slot = from[quarter] + source;
#pragma unroll
      for (int i = 0; i < 16 / kRows; ++i) {
#pragma unroll
        for (int line = 0; line < kLines; ++line) {
          copy_async(place + line * 16 * kLanes, slot + line * 16 * kLanes,
                     kWhole || (live >> (4 * quarter + i) & 1));
        }
        place += kRows * row_bytes;
        slot += step;
      }
    }
  }
}

// Start the copies of the tile that begins at `position`. Tokens that no row sees, and slots past
// the sequence's end, become zeros: see `load_tile`.
template <typename S>
RECALKV_DEVICE void copy_latents(const DecodeParams& p, const HopperLayout<S>& shared,
                                 unsigned char* to, const int32_t* sources, int chunks,
                                 bool pairs_of_lines, const TokenRange& range, int position,
                                 const PageWalk& pages, int lane) {
  const int64_t quarter = pages.page * p.cache_block_stride + pages.slot * p.cache_slot_stride;
  const char* from[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    from[i] = reinterpret_cast<const char*>(p.kv_cache) + shuffle(2 * quarter, i);
  }
  if (range.first <= position && position + 64 <= range.end) {
    if (S::kBands && chunks <= 4) {
      copy_rows<true, 4, 1>(p, to, shared.row_bytes, sources, chunks, from, 0, lane);
    } else if (pairs_of_lines) {
      copy_rows<true, 8, 2>(p, to, shared.row_bytes, sources, chunks, from, 0, lane);
    } else {
      copy_rows<true, 8, 1>(p, to, shared.row_bytes, sources, chunks, from, 0, lane);
    }
  } else {
    const int row = lane / 8;
    const int dead = (range.first - position - row + 3) >> 2;
    const int end = (range.end - position - row + 3) >> 2;
    const uint32_t after = dead > 0 ? ~0u << dead : ~0u;
    const uint32_t live = end < 16 ? after & ~(~0u << end) : after;
    copy_rows<false, 8, 1>(p, to, shared.row_bytes, sources, chunks, from, live, lane);
  }
}

// Bring the scales of a tile of coded latents to `to`, as a page has them: those of the 16 tokens
// of a quarter lie together. At the edges of what is seen they are copied one by one, with zeros
// for tokens that no row sees.
RECALKV_DEVICE void copy_scales(const DecodeParams& p, unsigned char* to, uint64_t* full,
                                const TokenRange& range, int position, const PageWalk& pages,
                                int lane) {
  const int quarter_bytes = 16 * p.token_scales;
  const int64_t codes = p.block_size * p.cache_slot_stride;
  const unsigned char* from = reinterpret_cast<const unsigned char*>(
                                  p.kv_cache + pages.page * p.cache_block_stride + codes) +
                              pages.slot * p.token_scales;
  if (range.first <= position && position + 64 <= range.end) {
    if (lane == 0) barrier_expect(full, 4 * quarter_bytes);
    if (lane < 4) copy_bulk(to + lane * quarter_bytes, from, quarter_bytes, full);
    return;
  }
#pragma unroll 1
  for (int i = 0; i < 4; ++i) {
    const auto* quarter =
        reinterpret_cast<const unsigned char*>(shuffle(reinterpret_cast<int64_t>(from), i));
    for (int scale = lane; scale < quarter_bytes; scale += 32) {
      const int token = position + 16 * i + scale / p.token_scales;
      const bool live = token >= range.first && token < range.end;
      to[i * quarter_bytes + scale] = live ? quarter[scale] : 0;
    }
  }
  warp_sync();
  if (lane == 0) barrier_arrive(full);
}

// The lane's share of the query rows, as float: of row lane/8 of every four, the pairs 16m + 8b +
// 4h + lane%4, where b is bit 2 of the lane.
//
// Slow pairs turn back to the middle of the tile, and their score is the first two terms in the
// offset from it. `slow_rotation` has, of each pair, the first term's factor, the second's relative
// to it, and the cosine and sine of the way to the middle; those of a fast pair are 1, 0, 1, 0.
template <typename S>
struct QueryShare {
  static constexpr int kSteps = S::kHeadDim / 32;
  float2 query[S::kColumnTiles][kSteps][2];
  float second[kSteps][2];
  float2 base[kSteps][2];  // of the next tile

  RECALKV_DEVICE static int pair_of(int lane, int m, int half) {
    return 16 * m + lane / 4 % 2 * 8 + half * 4 + lane % 4;
  }

  RECALKV_DEVICE void fetch_base(const float* row, int lane) {
#pragma unroll
    for (int m = 0; m < kSteps; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        base[m][half] = reinterpret_cast<const float2*>(row)[pair_of(lane, m, half)];
      }
    }
  }

  RECALKV_DEVICE void load(const DecodeParams& p, const Rows& rows, int kv_head, int lane) {
    const int per_kv = p.num_heads / p.num_kv_heads;
    const float scale = p.soft_cap > 0.0f ? p.scale : p.scale * kLog2E;
#pragma unroll
    for (int m = 0; m < kSteps; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int pair = pair_of(lane, m, half);
        const float4 slow = reinterpret_cast<const float4*>(p.slow_rotation)[pair];
        second[m][half] = slow.y;
#pragma unroll
        for (int c = 0; c < S::kColumnTiles; ++c) {
          const int row = rows.begin + c * 4 + lane / 8;
          float2 q = {0.0f, 0.0f};
          if (row < rows.end) {
            const int head = kv_head * per_kv + row % per_kv;
            const uint16_t* from =
                p.q + (rows.first_token + row / per_kv) * p.q_token_stride + head * S::kHeadDim;
            int first, second;
            pair_columns(p, pair, first, second);
            q = unpack<typename S::Element>(from[first] | static_cast<uint32_t>(from[second])
                                                              << 16);
          }
          const float first_term = slow.x * scale;
          query[c][m][half] = rotate({q.x * first_term, q.y * first_term}, {slow.z, -slow.w});
        }
      }
    }
  }

  // Right-hand fragments of the tile's scores; columns 2r and 2r + 1 are row r's two terms.
  RECALKV_DEVICE void store(unsigned char* to, int lane) const {
    using Element = typename S::Element;
#pragma unroll
    for (int c = 0; c < S::kColumnTiles; ++c) {
#pragma unroll
      for (int m = 0; m < kSteps; ++m) {
        uint2 value, derivative;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float2 turned = rotate(query[c][m][half], {base[m][half].x, -base[m][half].y});
          const float term = second[m][half];
          (half ? value.y : value.x) = pack<Element>(turned.x, turned.y);
          (half ? derivative.y : derivative.x) = pack<Element>(turned.y * term, -(turned.x * term));
        }
        uint2* place = reinterpret_cast<uint2*>(to + c * S::kQueryBytes) +
                       (m * 32 + lane / 8 * 8 + lane % 4) * 2 + lane / 4 % 2;
        place[0] = value;
        // Those of fast pairs are the zeros that the ring began with.
        if (16 * m + 16 > 4 * S::kFastTiles) place[8] = derivative;
      }
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
    const int rotation_bytes = S::kFastTiles * 2048;
    const char* factor = static_cast<const char*>(p.k_factor);
    barrier_expect(barriers.factor, factor_bytes + rotation_bytes);
    copy_bulk(memory + shared.factor, factor + static_cast<int64_t>(factor_index) * factor_bytes,
              factor_bytes, barriers.factor);
    copy_bulk(memory + shared.rotation, p.local_rotation, rotation_bytes, barriers.factor);
  }
  const int32_t* sources = reinterpret_cast<const int32_t*>(memory + shared.columns);
  const int32_t* table = p.block_table + rows.seq * p.table_stride;
  const int chunks = columns.chunks();
  // Whether the columns are one piece of whole pairs of lines of 128 bytes.
  bool pieces = chunks % 16 != 0;
  for (int i = lane; i < chunks; i += 32) pieces = pieces || sources[i] != sources[0] + 8 * i;
  const bool pairs_of_lines = !warp_any(pieces);
  PageWalk pages(p, range, table, lane);
  RingPlace place = {0, 1};
#pragma unroll 1
  for (int tile = range.tile_from; tile < range.tile_to; ++tile) {
    barrier_wait(barriers.empty + place.stage, place.parity);
    unsigned char* stage = memory + shared.ring + place.stage * shared.stage_bytes;
    copy_latents<S>(p, shared, stage, sources, chunks, pairs_of_lines, range, tile * S::kTokens,
                    pages, lane);
    if (S::kBands) {
      copy_scales(p, stage + shared.scales, barriers.full + place.stage, range, tile * S::kTokens,
                  pages, lane);
    }
    copy_arrive(barriers.full + place.stage);
    pages.next(p, range, table);
    place.advance(1, p.kernel.stages);
  }
  copy_wait<0>();
}

template <typename S>
RECALKV_DEVICE void produce_queries(const DecodeParams& p, const HopperLayout<S>& shared,
                                    unsigned char* memory, const HopperBarriers& barriers,
                                    const Rows& rows, const TokenRange& range, int kv_head,
                                    int lane) {
  QueryShare<S> queries;
  queries.load(p, rows, kv_head, lane);
  const float* base = p.base_rotation + range.tile_from * 4 * p.base_rotation_stride;
  queries.fetch_base(base, lane);
  RingPlace place = {0, 1};
#pragma unroll 1
  for (int tile = range.tile_from; tile < range.tile_to; ++tile) {
    unsigned char* stage = memory + shared.ring + place.stage * shared.stage_bytes;
    barrier_wait(barriers.empty + place.stage, place.parity);
    queries.store(stage + shared.query, lane);
    warp_sync();
    if (lane == 0) barrier_arrive(barriers.full + place.stage);
    base += 4 * p.base_rotation_stride;
    if (tile + 1 < range.tile_to) queries.fetch_base(base, lane);
    place.advance(1, p.kernel.stages);
  }
}

}  // namespace recalkv
