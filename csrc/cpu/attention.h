// What the driver, the packing and the per-ISA kernels agree on. Plain data only: this header is
// compiled once per instruction set, so nothing in it may be merged across them by the linker.
#pragma once

#include <cstdint>

namespace recalkv {

// Cached tokens of one tile. Rotation tables and KV splits are aligned to it.
constexpr int kTile = 64;
// Query rows of one KV head that are scored against a tile at once.
constexpr int kRowBlock = 64;

// Low-frequency rotation pairs may be expanded: over kSpan positions, their cosines and sines are
// combinations of kTerms functions, so that their share of the scores needs no keys; see
// expansion.h.
constexpr int kTerms = 4;
constexpr int kSpan = 128;

// A dot-product operand is made of 32-bit units: one float, or two neighbouring bf16.
using Unit = uint32_t;

// What the cache holds of a latent: its numbers, in the type of the queries, or codes and scales.
enum class Codec { kNumbers, kInt8, kFp8, kInt4, kInt3 };

// As recalkv_vllm/latent_format.py lays it out: a block's codes, then its scales.
struct Quantization {
  Codec codec;
  int rank;
  int code_bytes;   // of a token
  int group_shift;  // column >> group_shift is the index of its scale
  int groups;       // scales of a token
};

// One layer's constants; pointers belong to the bound tensors.
struct Layer {
  int num_heads;
  int num_kv_heads;
  int head_dim;
  int queries_per_kv;
  int k_groups;
  int group_heads;
  int k_width;
  int v_groups;
  int v_width;
  const int64_t* k_starts;
  const int64_t* v_starts;
  // [num_kv_heads][head_dim][k_width] in the compute format; rows of a head in pair order (the two
  // members of a rotation pair are neighbours), so that RoPE styles need no case of their own.
  const Unit* k_factors;
  const float* k_bias;         // [num_kv_heads][head_dim] in pair order, or null
  const float* k_norm_weight;  // [head_dim] in pair order, or null
  float k_norm_eps;
  const float* rope;  // [tiles][2 (cos, sin)][rot_pairs][kTile], or null
  int rot_pairs;
  bool is_neox;
  // The expansion, or nulls: pairs from exact_pairs on are expanded, expanded_pairs of them.
  int exact_pairs, expanded_pairs;
  const float* basis;         // [kTerms][kSpan]
  const float* coefficients;  // [spans][kTerms][2 (cos, sin)][expanded_pairs up to 16s]
  const Unit* pair_factors;   // [num_kv_heads][expanded_pairs][k_width], both rows of a pair
  float scale;
  float soft_cap;  // 0 is none
  int64_t window;  // 0 is none
  Quantization quantization;
};

// The paged cache and the queries of one call.
struct Batch {
  const void* q;  // [tokens][num_heads][head_dim], rows of a token contiguous
  int64_t q_stride;
  const void* cache;
  int64_t block_stride;  // in numbers, or in bytes of quantised latents
  int64_t token_stride;
  int block_size;
};

// A piece of work: some queries of one sequence against some of its tiles, for some K groups.
struct Task {
  const int32_t* blocks;   // the sequence's row of the block table
  int64_t first_token;     // row in q of the first query
  int64_t first_position;  // position of the first query
  int num_queries;
  int group_begin, group_end;
  int64_t kv_begin, kv_end;  // kv_begin is a multiple of kTile
  // Results. Row (query, head) of out starts at (query * num_heads + head) * v_width, of lse and
  // weight at query * num_heads + head. With weight (a split), out is left unnormalised, lse holds
  // the running maximum and weight the sum of exponentials.
  float* out;
  float* lse;
  float* weight;
};

// latent_value_up of up to kTile rows of one KV head. Row r is query r / queries_per_kv, query head
// head * queries_per_kv + r % queries_per_kv.
struct ValueUp {
  const float* o_lat;   // [tokens][num_heads][v_width]
  const void* factors;  // [num_kv_heads][head_dim][v_width]
  const float* bias;    // [num_kv_heads][head_dim] or null
  void* out;            // [tokens][num_heads][head_dim]
  int num_heads, queries_per_kv, head_dim, v_width;
  int head;
  int64_t first_row;
  int rows;
};

enum Element { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

// Entry points of one instruction set; null where it has no fast way.
struct Kernels {
  // Bytes of scratch memory that run() needs for a task, 64-byte aligned.
  int64_t (*scratch_bytes)(const Layer&, const Task&);
  // By Element of the cache and the queries.
  void (*run[3])(const Layer&, const Batch&, const Task&, void* scratch);
  // Bytes of scratch memory for value_up().
  int64_t (*value_up_scratch_bytes)(const ValueUp&);
  // By Element of the factors, then of the output.
  void (*value_up[3][3])(const ValueUp&, void* scratch);
};

extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
extern const Kernels kernels_avx512_bf16;

}  // namespace recalkv
