#include "schedule.h"

#include <algorithm>

namespace recalkv {
namespace {

// Rows per KV head beyond which a block is cut, for its sums take memory. Keys and values are
// reconstructed once per block. Fewer rows where threads would have no task: down to
// kFewestBlockRows, reconstruction costs under a third of the attention itself.
constexpr int kBlockRows = 8192;
constexpr int kFewestBlockRows = 256;
// From this many rows on, a task takes one K group, so that its rows stay in the L2 cache.
constexpr int kManyRows = 64;
// Tasks per thread: enough to even out a core that is busy elsewhere.
constexpr int kTasksPerThread = 4;
// Columns of latents of a task with few rows: a tile of them and the next one stay in the L2 cache,
// beside the factors.
constexpr int64_t kTaskColumns = 1024;
// Tiles of a task that reads fewer columns than there are: the tasks of the others follow while
// the processor still knows the tokens' pages.
constexpr int64_t kPartTiles = 16;
// A task below this many tiles x groups is not worth its start,
constexpr int64_t kSmallestTask = 4;
// nor is one below this many that is not needed to give each thread one.
constexpr int64_t kSmallestSpare = 16;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t tiles(const QueryBlock& block) { return ceil_div(block.kv_end - block.kv_begin, kTile); }

int64_t rows(const Batch& batch, const QueryBlock& block) {
  return int64_t{block.num_queries} * batch.queries_per_kv;
}

// Relative cost per tile: one share to reconstruct keys, and one per kManyRows rows to attend.
int64_t cost(const Layer& layer, const Batch& batch, const QueryBlock& block) {
  return tiles(block) * layer.k_groups * (1 + rows(batch, block) / kManyRows);
}

// Into how many parts groups are cut at least, so that a task reads kTaskColumns or fewer. Parts
// that share a V group would read it several times.
int64_t least_group_parts(const Layer& layer) {
  const int most = std::min(layer.k_groups, layer.v_groups);
  return std::clamp<int64_t>(ceil_div(layer.rank, kTaskColumns), 1, most);
}

int block_rows(const Layer& layer, const Batch& batch, int threads) {
  const int64_t all = int64_t{batch.query_start_loc[batch.num_seqs]} * batch.queries_per_kv;
  int most = kBlockRows;
  while (threads > 1 && most > kFewestBlockRows &&
         all / most * layer.k_groups < kTasksPerThread * threads)
    most /= 2;
  return most;
}

// Whether reconstructing a tile's values costs less than what `rows` narrower rows of sums save.
bool is_dense(const Layer& layer, int64_t rows) {
  const int64_t saved = layer.v_width - layer.head_dim;
  return layer.v_panel && rows >= kManyRows &&
         rows * saved > int64_t{layer.head_dim} * layer.v_width;
}

}  // namespace

int64_t QueryBlock::split_begin(int split) const {
  const int64_t least = tiles(*this) / splits, larger = tiles(*this) % splits;
  return std::min(kv_end, kv_begin + (split * least + std::min<int64_t>(split, larger)) * kTile);
}

void make_schedule(const Layer& layer, const Batch& batch, int threads, bool to_heads,
                   Schedule& schedule) {
  schedule.blocks.clear();
  schedule.partial_rows = 0;
  schedule.num_tasks = 0;
  const int most_queries = std::max(1, block_rows(layer, batch, threads) / batch.queries_per_kv);
  int64_t total = 0;
  for (int i = 0; i < batch.num_seqs; ++i) {
    const int64_t length = batch.seq_lens[i];
    const int64_t end = batch.query_start_loc[i + 1];
    for (int64_t token = batch.query_start_loc[i]; token < end; token += most_queries) {
      QueryBlock block{};
      block.sequence = i;
      block.first_token = token;
      block.first_position = length - (end - token);
      block.num_queries = static_cast<int>(std::min<int64_t>(most_queries, end - token));
      if (length > 0) {
        block.kv_end = block.first_position + block.num_queries;
        const int64_t oldest = layer.window ? block.first_position - layer.window + 1 : 0;
        block.kv_begin = std::max<int64_t>(oldest, 0) / kTile * kTile;
      }
      block.dense = to_heads && is_dense(layer, rows(batch, block));
      total += cost(layer, batch, block);
      schedule.blocks.push_back(block);
    }
  }

  // As many for each thread, or some would wait for the others.
  const int64_t per_thread =
      std::clamp<int64_t>(total / std::max(threads, 1) / kSmallestSpare, 1, kTasksPerThread);
  for (QueryBlock& block : schedule.blocks) {
    const int64_t work = cost(layer, batch, block);
    const int64_t pieces = threads > 1 && work > 0
                               ? std::clamp<int64_t>(work * threads * per_thread / total, 1,
                                                     std::max<int64_t>(1, work / kSmallestTask))
                               : 1;
    if (rows(batch, block) >= kManyRows) {
      block.group_parts = layer.k_groups;
      block.splits = 1;
    } else {
      const int64_t parts = least_group_parts(layer);
      const int64_t least_splits = parts > 1 ? tiles(block) / kPartTiles : 1;
      block.splits = static_cast<int>(std::clamp<int64_t>(std::max(pieces / parts, least_splits), 1,
                                                          std::max<int64_t>(1, tiles(block))));
      block.group_parts =
          static_cast<int>(std::clamp<int64_t>(pieces / block.splits, parts, layer.k_groups));
    }
    if (block.splits > 1) {
      block.partial_row = schedule.partial_rows;
      schedule.partial_rows += int64_t{block.splits} * block.num_queries * batch.num_heads;
    }
    schedule.num_tasks += block.num_tasks();
  }
  // Longest first, so that no thread starts a long task when the others are done.
  std::stable_sort(schedule.blocks.begin(), schedule.blocks.end(),
                   [&](const QueryBlock& a, const QueryBlock& b) {
    return cost(layer, batch, a) / a.num_tasks() > cost(layer, batch, b) / b.num_tasks();
  });
}

}  // namespace recalkv
