// Cuts one attention call into tasks of about equal cost.
#pragma once

#include <cstdint>
#include <vector>

#include "batch.h"
#include "layer.h"

namespace recalkv {

// Queries of one sequence that tasks handle together. With splits > 1 its tasks write partial
// results, `splits` times [num_queries][num_heads], from row `partial_row` of the workspace on.
struct QueryBlock {
  int sequence;
  int64_t first_token;
  int64_t first_position;
  int num_queries;
  int64_t kv_begin, kv_end;
  int splits;
  int group_parts;
  int64_t partial_row;
  bool dense;  // values are reconstructed, too; never split

  int num_tasks() const { return splits * group_parts; }
  // The first token in the cache of `split`; of split `splits`, the end. Sizes differ by a tile.
  int64_t split_begin(int split) const;
};

struct Schedule {
  std::vector<QueryBlock> blocks;
  int64_t partial_rows = 0;
  int num_tasks = 0;
};

// Fills `schedule`, reusing its memory. With `to_heads`, blocks are dense where that is cheaper.
void make_schedule(const Layer& layer, const Batch& batch, int threads, bool to_heads,
                   Schedule& schedule);

}  // namespace recalkv
