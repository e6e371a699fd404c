// latent_value_up of some rows of one KV head; kernels take up to kTile.
#pragma once

#include <cstdint>

namespace recalkv {

// Row r is query r / queries_per_kv, query head head * queries_per_kv + r % queries_per_kv.
struct ValueUp {
  const float* o_lat;   // [tokens][num_heads][v_width]
  const void* factors;  // [num_kv_heads][head_dim][v_width]
  const float* bias;    // [num_kv_heads][head_dim] or null
  const float* shares;  // [tokens][num_heads], factors on results, or null
  void* out;            // [tokens][num_heads][head_dim]
  int num_heads, queries_per_kv, head_dim, v_width;
  int head;
  int64_t first_row;
  int64_t rows;
};

}  // namespace recalkv
