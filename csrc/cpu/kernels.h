// Entry points of the per-ISA kernels.
#pragma once

#include "batch.h"
#include "element_type.h"
#include "layer.h"
#include "task.h"
#include "value_up.h"

namespace recalkv {

// Those for one element type of cache, queries and factors; null where there is no fast way.
struct ElementKernels {
  // Bytes of scratch memory that attend() needs for a task, 64-byte aligned.
  int64_t (*attend_scratch_bytes)(const Layer&, const Batch&, const Task&);
  void (*attend)(const Layer&, const Batch&, const Task&, void* scratch);
  int64_t (*value_up_scratch_bytes)(const ValueUp&);
  // By element type of the output.
  void (*value_up[kElementTypes])(const ValueUp&, void* scratch);
};

struct Kernels {
  // What Layer::k_factors are made of.
  ElementType factors;
  ElementKernels of[kElementTypes];
};

namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
namespace avx512_bf16 {
extern const Kernels kernels;
}
namespace amx_bf16 {
extern const Kernels kernels;
}

}  // namespace recalkv
