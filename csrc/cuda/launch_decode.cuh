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
  const int row_blocks = p.pieces ? 1 : static_cast<int>(rows / S::kColumns) + p.num_seqs;
  return launch(decode_attention<S, kResident>, row_blocks * v_blocks * head_blocks,
                p.pieces ? p.capacity : 1, 32 * p.kernel.heads * p.kernel.teams,
                p.kernel.shared_bytes, stream, p);
}

// A compiled kernel: what tells it apart, and how to launch it.
struct Instantiation {
  int column_tiles;
  int v_tiles;
  bool resident;
  const char* (*launch)(const DecodeParams&, void* stream);
};

template <typename Element, int kHeadDim, int kColumnTiles, int kVTiles, bool kResident>
constexpr Instantiation instantiation() {
  return {kColumnTiles, kVTiles, kResident,
          launch_shape<Shape<Element, kHeadDim, kColumnTiles, kVTiles>, kResident>};
}

// INSTANTIATIONS and STREAMING of recalkv_vllm/ops/cuda/plan.py, which picks from them.
template <typename Element, int kHeadDim>
constexpr Instantiation kInstantiations[] = {
    instantiation<Element, kHeadDim, 1, 4, true>(),
    instantiation<Element, kHeadDim, 1, 8, true>(),
    instantiation<Element, kHeadDim, 1, 16, true>(),
    instantiation<Element, kHeadDim, 1, 32, true>(),
    instantiation<Element, kHeadDim, 2, 4, true>(),
    instantiation<Element, kHeadDim, 2, 8, true>(),
    instantiation<Element, kHeadDim, 2, 16, true>(),
    instantiation<Element, kHeadDim, 1, 32, false>(),
};

template <typename Element, int kHeadDim>
const char* launch_element(const DecodeParams& p, void* stream) {
  for (const Instantiation& each : kInstantiations<Element, kHeadDim>) {
    if (each.column_tiles == p.kernel.column_tiles && each.v_tiles == p.kernel.v_tiles &&
        each.resident == static_cast<bool>(p.kernel.resident)) {
      return each.launch(p, stream);
    }
  }
  return "kernel: no such column_tiles, v_tiles and resident";
}

template <int kHeadDim>
const char* launch_head_dim(const DecodeParams& p, ElementType type, void* stream) {
  return type == ElementType::kBFloat16 ? launch_element<BFloat16, kHeadDim>(p, stream)
                                        : launch_element<Float16, kHeadDim>(p, stream);
}

}  // namespace recalkv
