// Picks the instantiation of the decode kernel for Hopper that a plan asks for.
#pragma once

#include "hopper_decode.cuh"
#include "launch.h"

namespace recalkv {

template <typename S>
const char* launch_hopper_shape(const DecodeParams& p, void* stream) {
  if (HopperLayout<S>(p).total != p.kernel.shared_bytes) {
    return "kernel.shared_bytes: does not agree with the kernel's layout";
  }
  const int v_blocks = (p.v_width + 16 * S::kVTiles - 1) / (16 * S::kVTiles);
  const int64_t rows = static_cast<int64_t>(p.tokens) * (p.num_heads / p.num_kv_heads);
  const int row_blocks = p.pieces ? 1 : static_cast<int>(rows / S::kColumns) + p.num_seqs;
  return launch(decode_attention_hopper<S>, row_blocks * v_blocks * p.num_kv_heads,
                p.pieces ? p.capacity : 1, kHopperThreads, p.kernel.shared_bytes, stream, p);
}

template <typename Element, int kHeadDim, int kColumnTiles, int kVTiles, bool kLean>
const char* launch_hopper_latents(const DecodeParams& p, void* stream) {
  return p.band_blocks
             ? launch_hopper_shape<
                   HopperShape<Element, kHeadDim, kColumnTiles, kVTiles, kLean, true>>(p, stream)
             : launch_hopper_shape<
                   HopperShape<Element, kHeadDim, kColumnTiles, kVTiles, kLean, false>>(p, stream);
}

template <typename Element, int kHeadDim, int kColumnTiles, int kVTiles>
const char* launch_hopper_kind(const DecodeParams& p, void* stream) {
  return p.kernel.lean
             ? launch_hopper_latents<Element, kHeadDim, kColumnTiles, kVTiles, true>(p, stream)
             : launch_hopper_latents<Element, kHeadDim, kColumnTiles, kVTiles, false>(p, stream);
}

// HOPPER_COLUMN_TILES and HOPPER_V_TILES of recalkv_vllm/ops/cuda/hopper.py, which picks from them.
template <typename Element, int kHeadDim>
const char* launch_hopper_element(const DecodeParams& p, void* stream) {
  switch (p.kernel.column_tiles * 100 + p.kernel.v_tiles) {
    case 108: return launch_hopper_kind<Element, kHeadDim, 1, 8>(p, stream);
    case 116: return launch_hopper_kind<Element, kHeadDim, 1, 16>(p, stream);
    case 208: return launch_hopper_kind<Element, kHeadDim, 2, 8>(p, stream);
    case 216: return launch_hopper_kind<Element, kHeadDim, 2, 16>(p, stream);
    default: return "kernel: no such column_tiles and v_tiles";
  }
}

template <int kHeadDim>
const char* launch_hopper_head_dim(const DecodeParams& p, ElementType type, void* stream) {
  return type == ElementType::kBFloat16 ? launch_hopper_element<BFloat16, kHeadDim>(p, stream)
                                        : launch_hopper_element<Float16, kHeadDim>(p, stream);
}

}  // namespace recalkv
