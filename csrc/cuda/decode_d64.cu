#include "launch_decode.cuh"

namespace recalkv {

template <>
const char* launch_decode_for<64>(const DecodeParams& params, ElementType type, void* stream) {
  return launch_head_dim<64>(params, type, stream);
}

}  // namespace recalkv
