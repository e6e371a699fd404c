#include "hopper_launch.cuh"

namespace recalkv {

template <>
const char* launch_hopper_for<64>(const DecodeParams& params, ElementType type, void* stream) {
  return launch_hopper_head_dim<64>(params, type, stream);
}

}  // namespace recalkv
