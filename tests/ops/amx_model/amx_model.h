// The tile registers of csrc/cpu/amx.h, which includes this, in software, after Intel's description
// of LDTILECFG, TILELOADD, TILESTORED, TILEZERO, TILERELEASE and TDPBF16PS (Intel 64 and IA-32
// Architectures Software Developer's Manual, volume 2). What the processor answers with an
// exception throws.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

namespace recalkv::RECALKV_ISA::amx {

constexpr int kRowBytes = 64;
static_assert(sizeof(TileShapes) == 64);

struct State {
  bool configured = false;
  TileShapes shapes;
  uint8_t bytes[kTileRegisters][kTileRows][kRowBytes];
};
inline thread_local State state;

inline void require(bool holds, const char* what) {
  if (!holds) throw std::logic_error(std::string("tile registers: ") + what);
}

inline void configure(const TileShapes& shapes) {
  require(shapes.palette == 1 && shapes.start_row == 0, "palette 1 from row 0 expected");
  for (int i = 0; i < 16; ++i) {
    const bool empty = shapes.rows[i] == 0 && shapes.row_bytes[i] == 0;
    require(empty || i < kTileRegisters, "a shape beyond the last register");
    require(empty || (shapes.rows[i] && shapes.row_bytes[i]),
            "rows without bytes, or bytes without");
    require(shapes.rows[i] <= kTileRows && shapes.row_bytes[i] <= kRowBytes, "a shape too large");
  }
  state.configured = true;
  state.shapes = shapes;
  std::memset(state.bytes, 0, sizeof(state.bytes));
}

// What is left in the registers must not be read: LDTILECFG will zero it.
inline void release() {
  state.configured = false;
  std::memset(state.bytes, 0xff, sizeof(state.bytes));
}

inline void require_shape(int tile) {
  require(state.configured && state.shapes.rows[tile], "a register without a shape");
}

template <int kTile>
void zero() {
  require_shape(kTile);
  std::memset(state.bytes[kTile], 0, sizeof(state.bytes[kTile]));
}

template <int kTile>
void load(const void* from, int64_t stride) {
  zero<kTile>();
  for (int row = 0; row < state.shapes.rows[kTile]; ++row)
    std::memcpy(state.bytes[kTile][row], static_cast<const char*>(from) + row * stride,
                state.shapes.row_bytes[kTile]);
}

template <int kTile>
void store(void* to, int64_t stride) {
  require_shape(kTile);
  for (int row = 0; row < state.shapes.rows[kTile]; ++row)
    std::memcpy(static_cast<char*>(to) + row * stride, state.bytes[kTile][row],
                state.shapes.row_bytes[kTile]);
}

// Denormal operands and results are zero of the same sign.
inline float flushed(float x) {
  return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x;  // NaN compares false
}

inline float multiply_add(float a, float b, float sum) {
  return flushed(std::fma(flushed(a), flushed(b), flushed(sum)));
}

inline float half_of(uint32_t unit, int half) {
  const uint32_t bits = half ? unit & 0xffff0000u : unit << 16;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

template <class T>
T at(const uint8_t* row, int column) {
  T x;
  std::memcpy(&x, row + column * sizeof(T), sizeof(T));
  return x;
}

// Rounding is to nearest even, whatever the thread's mode: sums of the even and of the odd elements
// are kept apart until the end.
template <int kSum, int kA, int kB>
void multiply() {
  for (const int tile : {kSum, kA, kB}) require_shape(tile);
  const TileShapes& shapes = state.shapes;
  require(kSum != kA && kSum != kB && kA != kB, "the same register twice");
  require(shapes.row_bytes[kSum] % 4 == 0 && shapes.row_bytes[kA] % 4 == 0, "half a unit");
  require(shapes.rows[kSum] == shapes.rows[kA], "rows of the sum and of a differ");
  require(shapes.row_bytes[kSum] == shapes.row_bytes[kB], "columns of the sum and of b differ");
  require(shapes.row_bytes[kA] == 4 * shapes.rows[kB], "columns of a and rows of b differ");
  const int depth = shapes.rows[kB], columns = shapes.row_bytes[kB] / 4;
  auto* const tiles = state.bytes;  // looked up for the thread once
  for (int m = 0; m < shapes.rows[kA]; ++m) {
    float even[kTileUnits] = {}, odd[kTileUnits] = {};
    for (int k = 0; k < depth; ++k) {
      const uint32_t a = at<uint32_t>(tiles[kA][m], k);
      // What is beyond a row's columns is zero; for all units, this is vector code.
      for (int n = 0; n < kTileUnits; ++n) {
        const uint32_t b = at<uint32_t>(tiles[kB][k], n);
        even[n] = multiply_add(half_of(a, 0), half_of(b, 0), even[n]);
        odd[n] = multiply_add(half_of(a, 1), half_of(b, 1), odd[n]);
      }
    }
    for (int n = 0; n < columns; ++n) {
      const float pair = flushed(even[n] + odd[n]);
      const float sum = flushed(flushed(at<float>(tiles[kSum][m], n)) + pair);
      std::memcpy(tiles[kSum][m] + n * 4, &sum, 4);
    }
  }
}

}  // namespace recalkv::RECALKV_ISA::amx
