// The matrix product of the kernels in tile registers.
#pragma once

#include "amx.h"
#include "product.h"

namespace recalkv::RECALKV_ISA {

// As RegisterProducts. Sums of up to 16 rows and 64 columns pass through `block`, and are handed on
// a few rows at a time: rotation, narrowing and the like stay in vector registers.
class TileProducts {
 public:
  static constexpr int kBlockRows = 2;

  explicit TileProducts(Scratch& scratch)
      : block_(scratch.take<float>(amx::kTileRows * kColumns)) {}
  TileProducts(const TileProducts&) = delete;
  ~TileProducts() {
    if (rows_) amx::release();
  }

  template <class Format, int kMost = kBlockRows, class Start, class Finish>
  RECALKV_INLINE void run(int rows, int columns, Matrix a, Matrix b, int depth, Start&& start,
                          Finish&& finish) {
    static_assert(Format::kPerUnit == 2 && amx::kTileRows % kMost == 0);
    for (int first = 0; first < rows; first += amx::kTileRows) {
      const int count = rows - first < amx::kTileRows ? rows - first : amx::kTileRows;
      configure(count, depth % amx::kTileUnits);
      for_columns<1>(0, columns, [&](auto, auto v, int, int column) __attribute__((always_inline)) {
        constexpr int kV = decltype(v)::value;
        multiply<kV>({a.units + first * a.stride, a.stride}, {b.units + column, b.stride}, depth);
        for_blocks<kMost>(count, kV * kLanes,
                          [&](auto r, auto w, int row, int) __attribute__((always_inline)) {
          if constexpr (decltype(w)::value == kV) {
            constexpr int kR = decltype(r)::value;
            Vec acc[kR][kV];
            start(acc, first + row, column);
            for_sums(acc, [&](Vec& sum, int i, int j) __attribute__((always_inline)) {
              sum = add(sum, load(block_ + (row + i) * kColumns + j * kLanes));
            });
            finish(acc, first + row, column);
          }
        });
      });
    }
  }

 private:
  static constexpr int kColumns = kVecs * kLanes;
  // Registers: sums, then a's and b's whole units, then a's and b's rest of them.
  static constexpr int kA = kVecs, kB = kA + 1, kRestA = kB + 1, kRestB = kRestA + 1;
  static_assert(kRestB < amx::kTileRegisters && kLanes == amx::kTileUnits);

  // `rows` of a; `rest` units beyond whole registers.
  RECALKV_INLINE void configure(int rows, int rest) {
    if (rows == rows_ && rest == rest_) return;
    rows_ = rows;
    rest_ = rest;
    amx::TileShapes shapes;
    const auto set = [&](int tile, int tile_rows, int units) {
      shapes.rows[tile] = static_cast<uint8_t>(tile_rows);
      shapes.row_bytes[tile] = static_cast<uint16_t>(units * sizeof(Unit));
    };
    for (int j = 0; j < kVecs; ++j) set(j, rows, kLanes);
    set(kA, rows, amx::kTileUnits);
    set(kB, amx::kTileUnits, kLanes);
    if (rest) {
      set(kRestA, rows, rest);
      set(kRestB, rest, kLanes);
    }
    amx::configure(shapes);
  }

  // block_ = a · b for a stripe of rows and kV vectors of columns.
  template <int kV>
  RECALKV_INLINE void multiply(Matrix a, Matrix b, int depth) {
    const int64_t a_bytes = a.stride * sizeof(Unit), b_bytes = b.stride * sizeof(Unit);
    each<kV>([&]<int j>() { amx::zero<j>(); });
    int k = 0;
    for (; k + amx::kTileUnits <= depth; k += amx::kTileUnits) {
      amx::load<kA>(a.units + k, a_bytes);
      each<kV>([&]<int j>() __attribute__((always_inline)) {
        amx::load<kB>(b.units + k * b.stride + j * kLanes, b_bytes);
        amx::multiply<j, kA, kB>();
      });
    }
    if (k < depth) {
      amx::load<kRestA>(a.units + k, a_bytes);
      each<kV>([&]<int j>() __attribute__((always_inline)) {
        amx::load<kRestB>(b.units + k * b.stride + j * kLanes, b_bytes);
        amx::multiply<j, kRestA, kRestB>();
      });
    }
    each<kV>([&]<int j>() __attribute__((always_inline)) {
      amx::store<j>(block_ + j * kLanes, kColumns * sizeof(float));
    });
  }

  // f<0>(), f<1>() and so on: numbers of registers are constants.
  template <int kCount, class F>
  static RECALKV_INLINE void each(F&& f) {
    f.template operator()<0>();
    if constexpr (kCount > 1) f.template operator()<1>();
    if constexpr (kCount > 2) f.template operator()<2>();
    if constexpr (kCount > 3) f.template operator()<3>();
  }

  float* block_;  // [16][kColumns]
  int rows_ = 0, rest_ = 0;
};

}  // namespace recalkv::RECALKV_ISA
