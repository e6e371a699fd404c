// Entry points of the kernels.
#include "launch.h"

namespace recalkv {

const char* launch_decode(const DecodeParams& params, ElementType type, int head_dim,
                          void* stream) {
  switch (head_dim) {
    case 64: return launch_decode_for<64>(params, type, stream);
    case 96: return launch_decode_for<96>(params, type, stream);
    case 128: return launch_decode_for<128>(params, type, stream);
    default: return "q: expected a head size of 64, 96 or 128";
  }
}

const char* launch_hopper(const DecodeParams& params, ElementType type, int head_dim,
                          void* stream) {
  switch (head_dim) {
    case 64: return launch_hopper_for<64>(params, type, stream);
    case 96: return launch_hopper_for<96>(params, type, stream);
    case 128: return launch_hopper_for<128>(params, type, stream);
    default: return "q: expected a head size of 64, 96 or 128";
  }
}

}  // namespace recalkv
