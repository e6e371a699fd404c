// paged_latent_attention: checks, schedule, tasks on torch's own threads, merge of KV splits.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>

#include <atomic>
#include <cmath>
#include <limits>

#include "elements.h"
#include "isa.h"
#include "ops.h"
#include "quantization.h"
#include "schedule.h"
#include "workspace.h"

namespace recalkv {
namespace {

constexpr float kNone = -std::numeric_limits<float>::infinity();

// What only the values tell, and what would otherwise read memory that is not ours.
void check_batch(const at::Tensor& kv_cache, const at::Tensor& block_table, const int32_t* seq_lens,
                 const int32_t* starts, int64_t tokens, int64_t max_position) {
  const int64_t blocks = kv_cache.size(0), block_size = kv_cache.size(1);
  const int64_t capacity = block_table.size(1) * block_size;
  for (int64_t i = 0; i < block_table.size(0); ++i) {
    const int64_t queries = int64_t{starts[i + 1]} - starts[i];
    TORCH_CHECK_VALUE(starts[i] >= 0 && queries >= 0 && starts[i + 1] <= tokens, "query_start_loc[",
                      i + 1, "]: expected ", starts[i], " to ", tokens, " (rows of q), found ",
                      starts[i + 1]);
    if (queries == 0 || seq_lens[i] == 0) continue;
    TORCH_CHECK_VALUE(seq_lens[i] >= queries && seq_lens[i] <= capacity, "seq_lens[", i,
                      "]: expected ", queries, " (its queries) to ", capacity,
                      " (slots in its row of block_table), found ", seq_lens[i]);
    TORCH_CHECK_VALUE(seq_lens[i] <= max_position, "seq_lens[", i, "]: expected at most ",
                      max_position, " (rows of cos_sin_cache), found ", seq_lens[i]);
    const int32_t* row = block_table.const_data_ptr<int32_t>() + i * block_table.stride(0);
    for (int64_t j = 0; j * block_size < seq_lens[i]; ++j)
      TORCH_CHECK_VALUE(row[j] >= 0 && row[j] < blocks, "block_table[", i, ", ", j,
                        "]: expected a block of kv_cache (0 to ", blocks - 1, "), found ", row[j]);
  }
}

void merge_row(const QueryBlock& block, int64_t row, int64_t rows, int v_width,
               const float* partial, const float* maxima, const float* weights, float* out,
               float* lse) {
  float top = kNone;
  for (int s = 0; s < block.splits; ++s)
    top = std::max(top, maxima[block.partial_row + s * rows + row]);
  for (int i = 0; i < v_width; ++i) out[i] = 0;
  float total = 0;
  for (int s = 0; s < block.splits; ++s) {
    const int64_t index = block.partial_row + s * rows + row;
    if (weights[index] == 0) continue;
    const float factor = std::exp(maxima[index] - top);
    total += weights[index] * factor;
    const float* part = partial + index * v_width;
    for (int i = 0; i < v_width; ++i) out[i] += part[i] * factor;
  }
  const float inverse = total == 0 ? 0 : 1 / total;
  for (int i = 0; i < v_width; ++i) out[i] *= inverse;
  *lse = top + std::log(total);
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> paged_latent_attention(
    const at::Tensor& q, const at::Tensor& kv_cache, const at::Tensor& block_table,
    const at::Tensor& seq_lens, const at::Tensor& query_start_loc, const at::Tensor& k_factors,
    const std::optional<at::Tensor>& k_bias, const std::optional<at::Tensor>& k_norm_weight,
    const std::optional<at::Tensor>& rope, const std::optional<at::Tensor>& basis,
    const std::optional<at::Tensor>& coefficients, const std::optional<at::Tensor>& pair_factors,
    at::IntArrayRef k_starts, at::IntArrayRef v_starts, int64_t v_width, int64_t max_position,
    bool is_neox, double scale, double k_norm_eps, double soft_cap, int64_t window,
    std::string_view isa, std::string_view latent_dtype, int64_t group_size, int64_t rank) {
  const Element element = element_of(q.scalar_type(), "q");
  const Kernels* kernels = find_isa(std::string(isa));
  TORCH_CHECK_VALUE(kernels && kernels->run[element], "isa: expected one that this processor and ",
                    q.scalar_type(), " support, found ", isa);
  const int32_t* lengths = seq_lens.const_data_ptr<int32_t>();
  const int32_t* starts = query_start_loc.const_data_ptr<int32_t>();
  const int num_seqs = static_cast<int>(block_table.size(0));
  check_batch(kv_cache, block_table, lengths, starts, q.size(0), max_position);

  Layer layer{};
  layer.num_heads = static_cast<int>(q.size(1));
  layer.num_kv_heads = static_cast<int>(k_factors.size(0));
  layer.head_dim = static_cast<int>(q.size(2));
  layer.queries_per_kv = layer.num_heads / layer.num_kv_heads;
  layer.k_groups = static_cast<int>(k_starts.size());
  layer.group_heads = layer.num_kv_heads / layer.k_groups;
  layer.k_width = static_cast<int>(k_factors.size(2));
  layer.v_groups = static_cast<int>(v_starts.size());
  layer.v_width = static_cast<int>(v_width);
  layer.k_starts = k_starts.data();
  layer.v_starts = v_starts.data();
  layer.k_factors = static_cast<const Unit*>(k_factors.const_data_ptr());
  layer.k_bias = k_bias ? k_bias->const_data_ptr<float>() : nullptr;
  layer.k_norm_weight = k_norm_weight ? k_norm_weight->const_data_ptr<float>() : nullptr;
  layer.k_norm_eps = static_cast<float>(k_norm_eps);
  layer.rope = rope ? rope->const_data_ptr<float>() : nullptr;
  layer.rot_pairs = rope ? static_cast<int>(rope->size(2)) : 0;
  layer.is_neox = is_neox;
  if (pair_factors) {
    layer.basis = basis->const_data_ptr<float>();
    layer.coefficients = coefficients->const_data_ptr<float>();
    layer.pair_factors = static_cast<const Unit*>(pair_factors->const_data_ptr());
    layer.expanded_pairs = static_cast<int>(pair_factors->size(1));
    layer.exact_pairs = layer.head_dim / 2 - layer.expanded_pairs;
  }
  layer.scale = static_cast<float>(scale);
  layer.soft_cap = static_cast<float>(soft_cap);
  layer.window = window;
  layer.quantization = quantization_of(latent_dtype, rank, group_size);
  const Batch batch{q.const_data_ptr(), q.stride(0),        kv_cache.const_data_ptr(),
                    kv_cache.stride(0), kv_cache.stride(1), static_cast<int>(kv_cache.size(1))};

  at::Tensor out = at::empty({q.size(0), q.size(1), v_width}, q.options().dtype(at::kFloat));
  at::Tensor lse = at::empty({q.size(0), q.size(1)}, out.options());
  float* out_data = out.mutable_data_ptr<float>();
  float* lse_data = lse.mutable_data_ptr<float>();

  static thread_local Schedule schedule;
  static thread_local Workspace partials;
  const int threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  make_schedule(layer, lengths, starts, num_seqs, threads, schedule);
  const Schedule& plan = schedule;
  float* partial = static_cast<float*>(
      partials.reserve(plan.partial_rows * (v_width + 2) * static_cast<int64_t>(sizeof(float))));
  float* maxima = partial + plan.partial_rows * v_width;
  float* weights = maxima + plan.partial_rows;

  const auto run = [&](const QueryBlock& block, int part) {
    const int split = part / block.group_parts, piece = part % block.group_parts;
    Task task{};
    task.blocks = block_table.const_data_ptr<int32_t>() + block.sequence * block_table.stride(0);
    task.first_token = block.first_token;
    task.first_position = block.first_position;
    task.num_queries = block.num_queries;
    task.group_begin = layer.k_groups * piece / block.group_parts;
    task.group_end = layer.k_groups * (piece + 1) / block.group_parts;
    task.kv_begin = block.kv_begin + split * block.tiles_per_split * kTile;
    task.kv_end = std::min(block.kv_end, task.kv_begin + block.tiles_per_split * kTile);
    int64_t row = block.first_token * layer.num_heads;
    if (block.splits > 1) {
      row = block.partial_row + int64_t{split} * block.num_queries * layer.num_heads;
      task.out = partial + row * v_width;
      task.lse = maxima + row;
      task.weight = weights + row;
    } else {
      task.out = out_data + row * v_width;
      task.lse = lse_data + row;
    }
    static thread_local Workspace scratch;
    kernels->run[element](layer, batch, task, scratch.reserve(kernels->scratch_bytes(layer, task)));
  };

  std::atomic<int> next{0};
  const auto work = [&](int64_t, int64_t) {
    size_t block = 0;
    int first = 0;
    for (int task; (task = next.fetch_add(1, std::memory_order_relaxed)) < plan.num_tasks;) {
      while (task - first >= plan.blocks[block].splits * plan.blocks[block].group_parts) {
        first += plan.blocks[block].splits * plan.blocks[block].group_parts;
        ++block;
      }
      run(plan.blocks[block], task - first);
    }
  };
  at::parallel_for(0, std::min(threads, plan.num_tasks), 1, work);

  for (const QueryBlock& block : plan.blocks) {
    if (block.splits == 1) continue;
    const int64_t rows = int64_t{block.num_queries} * layer.num_heads;
    const int64_t first = block.first_token * layer.num_heads;
    at::parallel_for(0, rows, 256, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row)
        merge_row(block, row, rows, layer.v_width, partial, maxima, weights,
                  out_data + (first + row) * v_width, lse_data + first + row);
    });
  }
  return {out, lse};
}

}  // namespace recalkv
