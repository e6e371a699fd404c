// paged_latent_attention, to value latents or to heads: checks, schedule, tasks on torch's own
// threads, merge of KV splits.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

#include "dtypes.h"
#include "ops.h"
#include "quantization.h"
#include "schedule.h"
#include "workspace.h"

namespace recalkv {
namespace {

int num_threads() { return at::in_parallel_region() ? 1 : at::get_num_threads(); }

constexpr float kNone = -std::numeric_limits<float>::infinity();

// Elements of a token's latent, its key scales left out.
int64_t latent_width(const Layer& layer, const at::Tensor& kv_cache) {
  const int64_t per_scale = static_cast<int64_t>(sizeof(float)) / kv_cache.element_size();
  return kv_cache.size(2) - layer.key_scales * per_scale;
}

Batch make_batch(const Layer& layer, const LatentLayout& latents, const at::Tensor& q,
                 const at::Tensor& kv_cache, const at::Tensor& block_table,
                 const at::Tensor& seq_lens, const at::Tensor& query_start_loc) {
  Batch batch{};
  batch.q = q.const_data_ptr();
  batch.q_stride = q.stride(0);
  batch.num_heads = static_cast<int>(q.size(1));
  batch.queries_per_kv = batch.num_heads / layer.num_kv_heads;
  batch.cache = kv_cache.const_data_ptr();
  batch.block_stride = kv_cache.stride(0);
  batch.token_stride = kv_cache.stride(1);
  batch.block_size = static_cast<int>(kv_cache.size(1));
  if (layer.key_scales) {
    // A block's latents, then the scales of all its tokens.
    batch.token_stride = latent_width(layer, kv_cache);
    batch.key_scales = static_cast<const char*>(batch.cache) +
                       batch.block_size * batch.token_stride * kv_cache.element_size();
    batch.block_bytes = batch.block_stride * kv_cache.element_size();
  }
  batch.latents = latents;
  batch.num_seqs = static_cast<int>(block_table.size(0));
  batch.block_table = block_table.const_data_ptr<int32_t>();
  batch.table_stride = block_table.stride(0);
  batch.seq_lens = seq_lens.const_data_ptr<int32_t>();
  batch.query_start_loc = query_start_loc.const_data_ptr<int32_t>();
  return batch;
}

// What only the values tell, and what would otherwise read memory that is not ours.
void check_batch(const Batch& batch, int64_t tokens, int64_t blocks, int64_t table_columns,
                 int64_t max_position) {
  const int64_t capacity = table_columns * batch.block_size;
  const int32_t* starts = batch.query_start_loc;
  for (int i = 0; i < batch.num_seqs; ++i) {
    const int64_t queries = int64_t{starts[i + 1]} - starts[i];
    const int64_t length = batch.seq_lens[i];
    TORCH_CHECK_VALUE(starts[i] >= 0 && queries >= 0 && starts[i + 1] <= tokens, "query_start_loc[",
                      i + 1, "]: expected ", starts[i], " to ", tokens, " (rows of q), found ",
                      starts[i + 1]);
    if (queries == 0 || length == 0) continue;
    TORCH_CHECK_VALUE(length >= queries && length <= capacity, "seq_lens[", i, "]: expected ",
                      queries, " (its queries) to ", capacity,
                      " (slots in its row of block_table), found ", length);
    TORCH_CHECK_VALUE(length <= max_position, "seq_lens[", i, "]: expected at most ", max_position,
                      " (rows of cos_sin_cache), found ", length);
    const int32_t* row = batch.block_table + i * batch.table_stride;
    for (int64_t j = 0; j * batch.block_size < length; ++j)
      TORCH_CHECK_VALUE(row[j] >= 0 && row[j] < blocks, "block_table[", i, ", ", j,
                        "]: expected a block of kv_cache (0 to ", blocks - 1, "), found ", row[j]);
  }
}

// Results by row: row token * num_heads + head of the op's, or a row of the splits' workspace.
struct Results {
  float* out;  // [rows][v_width]
  float* lse;
  float* weight;  // null where out is normalized

  Results from(int64_t row, int v_width) const {
    return {out + row * v_width, lse + row, weight ? weight + row : nullptr};
  }
};

// Where results of a call go.
struct Outputs {
  Results whole;
  char* heads;  // where those of dense blocks go instead, [rows][head_bytes]
  int64_t head_bytes;
};

// Task `part` of a block, with its results among `whole` or, if the block is split, `partial`.
Task make_task(const Layer& layer, const Batch& batch, const QueryBlock& block, int part,
               const Outputs& outputs, const Results& partial) {
  const int split = part / block.group_parts, piece = part % block.group_parts;
  const int64_t row = block.splits > 1
                          ? block.partial_row + int64_t{split} * block.num_queries * batch.num_heads
                          : block.first_token * batch.num_heads;
  Task task{};
  task.blocks = batch.block_table + block.sequence * batch.table_stride;
  task.first_token = block.first_token;
  task.first_position = block.first_position;
  task.num_queries = block.num_queries;
  task.group_begin = layer.k_groups * piece / block.group_parts;
  task.group_end = layer.k_groups * (piece + 1) / block.group_parts;
  task.kv_begin = block.split_begin(split);
  task.kv_end = block.split_begin(split + 1);
  if (block.dense) {
    task.heads = outputs.heads + row * outputs.head_bytes;
    return task;
  }
  const Results results = (block.splits > 1 ? partial : outputs.whole).from(row, layer.v_width);
  task.out = results.out;
  task.lse = results.lse;
  task.weight = results.weight;
  return task;
}

void run_tasks(const ElementKernels& kernels, const Layer& layer, const Batch& batch,
               const Schedule& schedule, int threads, const Outputs& outputs,
               const Results& partial) {
  std::atomic<int> next{0};
  at::parallel_for(0, std::min(threads, schedule.num_tasks), 1, [&](int64_t, int64_t) {
    static thread_local Workspace scratch;
    size_t block = 0;
    int first = 0;
    for (int i; (i = next.fetch_add(1, std::memory_order_relaxed)) < schedule.num_tasks;) {
      while (i - first >= schedule.blocks[block].num_tasks()) {
        first += schedule.blocks[block].num_tasks();
        ++block;
      }
      const Task task =
          make_task(layer, batch, schedule.blocks[block], i - first, outputs, partial);
      kernels.attend(layer, batch, task,
                     scratch.reserve(kernels.attend_scratch_bytes(layer, batch, task)));
    }
  });
}

// `split` is a row's first split; those of the others are `stride` rows apart.
void merge_row(const Results& split, int splits, int64_t stride, int v_width,
               const Results& merged) {
  float top = kNone;
  for (int s = 0; s < splits; ++s) top = std::max(top, split.lse[s * stride]);
  for (int i = 0; i < v_width; ++i) merged.out[i] = 0;
  float total = 0;
  for (int s = 0; s < splits; ++s) {
    const float weight = split.weight[s * stride];
    if (weight == 0) continue;
    const float factor = std::exp(split.lse[s * stride] - top);
    total += weight * factor;
    const float* part = split.out + s * stride * v_width;
    for (int i = 0; i < v_width; ++i) merged.out[i] += part[i] * factor;
  }
  const float inverse = total == 0 ? 0 : 1 / total;
  for (int i = 0; i < v_width; ++i) merged.out[i] *= inverse;
  *merged.lse = top + std::log(total);
}

void merge_splits(const Schedule& schedule, int num_heads, int v_width, const Results& partial,
                  const Results& whole) {
  for (const QueryBlock& block : schedule.blocks) {
    if (block.splits == 1) continue;
    const int64_t rows = int64_t{block.num_queries} * num_heads;
    const Results splits = partial.from(block.partial_row, v_width);
    const Results merged = whole.from(block.first_token * num_heads, v_width);
    at::parallel_for(0, rows, 256, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row)
        merge_row(splits.from(row, v_width), block.splits, rows, v_width,
                  merged.from(row, v_width));
    });
  }
}

// One call of the op, its arguments checked and cut into tasks.
struct Call {
  const Layer& layer;
  const ElementKernels& kernels;
  const OwnedLayout latents;
  const Batch batch;
  const Schedule& schedule;

  Call(const AttentionLayer& attention_layer, const at::Tensor& q, const at::Tensor& kv_cache,
       const at::Tensor& block_table, const at::Tensor& seq_lens, const at::Tensor& query_start_loc,
       bool to_heads)
      : layer(attention_layer.layer()),
        kernels(attention_layer.kernels(q.scalar_type())),
        latents(attention_layer.latent_format().layout_of_slots(latent_width(layer, kv_cache))),
        batch(
            make_batch(layer, latents.layout, q, kv_cache, block_table, seq_lens, query_start_loc)),
        schedule(reused_schedule()) {
    check_batch(batch, q.size(0), kv_cache.size(0), block_table.size(1), layer.max_position);
    make_schedule(layer, batch, num_threads(), to_heads, reused_schedule());
  }

  static Schedule& reused_schedule() {
    static thread_local Schedule schedule;
    return schedule;
  }

  // Runs the tasks and merges splits.
  void run(const Outputs& outputs) const {
    static thread_local Workspace workspace;
    const int64_t rows = schedule.partial_rows;
    float* space = static_cast<float*>(
        workspace.reserve(rows * (layer.v_width + 2) * static_cast<int64_t>(sizeof(float))));
    float* maxima = space + rows * layer.v_width;
    const Results partial{space, maxima, maxima + rows};
    run_tasks(kernels, layer, batch, schedule, num_threads(), outputs, partial);
    merge_splits(schedule, batch.num_heads, layer.v_width, partial, outputs.whole);
  }

  // Value latents of all blocks that are not dense to heads, neighbors at once. Where the layer has
  // sinks, log-sum-exps become the shares of rows' sums that are left beside them.
  void up_project(ElementType type, const float* o_lat, float* lse, void* heads) const {
    static thread_local std::vector<std::pair<int64_t, int64_t>> ranges;  // of tokens
    ranges.clear();
    for (const QueryBlock& block : schedule.blocks)
      if (!block.dense)
        ranges.emplace_back(block.first_token, block.first_token + block.num_queries);
    std::sort(ranges.begin(), ranges.end());
    ValueUp job{};
    job.o_lat = o_lat;
    job.shares = layer.sinks ? lse : nullptr;
    job.factors = layer.v_up;
    job.bias = layer.v_bias;
    job.out = heads;
    job.num_heads = batch.num_heads;
    job.queries_per_kv = batch.queries_per_kv;
    job.head_dim = layer.head_dim;
    job.v_width = layer.v_width;
    for (size_t i = 0; i < ranges.size();) {
      const int64_t begin = ranges[i].first;
      int64_t end = ranges[i].second;
      while (++i < ranges.size() && ranges[i].first == end) end = ranges[i].second;
      for (int64_t row = begin * batch.num_heads; layer.sinks && row < end * batch.num_heads; ++row)
        lse[row] = 1 / (1 + std::exp(layer.sinks[row % batch.num_heads] - lse[row]));
      job.first_row = begin * batch.queries_per_kv;
      job.rows = (end - begin) * batch.queries_per_kv;
      run_value_up(kernels, type, job);
    }
  }
};

}  // namespace

std::tuple<at::Tensor, at::Tensor> paged_latent_attention(
    const c10::intrusive_ptr<AttentionLayer>& attention_layer, const at::Tensor& q,
    const at::Tensor& kv_cache, const at::Tensor& block_table, const at::Tensor& seq_lens,
    const at::Tensor& query_start_loc) {
  const Call call(*attention_layer, q, kv_cache, block_table, seq_lens, query_start_loc, false);

  at::Tensor out =
      at::empty({q.size(0), q.size(1), call.layer.v_width}, q.options().dtype(at::kFloat));
  at::Tensor lse = at::empty({q.size(0), q.size(1)}, out.options());
  const Results whole{out.mutable_data_ptr<float>(), lse.mutable_data_ptr<float>(), nullptr};
  call.run({whole, nullptr, 0});
  return {out, lse};
}

void paged_latent_attention_heads(const c10::intrusive_ptr<AttentionLayer>& attention_layer,
                                  const at::Tensor& q, const at::Tensor& kv_cache,
                                  const at::Tensor& block_table, const at::Tensor& seq_lens,
                                  const at::Tensor& query_start_loc, at::Tensor& heads) {
  TORCH_CHECK_TYPE(attention_layer->values_dtype() == q.scalar_type(), "q: expected v_up's dtype, ",
                   attention_layer->values_dtype(), ", found ", q.scalar_type());
  TORCH_CHECK_VALUE(attention_layer->serves(q.size(1)),
                    "q: expected as many heads as sinks, found ", q.size(1));
  TORCH_CHECK_VALUE(heads.is_contiguous(), "out: expected contiguous, found strides ",
                    heads.strides());
  const Call call(*attention_layer, q, kv_cache, block_table, seq_lens, query_start_loc, true);

  const std::vector<QueryBlock>& blocks = call.schedule.blocks;
  const bool all_dense = std::all_of(blocks.begin(), blocks.end(),
                                     [](const QueryBlock& block) { return block.dense; });
  const int64_t rows = all_dense ? 0 : q.size(0);
  at::Tensor o_lat =
      at::empty({rows, q.size(1), call.layer.v_width}, q.options().dtype(at::kFloat));
  at::Tensor lse = at::empty({rows, q.size(1)}, o_lat.options());
  const Results whole{o_lat.mutable_data_ptr<float>(), lse.mutable_data_ptr<float>(), nullptr};
  char* out = static_cast<char*>(heads.mutable_data_ptr());
  const int64_t head_bytes = call.layer.head_dim * q.element_size();
  call.run({whole, out, head_bytes});
  call.up_project(element_type_of(q.scalar_type(), "q"), whole.out, whole.lse, out);
  // Rows of no sequence, which a padded batch has behind the others.
  const int64_t token_bytes = q.size(1) * head_bytes;
  const int64_t used = call.batch.query_start_loc[call.batch.num_seqs];
  if (used < q.size(0)) std::memset(out + used * token_bytes, 0, (q.size(0) - used) * token_bytes);
}

}  // namespace recalkv
