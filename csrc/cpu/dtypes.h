// Element types and torch's dtypes.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include "element_type.h"

namespace recalkv {

inline ElementType element_type_of(at::ScalarType dtype, const char* name) {
  switch (dtype) {
    case at::kFloat: return kFloat32;
    case at::kHalf: return kFloat16;
    case at::kBFloat16: return kBFloat16;
    default:
      TORCH_CHECK_TYPE(false, name, ": expected float32, float16 or bfloat16, found ", dtype);
  }
}

inline at::ScalarType dtype_of(ElementType type) {
  constexpr at::ScalarType kDtypes[kElementTypes] = {at::kFloat, at::kHalf, at::kBFloat16};
  return kDtypes[type];
}

}  // namespace recalkv
