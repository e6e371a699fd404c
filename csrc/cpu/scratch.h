// Carves a task's scratch memory.
#pragma once

#include <cstdint>

#include "inline.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

namespace recalkv::RECALKV_ISA {

// Hands out aligned pieces of a task's scratch memory; with a null base it only counts.
struct Scratch {
  char* base;
  int64_t used = 0;

  template <class T>
  RECALKV_INLINE T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(base + used);
    const int64_t bytes = count * static_cast<int64_t>(sizeof(T));
    used += (bytes + 63) / 64 * 64;
#ifdef __SANITIZE_ADDRESS__
    // Pieces of one allocation: the sanitizer would see neither a step from one into the next, nor
    // that what an earlier task left there is read.
    used += 64;
    if (base) {
      __asan_unpoison_memory_region(piece, bytes);
      __builtin_memset(piece, 0xff, bytes);
      __asan_poison_memory_region(reinterpret_cast<char*>(piece) + bytes,
                                  base + used - reinterpret_cast<char*>(piece) - bytes);
    }
#endif
    return piece;
  }
};

}  // namespace recalkv::RECALKV_ISA
