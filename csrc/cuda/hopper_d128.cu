#include "hopper_launch.cuh"

namespace recalkv {

template <>
const char* launch_hopper_for<128>(const DecodeParams& params, ElementType type, void* stream) {
  return launch_hopper_head_dim<128>(params, type, stream);
}

}  // namespace recalkv
