// The consumer warps of the decode kernel for Hopper. A warpgroup reconstructs the keys of 64
// tokens by asynchronous products; from there on each of its warps is on its own, with 16 of the
// tokens and a running softmax of them.
//
// Fragments are those of mma.m16n8k16, see `scores.cuh`.
#pragma once

#include "hopper_bands.cuh"
#include "hopper_primitives.cuh"
#include "hopper_shape.cuh"
#include "rows.cuh"
#include "scores.cuh"
#include "softmax.cuh"
#include "staging.cuh"

namespace recalkv {

// The maximum of no tokens: finite, so that differences from it are numbers.
constexpr float kNoMaximum = -1e30f;

// What a lane keeps from tile to tile: lane 4g + t has query rows 4c + t of the block, and of a
// tile the tokens g and g + 8 of its warp's.
template <typename S>
struct HopperState {
  float maximum[S::kColumnTiles];  // in base 2, of the warp's tokens
  float sum[S::kColumnTiles];      // of the lane's tokens only
  float out[S::kVTiles][4];        // [V column, query row]: column 2t + c is row 4c + t
  // Of the rows, less that of the lane's first token in the tile at hand; far below where no row
  // is.
  int distance[S::kColumnTiles];

  RECALKV_DEVICE HopperState(const DecodeParams& p, const Rows& rows, int lane) {
#pragma unroll
    for (int c = 0; c < S::kColumnTiles; ++c) {
      maximum[c] = kNoMaximum;
      sum[c] = 0.0f;
      const int row = rows.begin + c * 4 + lane % 4;
      const int query = row / (p.num_heads / p.num_kv_heads);
      distance[c] = row < rows.end ? rows.length - rows.num_queries + query : -(1 << 30);
    }
#pragma unroll
    for (int v = 0; v < S::kVTiles; ++v) {
#pragma unroll
      for (int i = 0; i < 4; ++i) out[v][i] = 0.0f;
    }
  }
};

// keys (+)= rows[64, 64 columns] factor^T; `latents` is the lane's place for `load_matrices` of its
// warp's first 16 columns.
template <typename S>
RECALKV_DEVICE void multiply_chunk(float (&keys)[S::kHeadDim / 2], uint32_t (&rows)[4][4],
                                   const unsigned char* latents, SwizzledOperand factor, bool add) {
#pragma unroll
  for (int k = 0; k < 4; ++k) load_matrices(rows[k], latents + k * 32);
  product_fence();
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    product(typename S::Element{}, keys, rows[k], factor.at(k * 32), add || k > 0);
  }
  product_commit();
  product_wait<0>(keys);
}

// keys = rows[64, k_width] factor^T. Columns past the span's end meet zeros of the factor.
template <typename S>
RECALKV_DEVICE void reconstruct_keys(float (&keys)[S::kHeadDim / 2], const unsigned char* latents,
                                     SwizzledOperand factor, int k_chunks) {
  uint32_t rows[4][4];
  multiply_chunk<S>(keys, rows, latents, factor, false);
#pragma unroll 1
  for (int chunk = 1; chunk < k_chunks; ++chunk) {
    latents += 128;
    factor = factor.at(S::kHeadDim * 128);
    multiply_chunk<S>(keys, rows, latents, factor, true);
  }
}

// Keys of the columns 16m and on, of the lane's two tokens, as a left-hand fragment in float16,
// whatever the elements are: it rounds finer, and one operation turns two pairs. Columns are eight
// pairs' first members, then their second ones; fast pairs are turned by their places in the tile.
// Keys stay as they are: a new value for them would have to be moved to the registers of the next
// tile's products.
template <typename S>
RECALKV_DEVICE void turned_keys(uint32_t (&left)[4], const float (&keys)[S::kHeadDim / 2], int m,
                                const uint4* rotation) {
#pragma unroll
  for (int i = 0; i < 4; ++i) left[i] = pack_finite(keys[8 * m + 2 * i], keys[8 * m + 2 * i + 1]);
  if (m < S::kFastSteps) {
    const uint4 turn = rotation[m * 128];
    turn_pairs(left[0], left[2], turn.x, turn.y);
    turn_pairs(left[1], left[3], turn.z, turn.w);
  }
}

// Scores of the lane's two tokens and its rows: both terms of the product, `offset` tokens from the
// middle of the tile.
template <typename S>
RECALKV_DEVICE void score_keys(float (&scores)[S::kColumnTiles][2],
                               const float (&keys)[S::kHeadDim / 2], const uint4* rotation,
                               const uint4* queries, float offset) {
  float sums[S::kColumnTiles][4];
#pragma unroll
  for (int c = 0; c < S::kColumnTiles; ++c) {
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[c][i] = 0.0f;
  }
#pragma unroll
  for (int m = 0; m < S::kHeadDim / 32; ++m) {
    uint4 query[S::kColumnTiles];
#pragma unroll
    for (int c = 0; c < S::kColumnTiles; ++c)
      query[c] = queries[c * (S::kQueryBytes / 16) + m * 32];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t left[4];
      turned_keys<S>(left, keys, 2 * m + half, rotation);
#pragma unroll
      for (int c = 0; c < S::kColumnTiles; ++c) {
        const uint4 q = query[c];
        multiply_add<Float16>(sums[c], left, half ? q.z : q.x, half ? q.w : q.y);
      }
    }
  }
#pragma unroll
  for (int c = 0; c < S::kColumnTiles; ++c) {
    scores[c][0] = sums[c][0] + offset * sums[c][1];
    scores[c][1] = sums[c][2] + (offset + 8.0f) * sums[c][3];
  }
}

// Fold the lane's logits into the running softmax; `weights` are right-hand fragments of the
// values' products, tokens by query rows.
template <typename S>
RECALKV_DEVICE void weigh(HopperState<S>& state, float (&logits)[S::kTurn][S::kColumnTiles][2],
                          uint32_t (&weights)[S::kTurn][2], const DecodeParams& p) {
  float highest[S::kColumnTiles];
  bool higher = false;
#pragma unroll
  for (int c = 0; c < S::kColumnTiles; ++c) {
    highest[c] = state.maximum[c];
#pragma unroll
    for (int i = 0; i < 2 * S::kTurn; ++i) {
      // Negative distances are tokens after the row's.
      const auto distance =
          static_cast<uint32_t>(state.distance[c] - i / 2 * S::kTokens - i % 2 * 8);
      float& logit = logits[i / 2][c][i % 2];
      if (distance >= static_cast<uint32_t>(p.window)) logit = kMinusInfinity;
      highest[c] = fmaxf(highest[c], logit);
    }
    highest[c] = fmaxf(highest[c], shuffle_xor(highest[c], 4));
    highest[c] = fmaxf(highest[c], shuffle_xor(highest[c], 8));
    highest[c] = fmaxf(highest[c], shuffle_xor(highest[c], 16));
    higher = higher || highest[c] > state.maximum[c];
  }
  if (warp_any(higher)) {
#pragma unroll
    for (int c = 0; c < S::kColumnTiles; ++c) {
      const float decay = exp2_fast(state.maximum[c] - highest[c]);
      state.maximum[c] = highest[c];
      state.sum[c] *= decay;
#pragma unroll
      for (int v = 0; v < S::kVTiles; ++v) {
        state.out[v][c] *= decay;
        state.out[v][c + 2] *= decay;
      }
    }
  }
#pragma unroll
  for (int t = 0; t < S::kTurn; ++t) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float weight[2] = {};
#pragma unroll
      for (int c = 0; c < S::kColumnTiles; ++c) {
        weight[c] = exp2_fast(logits[t][c][i] - state.maximum[c]);
        state.sum[c] += weight[c];
      }
      weights[t][i] = transpose_matrix(pack<typename S::Latent>(weight[0], weight[1]));
    }
  }
}

// Add the warp's 16 tokens' values; `values` is the lane's place for `load_matrices_transposed`: in
// rows, or in slots, with `odd` bytes from there to a slot's second half.
template <typename S>
RECALKV_DEVICE void add_values(HopperState<S>& state, const unsigned char* values, int odd,
                               const uint32_t (&weights)[2], int v_tiles) {
#pragma unroll
  for (int v = 0; v < S::kVTiles; ++v) {
    // Of four at a time: what lies past the span's end adds to sums that nobody reads.
    if (v % 4 == 0 && v >= v_tiles) break;
    uint32_t value[4];
    const int place = S::kBands ? v / 2 * kSlotBytes + (v % 2 ? odd : 0) : v * 32;
    load_matrices_transposed(value, values + place);
    multiply_add<typename S::Latent>(state.out[v], value, weights[0], weights[1]);
  }
}

template <typename S>
RECALKV_DEVICE void consume(const DecodeParams& p, const HopperLayout<S>& shared,
                            unsigned char* memory, const HopperBarriers& barriers,
                            HopperState<S>& state, const Rows& rows, const TokenRange& range,
                            const TileColumns& columns, const BandTable& bands, int kv_head,
                            int v_columns, int lane, int warp) {
  const int group = uniform(warp / 4);
  const int first = warp % 4 * 16;  // of the warp's tokens in a tile
  const int row = first * shared.row_bytes;
  const int k_place = row + lane % 16 * shared.row_bytes + columns.k_offset() * 2 + lane / 16 * 16;
  // Values are columns of the tile, or in the warpgroup's slots.
  const int tile_slots = p.most_blocks * kSlotBytes;
  const int slots = shared.slots + group * S::kTurn * tile_slots;
  const int value = lane / 16 * 8 + lane % 8;
  const int value_word = lane / 8 % 2;
  const int v_place =
      S::kBands
          ? slots + bands.first_value_slot() * kSlotBytes + slot_word(first + value, value_word)
          : row + columns.v_offset(0) * 2 + value * shared.row_bytes + value_word * 16;
  const int v_odd = slot_word(first + value, value_word + 2) - slot_word(first + value, value_word);
  const uint4* rotation =
      reinterpret_cast<const uint4*>(memory + shared.rotation) + warp % 4 * 32 + lane;
  const float2* bias = reinterpret_cast<const float2*>(memory + shared.bias) + lane % 4;
  const int32_t* table = p.block_table + rows.seq * p.table_stride;
  const SwizzledOperand factor = swizzled_operand(memory + shared.factor);
  const int k_chunks = (p.k_width + 63) / 64;
  const BandBlock* blocks = reinterpret_cast<const BandBlock*>(memory + shared.blocks);
  const int k_blocks = S::kBands ? uniform(bands.k_blocks()) : 0;
  const int v_tiles = v_columns / 16;
  const float offset = static_cast<float>(first + lane / 4 - 32);
  const float cap = p.soft_cap * kLog2E;
  const float cap_factor = p.soft_cap > 0.0f ? 2.0f * kLog2E / p.soft_cap : 0.0f;
  const int teams = S::kBands ? p.kernel.teams : 2;
  if (group >= teams) return;
#pragma unroll
  for (int c = 0; c < S::kColumnTiles; ++c) {
    state.distance[c] -= (range.tile_from + group * S::kTurn) * S::kTokens + first + lane / 4;
  }
  // Of the lane's token where latents are in bands. Handed from each lane to itself, or they would
  // be computed anew for every block of columns.
  const int token = first + lane % 16;
  const int token_stage = lane / 16 * shared.stage_bytes;
  const auto codes = static_cast<int>(shuffle(token_stage + token * shared.row_bytes, lane));
  const auto scales =
      static_cast<int>(shuffle(token_stage + shared.scales + token * p.token_scales, lane));
  auto* full = reinterpret_cast<uint64_t*>(shuffle(reinterpret_cast<int64_t>(barriers.full), lane));
  uint64_t* empty = barriers.empty + lane % S::kTurn;
  const int step = teams * S::kTurn;
  const NarrowOperand first_slot = uniform(narrow_operand(memory + slots));
  barrier_wait(barriers.factor, 0);
  RingPlace place = {0, 0};
  place.advance(group * S::kTurn, p.kernel.stages);
#pragma unroll 1
  for (int next = range.tile_from + group * S::kTurn; next < range.tile_to; next += step) {
    const int turn = shared.ring + place.stage * shared.stage_bytes;
    float keys[S::kHeadDim / 2];
    float key_scales[S::kTurn][2];
    if (!S::kLean) {
      // Asked for while the tiles and their keys are waited for.
#pragma unroll
      for (int i = 0; i < 2 * S::kTurn; ++i) {
        const int position = (next + i / 2) * S::kTokens + first + lane / 4 + i % 2 * 8;
        key_scales[i / 2][i % 2] =
            p.key_scales ? key_scale(p, table, range, position, kv_head) : 1.0f;
      }
    }
#pragma unroll
    for (int t = 0; t < S::kTurn; ++t) {
      barrier_wait(full + place.stage + t, place.parity);
    }
    CodedTile coded = {};
    if (S::kBands) {
      coded.codes = turn + codes;
      coded.scales = turn + scales;
#pragma unroll
      for (int i = 0; i < 4; ++i) coded.words[i] = lane / 16 * tile_slots + slot_word(token, i);
      open_blocks(memory, coded, memory + slots, blocks);
      shared_fence();
      team_sync(2 + group, 128);
    }
    float logits[S::kTurn][S::kColumnTiles][2];
#pragma unroll
    for (int t = 0; t < S::kTurn; ++t) {
      const unsigned char* stage = memory + turn + t * shared.stage_bytes;
      if (S::kBands) {
        start_keys<S>(keys, first_slot.at(t * tile_slots), narrow_operand(memory + shared.factor),
                      k_blocks);
        if (t == 0) {
          open_blocks(memory, coded, memory + slots + k_blocks * kSlotBytes, blocks + k_blocks + 1);
        }
        product_wait<0>(keys);
      } else {
        reconstruct_keys<S>(keys, stage + k_place, factor, k_chunks);
      }
      if (!S::kLean && p.k_bias) {
#pragma unroll
        for (int n = 0; n < S::kHeadDim / 8; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) keys[4 * n + i] += i % 2 ? bias[n * 4].y : bias[n * 4].x;
        }
      }
      const uint4* queries = reinterpret_cast<const uint4*>(stage + shared.query) + lane;
      score_keys<S>(logits[t], keys, rotation, queries, offset);
      if (!S::kLean) {
#pragma unroll
        for (int c = 0; c < S::kColumnTiles; ++c) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            float& logit = logits[t][c][i];
            logit *= key_scales[t][i];
            if (p.soft_cap > 0.0f) {
              // cap tanh(x / cap); the power overflows to infinity, which gives cap as it should.
              logit = cap * (1.0f - 2.0f * reciprocal_fast(exp2_fast(logit * cap_factor) + 1.0f));
            }
          }
        }
      }
    }
    uint32_t weights[S::kTurn][2];
    weigh<S>(state, logits, weights, p);
    if (S::kBands) warp_sync();  // values are there
#pragma unroll
    for (int t = 0; t < S::kTurn; ++t) {
      const int values = S::kBands ? t * tile_slots : turn + t * shared.stage_bytes;
      add_values<S>(state, memory + values + v_place, v_odd, weights[t], v_tiles);
    }
    warp_sync();
    if (lane < S::kTurn) barrier_arrive(empty + place.stage);
    place.advance(step, p.kernel.stages);
#pragma unroll
    for (int c = 0; c < S::kColumnTiles; ++c) state.distance[c] -= step * S::kTokens;
  }
}

}  // namespace recalkv
