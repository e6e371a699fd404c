// Online softmax of one warp, base 2, and the output it weighs.
#pragma once

#include "shape.cuh"

namespace recalkv {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kMinusInfinity = -__builtin_huge_valf();

// A lane's share: columns 2(i%4), 2(i%4) + 1 of every eight query rows, in base-2 logits. `sum` is
// of the lane's own tokens only; `maximum` is the warp's.
template <typename S>
struct RunningSoftmax {
  float maximum[S::kColumnTiles][2];
  float sum[S::kColumnTiles][2];
  float out[S::kVTiles][S::kColumnTiles][4];  // [V column, query row], transposed

  RECALKV_DEVICE void clear() {
#pragma unroll
    for (int c = 0; c < S::kColumnTiles; ++c) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        maximum[c][i] = kMinusInfinity;
        sum[c][i] = 0.0f;
      }
#pragma unroll
      for (int v = 0; v < S::kVTiles; ++v) {
#pragma unroll
        for (int i = 0; i < 4; ++i) out[v][c][i] = 0.0f;
      }
    }
  }
};

// Logits in base 2, minus infinity where a row does not see a token. `row_position` is that of the
// lane's query rows, -1 where there is no row; `position` that of the lane's first token;
// `key_scales` are of its tokens.
template <typename S>
RECALKV_DEVICE void finish_logits(float (&scores)[S::kRowTiles][S::kColumnTiles][4],
                                  const float (&key_scales)[S::kRowTiles][2], const DecodeParams& p,
                                  int position, const int (&row_position)[S::kColumnTiles][2]) {
  const float to_base_2 = p.soft_cap > 0.0f ? p.scale : p.scale * kLog2E;
  const float cap_factor = p.soft_cap > 0.0f ? 2.0f * kLog2E / p.soft_cap : 0.0f;
#pragma unroll
  for (int m = 0; m < S::kRowTiles; ++m) {
#pragma unroll
    for (int c = 0; c < S::kColumnTiles; ++c) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float logit = scores[m][c][i] * to_base_2;
        if (p.key_scales) logit *= key_scales[m][i / 2];
        if (p.soft_cap > 0.0f) {
          // cap tanh(x / cap); the power overflows to infinity, which gives cap as it should.
          logit = p.soft_cap * kLog2E * (1.0f - 2.0f / (exp2_fast(logit * cap_factor) + 1.0f));
        }
        const int distance = row_position[c][i % 2] - (position + m * 16 + i / 2 * 8);
        scores[m][c][i] = distance >= 0 && distance < p.window ? logit : kMinusInfinity;
      }
    }
  }
}

// Fold a tile's logits and values (`values`: the V span's first column of the tile) into `state`.
template <typename S>
RECALKV_DEVICE void accumulate(RunningSoftmax<S>& state,
                               float (&logits)[S::kRowTiles][S::kColumnTiles][4],
                               const uint16_t* values, int tile_stride, int v_tiles, int lane) {
  using Element = typename S::Element;
  float decay[S::kColumnTiles][2];
  uint32_t weights[S::kRowTiles][S::kColumnTiles][2];
#pragma unroll
  for (int c = 0; c < S::kColumnTiles; ++c) {
    float shift[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float highest = state.maximum[c][i];
#pragma unroll
      for (int m = 0; m < S::kRowTiles; ++m) {
        highest = fmaxf(highest, fmaxf(logits[m][c][i], logits[m][c][i + 2]));
      }
      highest = fmaxf(highest, shuffle_xor(highest, 4));
      highest = fmaxf(highest, shuffle_xor(highest, 8));
      highest = fmaxf(highest, shuffle_xor(highest, 16));
      // A row that has seen no token has no maximum to subtract.
      shift[i] = highest == kMinusInfinity ? 0.0f : highest;
      decay[c][i] = exp2_fast(state.maximum[c][i] - shift[i]);
      state.maximum[c][i] = highest;
      state.sum[c][i] *= decay[c][i];
    }
#pragma unroll
    for (int m = 0; m < S::kRowTiles; ++m) {
      float weight[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        weight[i] = exp2_fast(logits[m][c][i] - shift[i % 2]);
        state.sum[c][i % 2] += weight[i];
      }
      // Tokens become the inner dimension of the next product.
      weights[m][c][0] = transpose_matrix(pack<Element>(weight[0], weight[1]));
      weights[m][c][1] = transpose_matrix(pack<Element>(weight[2], weight[3]));
    }
  }
  const uint16_t* row = values + (lane / 16 * 8 + lane % 8) * tile_stride + lane / 8 % 2 * 8;
#pragma unroll
  for (int v = 0; v < S::kVTiles; ++v) {
    if (v >= v_tiles) break;
#pragma unroll
    for (int c = 0; c < S::kColumnTiles; ++c) {
#pragma unroll
      for (int i = 0; i < 4; ++i) state.out[v][c][i] *= decay[c][i % 2];
    }
#pragma unroll
    for (int m = 0; m < S::kRowTiles; ++m) {
      uint32_t value[4];
      load_matrices_transposed(value, row + m * 16 * tile_stride + v * 16);
#pragma unroll
      for (int c = 0; c < S::kColumnTiles; ++c) {
        multiply_add<Element>(state.out[v][c], value, weights[m][c][0], weights[m][c][1]);
      }
    }
  }
}

}  // namespace recalkv
