// A piece of work: some queries of one sequence against some of its tiles, for some K groups.
#pragma once

#include <cstdint>

namespace recalkv {

struct Task {
  const int32_t* blocks;   // the sequence's row of the block table
  int64_t first_token;     // row in q of the first query
  int64_t first_position;  // position of the first query
  int num_queries;
  int group_begin, group_end;
  int64_t kv_begin, kv_end;  // kv_begin is a multiple of kTile
  // Results, unless `heads` is there. Row (query, head) of out starts at (query * num_heads + head)
  // * v_width, of lse and weight at query * num_heads + head. With weight (a split), out is left
  // unnormalized, lse holds the running maximum and weight the sum of exponentials.
  float* out;
  float* lse;
  float* weight;
  // Results of a task that reconstructs values: row (query, head) starts at
  // (query * num_heads + head) * head_dim, in the queries' type.
  void* heads;
};

}  // namespace recalkv
