// What the host hands to the kernels: raw pointers and sizes, no torch.
#pragma once

#include <cstdint>

namespace recalkv {

// One decode call. Strides are in elements. `kernel` has how the work is cut up, see
// recalkv_vllm/ops/cuda/plan.py.
struct DecodeParams {
  const uint16_t* q;           // [tokens, h_q, d]
  const uint16_t* kv_cache;    // [num_blocks, block_size, rank]
  const float* key_scales;     // [num_blocks, block_size, h_kv or 1], factors on keys, or null
  const int32_t* block_table;  // [num_seqs, max_blocks]
  const int32_t* seq_lens;
  const int32_t* query_start_loc;
  const int32_t* pieces;        // [capacity, 4], the work list (kernels/work_list.py), or null
  const void* k_factor;         // [h_kv, d/16, k_width/16, lane, 8], see ops/cuda/layout.py
  const float* k_bias;          // [h_kv, d] in pair order, or null
  const float* base_rotation;   // [max_position/16, d/2, 2]: (cos, sin) of every 16th position
  const float* local_rotation;  // [32, d/2, 2]: of the first positions; Hopper: see `turned_keys`
  const float* slow_rotation;   // Hopper only: [d/2, 4], see `load_queries`
  const int32_t* tile_columns;  // [v_blocks, head_blocks, 2 + heads + chunks], see `TileColumns`
  const int32_t* band_blocks;   // Hopper only: see `BandTable`, or null
  float* out;                   // [tokens, h_q, v_width]; of pieces: see `result_row`
  float* lse;                   // alike without the last dimension
  int64_t q_token_stride;
  int64_t cache_block_stride;
  int64_t cache_slot_stride;
  int64_t key_scale_block_stride;
  int64_t table_stride;
  int64_t base_rotation_stride;  // in floats per 16 positions; 0 when keys are not rotated
  int32_t tokens;
  int32_t capacity;  // of the work list
  int32_t num_seqs;
  int32_t num_heads;
  int32_t num_kv_heads;
  int32_t block_size;
  int32_t k_width;
  int32_t v_width;
  int32_t rotated_half;  // columns (i, i + rotated_half) of q pair up; 0 where (2i, 2i + 1) do
  int32_t most_blocks;   // of 32 columns that a block of threads reads, where latents are in bands
  int32_t token_scales;  // of one token in the cache; they follow a page's codes
  int32_t key_scale_slot_stride;
  int32_t key_scale_head_stride;  // 0 where all heads of a token share one
  int32_t window;                 // newest keys a query sees, itself included
  float scale;
  float soft_cap;  // 0 is none
  struct {
    int32_t column_tiles;  // query rows of a block, in eights
    int32_t v_tiles;       // V columns of a block at most, in sixteens
    int32_t heads;         // KV heads of a block
    int32_t teams;         // token streams of a block, each of `heads` warps
    int32_t stages;        // tiles in a team's ring
    int32_t tile_width;    // columns of a tile in shared memory
    int32_t resident;      // whether the factor is kept in shared memory
    int32_t shared_bytes;
    int32_t lean;  // Hopper only: see `HopperShape`
  } kernel;
};

}  // namespace recalkv
