#include "launch_decode.cuh"

namespace recalkv {

template <>
const char* launch_decode_for<96>(const DecodeParams& params, ElementType type, void* stream) {
  return launch_head_dim<96>(params, type, stream);
}

}  // namespace recalkv
