// Carves a task's scratch memory.
#pragma once

#include "simd.h"

namespace recalkv::RECALKV_ISA {

// Hands out aligned pieces of a task's scratch memory; with a null base it only counts.
struct Scratch {
  char* base;
  int64_t used = 0;

  template <class T>
  RECALKV_INLINE T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(base + used);
    used += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return piece;
  }
};

}  // namespace recalkv::RECALKV_ISA
