// The kernels as the binding sees them: plain functions that start work on a stream.
#pragma once

#include "params.h"

namespace recalkv {

enum class ElementType { kBFloat16, kFloat16 };

// They return null, or a line that says what went wrong.
const char* launch_decode(const DecodeParams& params, ElementType type, int head_dim, void* stream);

// The decode kernel for Hopper alone.
const char* launch_hopper(const DecodeParams& params, ElementType type, int head_dim, void* stream);

// The parts of both, one per head size, so that they compile side by side.
template <int kHeadDim>
const char* launch_decode_for(const DecodeParams& params, ElementType type, void* stream);
template <int kHeadDim>
const char* launch_hopper_for(const DecodeParams& params, ElementType type, void* stream);

}  // namespace recalkv
