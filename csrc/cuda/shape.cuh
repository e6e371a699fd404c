// Compile-time sizes of a decode kernel and the layout of its shared memory.
#pragma once

#include "params.h"
#include "primitives.cuh"

#ifdef __CUDACC__
#define RECALKV_BOTH __host__ __device__ __forceinline__
#else
#define RECALKV_BOTH inline
#endif

namespace recalkv {

constexpr int kLargestBlock = 256;

// kHeadDim is d; kColumnTiles and kVTiles are those of `DecodeParams::kernel`.
template <typename Element_, int kHeadDim_, int kColumnTiles_, int kVTiles_>
struct Shape {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kPairs = kHeadDim / 2;
  static constexpr int kColumnTiles = kColumnTiles_;
  static constexpr int kColumns = 8 * kColumnTiles;
  static constexpr int kVTiles = kVTiles_;
  // Two row tiles per factor fragment halve the reads of the factor; where the output needs the
  // registers there is one.
  static constexpr int kRowTiles = kColumnTiles * kVTiles > 16 ? 1 : 2;
  static constexpr int kTokens = 16 * kRowTiles;
  // Steps of the reconstruction in flight; a second one would spill where the output is large.
  static constexpr int kUnroll = kRowTiles;
  // Columns of a key that are reconstructed at a time.
  static constexpr int kChunk = kHeadDim % 64 == 0 ? 64 : 48;
  // Rows are padded so that eight of them start in different banks.
  static constexpr int kQueryStride = kHeadDim + 8;
  static constexpr int kRotationStride = kPairs + 4;
  static constexpr int kOutStride = 16 * kVTiles + 4;
  static_assert(kHeadDim % kChunk == 0 && kChunk % 16 == 0 && kHeadDim <= 128);
};

// Byte offsets into a block's shared memory. What the blocks' merge needs reuses the ring.
template <typename S>
struct SharedLayout {
  int factor, query, rotation, bias, columns, ring, stage_bytes, tile_stride, maxima, sums, total;

  RECALKV_BOTH explicit SharedLayout(const DecodeParams& p) {
    const auto& k = p.kernel;
    factor = 0;
    query = factor + (k.resident ? k.heads * S::kHeadDim * p.k_width * 2 : 0);
    rotation = query + k.heads * S::kColumns * S::kQueryStride * 2;
    bias = rotation + S::kTokens * S::kRotationStride * 8;
    columns = bias + (p.k_bias ? k.heads * S::kHeadDim * 4 : 0);
    ring = columns + (k.tile_width / 8 * 4 + 15) / 16 * 16;
    tile_stride = k.tile_width + 8;
    stage_bytes = S::kTokens * tile_stride * 2 + S::kPairs * 8;
    maxima = ring;
    sums = maxima + k.teams * k.heads * S::kColumns * 8;
    const int after_ring = ring + k.teams * k.stages * stage_bytes;
    const int after_sums = sums + k.heads * S::kColumns * S::kOutStride * 4;
    total = after_ring > after_sums ? after_ring : after_sums;
  }
};

}  // namespace recalkv
