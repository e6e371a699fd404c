// Picks the instantiation of the decode kernel that a plan asks for.
#pragma once

#include "decode.cuh"
#include "launch.h"

namespace recalkv {

template <typename S, bool kResident>
const char* launch_shape(const DecodeParams& p, void* stream) {
  if (SharedLayout<S>(p).total != p.kernel.shared_bytes) {
    return "kernel.shared_bytes: does not agree with the kernel's layout";
  }
  const int head_blocks = p.num_kv_heads / p.kernel.heads;
  const int v_blocks = (p.v_width + 16 * S::kVTiles - 1) / (16 * S::kVTiles);
  const int64_t rows = static_cast<int64_t>(p.tokens) * (p.num_heads / p.num_kv_heads);
  const int row_blocks = static_cast<int>(rows / S::kColumns) + p.num_seqs;
  return launch(decode_attention<S, kResident>, row_blocks * v_blocks * head_blocks,
                p.kernel.splits, 32 * p.kernel.heads * p.kernel.teams, p.kernel.shared_bytes,
                stream, p);
}

// The table of instantiations: cuda_plan.py picks from the same one.
template <typename Element, int kHeadDim>
const char* launch_element(const DecodeParams& p, void* stream) {
  const int kind = p.kernel.column_tiles * 100 + p.kernel.v_tiles;
  if (!p.kernel.resident) {
    if (kind == 132) return launch_shape<Shape<Element, kHeadDim, 1, 32>, false>(p, stream);
    return "kernel: a factor that is not resident needs 1 column tile and 32 V tiles";
  }
  switch (kind) {
    case 104: return launch_shape<Shape<Element, kHeadDim, 1, 4>, true>(p, stream);
    case 108: return launch_shape<Shape<Element, kHeadDim, 1, 8>, true>(p, stream);
    case 116: return launch_shape<Shape<Element, kHeadDim, 1, 16>, true>(p, stream);
    case 132: return launch_shape<Shape<Element, kHeadDim, 1, 32>, true>(p, stream);
    case 204: return launch_shape<Shape<Element, kHeadDim, 2, 4>, true>(p, stream);
    case 208: return launch_shape<Shape<Element, kHeadDim, 2, 8>, true>(p, stream);
    case 216: return launch_shape<Shape<Element, kHeadDim, 2, 16>, true>(p, stream);
    default: return "kernel: no such column_tiles and v_tiles";
  }
}

template <int kHeadDim>
const char* launch_head_dim(const DecodeParams& p, ElementType type, void* stream) {
  return type == ElementType::kBFloat16 ? launch_element<BFloat16, kHeadDim>(p, stream)
                                        : launch_element<Float16, kHeadDim>(p, stream);
}

}  // namespace recalkv
