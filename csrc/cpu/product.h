// The matrix product of the kernels, rows of units times a panel of units, with accumulators in
// vector registers.
#pragma once

#include "formats.h"
#include "scratch.h"

namespace recalkv::RECALKV_ISA {

// As many sums as registers hold beside their operands: 24 of 32, 12 of 16.
constexpr int kRows = 6;
constexpr int kVecs = RECALKV_AVX512 ? 4 : 2;

// acc[i][j] += sum over k of a[i][k] * b[k][j-th vector], with a's rows `lda` units apart and b's
// rows `ldb`.
template <class Format, int Rows, int Vecs>
RECALKV_INLINE void product(Vec (&acc)[Rows][Vecs], const Unit* a, int64_t lda, const Unit* b,
                            int64_t ldb, int depth) {
  for (int k = 0; k < depth; ++k) {
    Vec column[Vecs];
#pragma GCC unroll 4
    for (int j = 0; j < Vecs; ++j) column[j] = load_units(b + k * ldb + j * kLanes);
#pragma GCC unroll 6
    for (int i = 0; i < Rows; ++i) {
      const Vec row = splat_unit(a + i * lda + k);
#pragma GCC unroll 4
      for (int j = 0; j < Vecs; ++j) acc[i][j] = Format::step(acc[i][j], row, column[j]);
    }
  }
}

// Calls f(rows_constant, vecs_constant, first_row, first_column) for blocks of up to kMost rows
// that cover rows x columns; columns is a multiple of 16.
template <int N>
struct Constant {
  static constexpr int value = N;
};

template <int Rows, class F>
RECALKV_INLINE void for_columns(int row, int columns, F&& f) {
  int column = 0;
  for (; column + kVecs * kLanes <= columns; column += kVecs * kLanes)
    f(Constant<Rows>{}, Constant<kVecs>{}, row, column);
  if constexpr (kVecs == 4) {
    if (column + 2 * kLanes <= columns) {
      f(Constant<Rows>{}, Constant<2>{}, row, column);
      column += 2 * kLanes;
    }
    if (column < columns) f(Constant<Rows>{}, Constant<1>{}, row, column);
  }
}

template <int kMost, class F>
RECALKV_INLINE void for_blocks(int rows, int columns, F&& f) {
  int row = 0;
  for (; row + kMost <= rows; row += kMost) for_columns<kMost>(row, columns, f);
  if constexpr (kMost > 4) {
    if (rows - row >= 4) {
      for_columns<4>(row, columns, f);
      row += 4;
    }
  }
  if constexpr (kMost > 2) {
    switch (rows - row) {
      case 3: for_columns<3>(row, columns, f); break;
      case 2: for_columns<2>(row, columns, f); break;
      case 1: for_columns<1>(row, columns, f); break;
    }
  } else if constexpr (kMost == 2) {
    if (row < rows) for_columns<1>(row, columns, f);
  }
}

// Rows of units, `stride` units apart.
struct Matrix {
  const Unit* units;
  int64_t stride;
};

struct RegisterProducts {
  static constexpr int kBlockRows = kRows;

  explicit RegisterProducts(Scratch&) {}

  // For blocks acc of up to kMost rows of a · b, rows x columns in all: start(acc, row, column)
  // sets what is added to, finish(acc, row, column) takes the sum. `depth` is in units, columns is
  // a multiple of 16.
  template <class Format, int kMost = kBlockRows, class Start, class Finish>
  RECALKV_INLINE void run(int rows, int columns, Matrix a, Matrix b, int depth, Start&& start,
                          Finish&& finish) {
    for_blocks<kMost>(rows, columns,
                      [&](auto r, auto v, int row, int column) __attribute__((always_inline)) {
      Vec acc[decltype(r)::value][decltype(v)::value];
      start(acc, row, column);
      product<Format>(acc, a.units + row * a.stride, a.stride, b.units + column, b.stride, depth);
      finish(acc, row, column);
    });
  }
};

// f(sum, row, vector) for all sums of a block. Unrolled, or the compiler keeps them in memory.
template <int kR, int kV, class F>
RECALKV_INLINE void for_sums(Vec (&acc)[kR][kV], F&& f) {
#pragma GCC unroll 6
  for (int i = 0; i < kR; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kV; ++j) f(acc[i][j], i, j);
  }
}

// Starts a product from zero.
constexpr auto from_zero = []<int kR, int kV>(Vec (&acc)[kR][kV], int, int)
                               __attribute__((always_inline)) {
  for_sums(acc, [](Vec& sum, int, int) __attribute__((always_inline)) { sum = splat(0.0f); });
};

}  // namespace recalkv::RECALKV_ISA
