// Element types of tensors.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include "attention.h"

namespace recalkv {

inline Element element_of(at::ScalarType dtype, const char* name) {
  switch (dtype) {
    case at::kFloat: return kFloat32;
    case at::kHalf: return kFloat16;
    case at::kBFloat16: return kBFloat16;
    default:
      TORCH_CHECK_TYPE(false, name, ": expected float32, float16 or bfloat16, found ", dtype);
  }
}

}  // namespace recalkv
