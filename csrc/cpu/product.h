// The one register-blocked matrix product: rows of units against a panel of units.
#pragma once

#include "formats.h"

namespace recalkv::RECALKV_ISA {

#if RECALKV_AVX512
constexpr int kRows = 6;
constexpr int kVecs = 4;
#else
constexpr int kRows = 4;
constexpr int kVecs = 2;
#endif

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

// Calls f(rows_constant, vecs_constant, first_row, first_column) for blocks that cover
// rows x columns; columns is a multiple of 16.
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

template <class F>
RECALKV_INLINE void for_blocks(int rows, int columns, F&& f) {
  int row = 0;
  for (; row + kRows <= rows; row += kRows) for_columns<kRows>(row, columns, f);
  const int rest = rows - row;
  if (rest >= 4 && kRows > 4) {
    for_columns<4>(row, columns, f);
    row += 4;
  }
  switch (rows - row) {
    case 3: for_columns<3>(row, columns, f); break;
    case 2: for_columns<2>(row, columns, f); break;
    case 1: for_columns<1>(row, columns, f); break;
  }
}

}  // namespace recalkv::RECALKV_ISA
