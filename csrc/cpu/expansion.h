// Scores of low-frequency rotation pairs without their keys.
//
// Within the tile from b on, cos(f (b + t)) = sum over m of C_m phi_m(t), likewise sin with S_m, to
// below the rounding of a bf16 key. A pair (u, v) of a rotated query (q, q') then scores
//   q (u cos - v sin) + q' (v cos + u sin) = sum over m of phi_m(t) (u (q C_m + q' S_m)
//                                                               + v (q' C_m - q S_m)),
// and with u and v linear in the latent, all pairs fold into a vector per query and function.
//
// The lowest frequencies do so with the functions of a whole stretch of tiles. These are
// combinations of phi_m in each of its tiles, and so are their vectors.
#pragma once

#include "tile.h"

namespace recalkv::RECALKV_ISA {

// turned[row][term] = the turned members of the head's queries' `pairs` pairs from `first_pair` on,
// and shift[row][term] the key bias' share of their scores.
template <class Format>
void Attention<Format>::turn(int head, int first_pair, int pairs, int terms,
                             const float* coefficients, float* shift) {
  const int stride = round_up(pairs);
  const float* bias = layer.k_bias;
  if (bias) bias += int64_t{first_head + head} * layer.head_dim + 2 * first_pair;
  for (int row = 0; row < rows; ++row) {
    const Unit* query = queries + (int64_t{head} * rows + row) * depth + first_pair * kPairUnits;
    for (int term = 0; term < terms; ++term) {
      const float* cosines = coefficients + term * 2 * stride;
      const float* sines = cosines + stride;
      Unit* out = turned + (row * terms + term) * stride * kPairUnits;
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
      shift[row * terms + term] = total;
    }
  }
}

// Both factor rows of pairs from `pair` on.
template <class Format>
Matrix Attention<Format>::pair_factors(int head, int pair) const {
  const int64_t units = layer.head_dim / 2 * kPairUnits;
  const int64_t row = (first_head + head) * units + pair * kPairUnits;
  return {layer.pair_factors + row * layer.k_width, layer.k_width};
}

// Folds the factors of the stretch's pairs into the queries, for the stretch around `first`.
template <class Format>
void Attention<Format>::absorb_stretch(int head, int64_t first) {
  const int pairs = expansion->stretch_pairs, stride = round_up(pairs);
  const int first_pair = layer.head_dim / 2 - pairs;
  turn(head, first_pair, pairs, kTerms,
       expansion->stretch_coefficients + first / kStretch * kTerms * 2 * stride,
       stretch_offsets + int64_t{head} * rows * kTerms);
  float* out = stretch_absorbed + int64_t{head} * rows * kTerms * layer.k_width;
  products.template run<Format>(rows * kTerms, layer.k_width, {turned, stride * kPairUnits},
                                pair_factors(head, first_pair), pairs * kPairUnits, from_zero,
                                [&]<int kR, int kV>(Vec(&acc)[kR][kV], int row, int column)
                                    __attribute__((always_inline)) {
    for_sums(acc, [&](Vec& sum, int i, int j) __attribute__((always_inline)) {
      store(out + (row + i) * layer.k_width + column + j * kLanes, sum);
    });
  });
}

// The same for the tile's pairs and the tile at `first`, added to what the stretch gives:
// absorbed[row][term] = sum over the tile's pairs of turned[row][term][pair] · both factor rows
//                     + sum over m of stretch_basis[m][term] · stretch_absorbed[row][m].
template <class Format>
void Attention<Format>::absorb(int head, int64_t first) {
  const int pairs = expansion->tile_pairs, terms = expansion->terms, stride = round_up(pairs);
  const float* basis = expansion->stretch_basis + first % kStretch / kTile * kTerms * terms;
  float* shift = offsets + int64_t{head} * rows * terms;
  turn(head, expansion->exact_pairs, pairs, terms,
       expansion->tile_coefficients + first / kTile * terms * 2 * stride, shift);
  if (layer.k_bias) {
    const float* of_stretch = stretch_offsets + int64_t{head} * rows * kTerms;
    for (int i = 0; i < rows * terms; ++i)
      for (int m = 0; m < kTerms; ++m)
        shift[i] += basis[m * terms + i % terms] * of_stretch[i / terms * kTerms + m];
  }
  Unit* out = absorbed + int64_t{head} * rows * terms * k_units;
  const float* stretch = stretch_absorbed + int64_t{head} * rows * kTerms * layer.k_width;
  products.template run<Format, kTerms>(
      rows * terms, layer.k_width, {turned, stride * kPairUnits},
      pair_factors(head, expansion->exact_pairs), pairs * kPairUnits,
      [&]<int kR, int kV>(Vec(&acc)[kR][kV], int row, int column) __attribute__((always_inline)) {
    from_zero(acc, row, column);
    const float* from = stretch + row / terms * kTerms * layer.k_width + column;
    const float* factors = basis + row % terms;
#pragma GCC unroll 4
    for (int m = 0; m < kTerms; ++m, from += layer.k_width, factors += terms)
      for_sums(acc, [&](Vec& sum, int i, int j) __attribute__((always_inline)) {
        sum = fma(splat(factors[i]), load(from + j * kLanes), sum);
      });
  }, [&]<int kR, int kV>(Vec(&acc)[kR][kV], int row, int column) __attribute__((always_inline)) {
    for_sums(acc, [&](Vec& sum, int i, int j) __attribute__((always_inline)) {
      Format::store_row(out + (row + i) * k_units, column + j * kLanes, sum);
    });
  });
}

// scores[row] = sum over terms of basis[term] · (absorbed[row][term] · z + offset).
template <class Format>
void Attention<Format>::score_expanded(int head) {
  const int terms = expansion->terms;
  const Unit* rows_in = absorbed + int64_t{head} * rows * terms * k_units;
  const float* shift = offsets + int64_t{head} * rows * terms;
  products.template run<Format, kTerms>(
      rows * terms, kTile, {rows_in, k_units}, {z_columns, kTile}, k_units,
      [&]<int kR, int kV>(Vec(&acc)[kR][kV], int row, int) __attribute__((always_inline)) {
    prefetch_some();
    for_sums(acc, [&](Vec& sum, int i, int)
                      __attribute__((always_inline)) { sum = splat(shift[row + i]); });
  }, [&]<int kR, int kV>(Vec(&acc)[kR][kV], int row, int column) __attribute__((always_inline)) {
    if constexpr (kR == kTerms) {
      const float* basis = expansion->basis + row % terms * kTile + column;
      float* out = scores + row / terms * kTile + column;
#pragma GCC unroll 4
      for (int j = 0; j < kV; ++j) {
        // A query's terms are whole blocks of rows, whose first comes first.
        Vec score = row % terms ? load(out + j * kLanes) : splat(0.0f);
#pragma GCC unroll 4
        for (int term = 0; term < kTerms; ++term)
          score = fma(acc[term][j], load(basis + term * kTile + j * kLanes), score);
        store(out + j * kLanes, score);
      }
    }
  });
}

}  // namespace recalkv::RECALKV_ISA
