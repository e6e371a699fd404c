// Keys of one head from a tile's latents, and its values.
#pragma once

#include "tile.h"

namespace recalkv::RECALKV_ISA {

// keys = RoPE(L z + b), without the factors of key_scale.
template <class Format>
void Attention<Format>::reconstruct(int head, int64_t tile) {
  const Unit* factors = layer.k_factors + int64_t{head} * layer.head_dim * k_units;
  const float* bias = layer.k_bias ? layer.k_bias + int64_t{head} * layer.head_dim : nullptr;
  const float* cosines =
      layer.rot_pairs ? layer.rope + tile * 2 * layer.rot_pairs * kTile : nullptr;
  const float* sines = cosines + int64_t{layer.rot_pairs} * kTile;
  products.template run<Format>(
      exact_rows, kTile, {factors, k_units}, {z_columns, kTile}, k_units,
      [&]<int kR, int kV>(Vec(&acc)[kR][kV], int row, int) __attribute__((always_inline)) {
    prefetch_some();
    for_sums(acc, [&](Vec& sum, int i, int)
                      __attribute__((always_inline)) { sum = splat(bias ? bias[row + i] : 0.0f); });
  }, [&]<int kR, int kV>(Vec(&acc)[kR][kV], int row, int column) __attribute__((always_inline)) {
    if constexpr (kR % 2 == 0) {
#pragma GCC unroll 3
      for (int i = 0; i < kR; i += 2) {
        const int pair = (row + i) / 2;
        Unit* out = keys + int64_t{row + i} / Format::kPerUnit * kTile + column;
#pragma GCC unroll 4
        for (int j = 0; j < kV; ++j) {
          Vec a = acc[i][j], b = acc[i + 1][j];
          if (pair < layer.rot_pairs) {
            const Vec cosine = load(cosines + pair * kTile + column + j * kLanes);
            const Vec sine = load(sines + pair * kTile + column + j * kLanes);
            const Vec turned = fnma(b, sine, mul(a, cosine));
            b = fma(b, cosine, mul(a, sine));
            a = turned;
          }
          Format::store_pair(out + j * kLanes, kTile, a, b);
        }
      }
    }
  });
}

// values = L_v z without the bias: weights of a softmax sum to one, so that finish() adds it.
template <class Format>
void Attention<Format>::reconstruct_values(int head) {
  const Unit* panel = layer.v_panel + int64_t{head} * v_units * width;
  products.template run<Format>(kTile, width, {z_rows, v_units}, {panel, width}, v_units, from_zero,
                                [&]<int kR, int kV>(Vec(&acc)[kR][kV], int row, int column)
                                    __attribute__((always_inline)) {
    if constexpr (kR % 2 == 0) {
#pragma GCC unroll 3
      for (int i = 0; i < kR; i += 2)
#pragma GCC unroll 4
        for (int j = 0; j < kV; ++j)
          Format::store_pair(values + (row + i) / Format::kPerUnit * width + column + j * kLanes,
                             width, acc[i][j], acc[i + 1][j]);
    }
  });
}

}  // namespace recalkv::RECALKV_ISA
