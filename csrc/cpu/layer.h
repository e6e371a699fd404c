// One layer's constants as the kernels see them. Plain data only, as in all headers that are
// compiled once per instruction set: nothing in them may be merged across sets by the linker.
#pragma once

#include "sizes.h"

namespace recalkv {

// Rotation pairs in order of falling frequency: exact_pairs that are reconstructed, tile_pairs that
// are folded into the queries once per tile, and stretch_pairs once per stretch; see expansion.h.
// Coefficients are those of cosines, then of sines, of pairs padded to a multiple of 16.
struct Expansion {
  int exact_pairs, tile_pairs, stretch_pairs;
  int terms;                          // functions of a tile, a multiple of kTerms
  const float* basis;                 // [terms][kTile]
  const float* tile_coefficients;     // [tiles][terms][2 (cos, sin)][tile_pairs, padded]
  const float* stretch_coefficients;  // [stretches][kTerms][2][stretch_pairs, padded]
  const float* stretch_basis;         // [tiles of a stretch][kTerms][terms]
};

// Pointers belong to the tensors of an AttentionLayer.
struct Layer {
  int num_kv_heads;
  int head_dim;
  int k_groups;
  int group_heads;
  int k_width;
  int v_groups;
  int v_width;
  int64_t rank;  // columns of a latent up to the last that is read
  const int64_t* k_starts;
  const int64_t* v_starts;
  // [num_kv_heads][head_dim][k_width] in the compute format; rows of a head in pair order (the two
  // members of a rotation pair are neighbors), so that RoPE styles need no case of their own.
  const Unit* k_factors;
  const float* k_bias;  // [num_kv_heads][head_dim] in pair order, or null
  int key_scales;       // factors on keys in the cache: none, one per token, or one per KV head
  const float* rope;    // [tiles][2 (cos, sin)][rot_pairs][kTile], or null
  int rot_pairs;
  bool is_neox;
  int64_t max_position;  // positions that rope has
  Expansion expansions[kExpansions];
  int num_expansions;
  // [num_kv_heads][units of all pairs][k_width] in the compute format, or null.
  const Unit* pair_factors;
  // How values come from latents; null where only value latents are asked for.
  const void* v_up;     // [num_kv_heads][head_dim][v_width] in the queries' type
  const float* v_bias;  // [num_kv_heads][head_dim], or null
  // The same in the compute format, [num_kv_heads][units of v_width][head_dim]; null where values
  // are never wider as latents than reconstructed.
  const Unit* v_panel;
  float scale;
  float soft_cap;  // 0 is none
  int64_t window;  // 0 is none
  // [query heads], or null: logits that join the sum of a row's softmax and have no value.
  const float* sinks;
};

}  // namespace recalkv
