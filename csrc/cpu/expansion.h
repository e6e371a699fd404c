// Scores of low-frequency rotation pairs without their keys.
//
// Within kStretch positions from b on, cos(f (b + t)) = sum over m of C_m phi_m(t), likewise sin
// with S_m, to below the rounding of a bf16 key. A pair (u, v) of a rotated query (q, q') then
// scores
//   q (u cos - v sin) + q' (v cos + u sin) = sum over m of phi_m(t) (u (q C_m + q' S_m)
//                                                               + v (q' C_m - q S_m)),
// and with u and v linear in the latent, all pairs fold into kTerms vectors per query and stretch
// of positions.
#pragma once

#include "tile.h"

namespace recalkv::RECALKV_ISA {

// Folds the expanded pairs' factors into the queries, for the kStretch positions around `first`:
// absorbed[row][term] = sum over pairs of turned[row][term][pair] · both factor rows of the pair.
template <class Format>
void Attention<Format>::absorb(int head, int64_t first) {
  const int pairs = layer.expanded_pairs, stride = round_up(pairs);
  const float* coefficients = layer.coefficients + first / kStretch * kTerms * 2 * stride;
  const float* bias = layer.k_bias;
  if (bias) bias += int64_t{first_head + head} * layer.head_dim + exact_rows;
  float* shift = offsets + int64_t{head} * rows * kTerms;
  for (int row = 0; row < rows; ++row) {
    const Unit* query =
        queries + (int64_t{head} * rows + row) * depth + layer.exact_pairs * kPairUnits;
    for (int term = 0; term < kTerms; ++term) {
      const float* cosines = coefficients + term * 2 * stride;
      const float* sines = cosines + stride;
      Unit* out = turned + (row * kTerms + term) * stride * kPairUnits;
      float total = 0;
      for (int i = 0; i < pairs; i += kLanes) {
        Vec first_half, second_half;
        Format::load_pairs(query + i * kPairUnits, pairs - i, first_half, second_half);
        const Vec c = load(cosines + i), s = load(sines + i);
        const Vec a = fma(first_half, c, mul(second_half, s));
        const Vec b = fnma(first_half, s, mul(second_half, c));
        Format::store_pairs(out + i * kPairUnits, a, b);
        if (bias) {
          const int count = pairs - i < kLanes ? pairs - i : kLanes;
          float a_lanes[kLanes], b_lanes[kLanes];
          store(a_lanes, a);
          store(b_lanes, b);
          for (int lane = 0; lane < count; ++lane)
            total +=
                a_lanes[lane] * bias[2 * (i + lane)] + b_lanes[lane] * bias[2 * (i + lane) + 1];
        }
      }
      shift[row * kTerms + term] = total;
    }
  }
  Unit* out = absorbed + int64_t{head} * rows * kTerms * k_units;
  const int units = pairs * kPairUnits;
  const Unit* factors = layer.pair_factors + int64_t{first_head + head} * units * layer.k_width;
  products.template run<Format>(rows * kTerms, layer.k_width, {turned, stride * kPairUnits},
                                {factors, layer.k_width}, units, from_zero,
                                [&]<int kR, int kV>(Vec(&acc)[kR][kV], int row, int column)
                                    __attribute__((always_inline)) {
    for_sums(acc, [&](Vec& sum, int i, int j) __attribute__((always_inline)) {
      Format::store_row(out + (row + i) * k_units, column + j * kLanes, sum);
    });
  });
}

// scores[row] = sum over terms of basis[term] · (absorbed[row][term] · z + offset).
template <class Format>
void Attention<Format>::score_expanded(int head, int64_t first) {
  const Unit* rows_in = absorbed + int64_t{head} * rows * kTerms * k_units;
  const float* shift = offsets + int64_t{head} * rows * kTerms;
  const float* basis = layer.basis + first % kStretch;
  products.template run<Format, kTerms>(
      rows * kTerms, kTile, {rows_in, k_units}, {z_columns, kTile}, k_units,
      [&]<int kR, int kV>(Vec(&acc)[kR][kV], int row, int) __attribute__((always_inline)) {
    for_sums(acc, [&](Vec& sum, int i, int)
                      __attribute__((always_inline)) { sum = splat(shift[row + i]); });
  }, [&]<int kR, int kV>(Vec(&acc)[kR][kV], int row, int column) __attribute__((always_inline)) {
    if constexpr (kR == kTerms) {
#pragma GCC unroll 4
      for (int j = 0; j < kV; ++j) {
        Vec score = mul(acc[0][j], load(basis + column + j * kLanes));
#pragma GCC unroll 4
        for (int term = 1; term < kTerms; ++term)
          score = fma(acc[term][j], load(basis + term * kStretch + column + j * kLanes), score);
        store(scores + row / kTerms * kTile + column + j * kLanes, score);
      }
    }
  });
}

}  // namespace recalkv::RECALKV_ISA
