// How latents lie in the cache.
#pragma once

#include <cstdint>

namespace recalkv {

// What the cache holds of an element: itself, in the type of the queries, or a code.
enum class Codec { kNone, kInt8, kFp8, kInt4, kInt3 };

// A format of recalkv_vllm/latent_format.py, whatever the rank.
struct LatentFormat {
  Codec codec;
  int group_shift;  // column >> group_shift is the index of its scale
};

// A format at one rank: a block of the cache has its tokens' codes first, then their scales.
struct LatentLayout {
  Codec codec;
  int rank;
  int code_bytes;  // of a token
  int group_shift;
  int groups;  // scales of a token
};

}  // namespace recalkv
