// One warp's keys of a tile, and their scores against its query rows.
//
// Fragments are those of mma.m16n8k16: lane i has, of a 16x8 result, rows i/4 and i/4 + 8 and
// columns 2(i%4), 2(i%4) + 1. Two neighboring columns of a key are one rotation pair, so rotation
// happens inside a lane, and two neighboring results of 8 columns are the left operand of the next
// product without any exchange.
#pragma once

#include "shape.cuh"

namespace recalkv {

RECALKV_DEVICE float2 rotate(float2 x, float2 turn) {
  return {x.x * turn.x - x.y * turn.y, x.y * turn.x + x.x * turn.y};
}

// What a warp scores: its head's part of the block's shared memory.
struct ScoreInputs {
  const uint4* factor;     // [d/16, k_width/16, lane]
  const uint32_t* query;   // [columns, query stride / 2]
  const float2* rotation;  // [tokens, rotation stride]: by a token's place in its tile
  const float2* bias;      // [pairs] or null
  int k_offset;            // of the K span in a tile's rows
};

// keys[row tile][8 columns] += tile[tokens, k_width] factor[columns, k_width]^T, kChunk columns.
template <typename S>
RECALKV_DEVICE void reconstruct(float (&keys)[S::kRowTiles][S::kChunk / 8][4], const uint16_t* tile,
                                int tile_stride, const uint4* factor, int k_tiles, int lane) {
  const uint16_t* row = tile + lane % 16 * tile_stride + lane / 16 * 8;
#pragma unroll S::kUnroll
  for (int k = 0; k < k_tiles; ++k) {
    uint32_t latents[S::kRowTiles][4];
#pragma unroll
    for (int m = 0; m < S::kRowTiles; ++m) {
      load_matrices(latents[m], row + m * 16 * tile_stride + k * 16);
    }
#pragma unroll
    for (int n = 0; n < S::kChunk / 16; ++n) {
      const uint4 up = factor[(n * k_tiles + k) * 32 + lane];
#pragma unroll
      for (int m = 0; m < S::kRowTiles; ++m) {
        multiply_add<typename S::Element>(keys[m][2 * n], latents[m], up.x, up.y);
        multiply_add<typename S::Element>(keys[m][2 * n + 1], latents[m], up.z, up.w);
      }
    }
  }
}

// scores[row tile][column tile] = K q^T for one tile, K without its tokens' factors.
//
// Keys are rotated by their place in the tile and queries back by the tile's first position
// (`base`): q R(-base) is all that a tile needs of the big table.
template <typename S>
RECALKV_DEVICE void score_tile(float (&scores)[S::kRowTiles][S::kColumnTiles][4],
                               const DecodeParams& p, const ScoreInputs& in, const uint16_t* tile,
                               int tile_stride, const float2* base, int lane) {
  using Element = typename S::Element;
  const int group = lane / 4;
  const int member = lane % 4;
  const int k_tiles = p.k_width / 16;
#pragma unroll
  for (int m = 0; m < S::kRowTiles; ++m) {
#pragma unroll
    for (int n = 0; n < S::kColumnTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) scores[m][n][i] = 0.0f;
    }
  }
#pragma unroll 1
  for (int chunk = 0; chunk < S::kHeadDim / S::kChunk; ++chunk) {
    float keys[S::kRowTiles][S::kChunk / 8][4];
    const int first_pair = chunk * (S::kChunk / 2) + member;
#pragma unroll
    for (int n = 0; n < S::kChunk / 8; ++n) {
      const float2 bias = in.bias ? in.bias[first_pair + n * 4] : float2{0.0f, 0.0f};
#pragma unroll
      for (int m = 0; m < S::kRowTiles; ++m) {
        keys[m][n][0] = keys[m][n][2] = bias.x;
        keys[m][n][1] = keys[m][n][3] = bias.y;
      }
    }
    reconstruct<S>(keys, tile + in.k_offset, tile_stride,
                   in.factor + chunk * (S::kChunk / 16) * k_tiles * 32, k_tiles, lane);
#pragma unroll
    for (int n = 0; n < S::kChunk / 16; ++n) {
      const int pair = first_pair + n * 8;
      uint32_t queries[S::kColumnTiles][2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float2 back = {base[pair + half * 4].x, -base[pair + half * 4].y};
#pragma unroll
        for (int c = 0; c < S::kColumnTiles; ++c) {
          const uint32_t q = in.query[(c * 8 + group) * (S::kQueryStride / 2) + pair + half * 4];
          const float2 turned = rotate(unpack<Element>(q), back);
          queries[c][half] = pack<Element>(turned.x, turned.y);
        }
      }
#pragma unroll
      for (int m = 0; m < S::kRowTiles; ++m) {
        uint32_t turned_keys[4];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float (&key)[4] = keys[m][2 * n + half];
          const float2* turn =
              in.rotation + (m * 16 + group) * S::kRotationStride + pair + half * 4;
          const float2 upper = rotate({key[0], key[1]}, turn[0]);
          const float2 lower = rotate({key[2], key[3]}, turn[8 * S::kRotationStride]);
          turned_keys[half * 2] = pack<Element>(upper.x, upper.y);
          turned_keys[half * 2 + 1] = pack<Element>(lower.x, lower.y);
        }
#pragma unroll
        for (int c = 0; c < S::kColumnTiles; ++c) {
          multiply_add<Element>(scores[m][c], turned_keys, queries[c][0], queries[c][1]);
        }
      }
    }
  }
}

}  // namespace recalkv
