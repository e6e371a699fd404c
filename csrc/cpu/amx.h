// Tile registers: eight of up to 16 rows of 16 units, and the product of two of them. Assembly,
// because the compiler's intrinsics take register numbers as literal digits only, and in GCC 12 do
// not say that they read and write memory.
#pragma once

#include <cstdint>

#include "inline.h"

namespace recalkv::RECALKV_ISA::amx {

constexpr int kTileRows = 16;
constexpr int kTileUnits = 16;
constexpr int kTileRegisters = 8;

// Operand of LDTILECFG.
struct alignas(64) TileShapes {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

}  // namespace recalkv::RECALKV_ISA::amx

#ifdef RECALKV_AMX_MODEL
#include "amx_model.h"
#else

namespace recalkv::RECALKV_ISA::amx {

// Sets the shapes of all registers, and their contents to zero.
RECALKV_INLINE void configure(const TileShapes& shapes) {
  asm volatile("ldtilecfg %0" : : "m"(shapes));
}

// Back to the state in which a thread's registers need not be saved.
RECALKV_INLINE void release() { asm volatile("tilerelease"); }

template <int kTile>
RECALKV_INLINE void zero() {
  asm volatile("tilezero %%tmm%c0" : : "i"(kTile));
}

// Rows are `stride` bytes apart.
template <int kTile>
RECALKV_INLINE void load(const void* from, int64_t stride) {
  asm volatile("tileloadd (%1,%2), %%tmm%c0" : : "i"(kTile), "r"(from), "r"(stride) : "memory");
}

template <int kTile>
RECALKV_INLINE void store(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c0, (%1,%2)" : : "i"(kTile), "r"(to), "r"(stride) : "memory");
}

// sum[m][n] += a[m][k] · b[k][n] over units k, each of two bf16.
template <int kSum, int kA, int kB>
RECALKV_INLINE void multiply() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSum), "i"(kA), "i"(kB));
}

}  // namespace recalkv::RECALKV_ISA::amx

#endif
