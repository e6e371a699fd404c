// How latents lie in the cache, as the kernels see it: plain data.
#pragma once

#include "inline.h"

namespace recalkv {

// What a code is: an integer of some bits, or a float of 8.
enum class Codec { kInt8, kFp8, kInt6, kInt4, kInt3, kInt2 };

// The planes that codes lie in, powers of two of bits: the lower bits of all columns of a band,
// then the upper ones, if any.
struct Planes {
  int low, high;  // bits

  RECALKV_INLINE constexpr int bits() const { return low + high; }
};

RECALKV_INLINE constexpr Planes planes_of(Codec codec) {
  switch (codec) {
    case Codec::kInt2: return {2, 0};
    case Codec::kInt3: return {2, 1};
    case Codec::kInt4: return {4, 0};
    case Codec::kInt6: return {4, 2};
    default: return {8, 0};
  }
}

// What a scale is: a bfloat16, or the upper byte of a half.
enum class ScaleType { kBFloat16, kHalfByte };

RECALKV_INLINE constexpr int scale_bytes(ScaleType type) {
  return type == ScaleType::kBFloat16 ? 2 : 1;
}

// Neighboring columns [begin, end) of one codec.
struct Band {
  Codec codec;
  int begin, end;
  int low, high;  // bytes of a token's codes in front of each plane
};

// A block of the cache has its tokens' codes first, then their scales. Latents that are not
// quantized have no bands.
struct LatentLayout {
  const Band* bands;  // of all columns, in their order
  int num_bands;
  int rank;
  int code_bytes;  // of a token
  ScaleType scale_type;
  int group_shift;  // column >> group_shift is the index of its scale
  int groups;       // scales of a token
};

}  // namespace recalkv
