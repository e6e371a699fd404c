// The queries and the paged cache of one call.
#pragma once

#include <cstdint>

#include "latent_format.h"

namespace recalkv {

struct Batch {
  const void* q;  // [tokens][num_heads][head_dim], rows of a token contiguous
  int64_t q_stride;
  int num_heads;
  int queries_per_kv;  // query heads per KV head
  const void* cache;
  int64_t block_stride;  // in elements, or in bytes of quantized latents
  int64_t token_stride;
  int block_size;
  LatentLayout latents;
  const char* key_scales;  // [block_size][Layer::key_scales] float32 of the first block, or null
  int64_t block_bytes;     // from a block's to the next one's
  int num_seqs;
  const int32_t* block_table;  // [num_seqs][table_stride]
  int64_t table_stride;
  const int32_t* seq_lens;         // [num_seqs]
  const int32_t* query_start_loc;  // [num_seqs + 1]
};

}  // namespace recalkv
