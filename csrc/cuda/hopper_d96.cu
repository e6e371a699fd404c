#include "hopper_launch.cuh"

namespace recalkv {

template <>
const char* launch_hopper_for<96>(const DecodeParams& params, ElementType type, void* stream) {
  return launch_hopper_head_dim<96>(params, type, stream);
}

}  // namespace recalkv
