#include "launch_decode.cuh"

namespace recalkv {

template <>
const char* launch_decode_for<128>(const DecodeParams& params, ElementType type, void* stream) {
  return launch_head_dim<128>(params, type, stream);
}

}  // namespace recalkv
