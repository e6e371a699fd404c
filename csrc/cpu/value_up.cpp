// latent_value_up: blocks of rows on torch's own threads.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>

#include "dtypes.h"
#include "isa.h"
#include "ops.h"
#include "value_up.h"
#include "workspace.h"

namespace recalkv {
namespace {

// Multiply-adds that are worth a thread, which after attention is still awake: factors come from
// memory, and that takes longer than the arithmetic.
constexpr int64_t kWorkPerThread = 1 << 14;

}  // namespace

void run_value_up(const ElementKernels& kernels, ElementType to, const ValueUp& job) {
  const int64_t rows = job.rows, heads = job.num_heads / job.queries_per_kv;
  const int64_t blocks = (rows + kTile - 1) / kTile;
  const int64_t work =
      std::max<int64_t>(1, std::min<int64_t>(rows, kTile) * job.head_dim * job.v_width);
  at::parallel_for(0, blocks * heads, std::max<int64_t>(1, kWorkPerThread / work),
                   [&](int64_t begin, int64_t end) {
    static thread_local Workspace scratch;
    void* memory = scratch.reserve(kernels.value_up_scratch_bytes(job));
    for (int64_t i = begin; i < end; ++i) {
      ValueUp block = job;
      block.head = static_cast<int>(i / blocks);
      const int64_t first = i % blocks * kTile;
      block.first_row += first;
      block.rows = std::min<int64_t>(kTile, rows - first);
      kernels.value_up[to](block, memory);
    }
  });
}

at::Tensor latent_value_up(const at::Tensor& o_lat, const at::Tensor& v_up,
                           const std::optional<at::Tensor>& v_bias, at::ScalarType out_dtype,
                           std::string_view isa) {
  const ElementType from = element_type_of(v_up.scalar_type(), "v_up");
  const ElementType to = element_type_of(out_dtype, "out_dtype");
  const ElementKernels& kernels = checked_isa(isa).of[from];
  TORCH_CHECK_VALUE(kernels.value_up[to], "v_up: ", isa, " has no kernels for ",
                    v_up.scalar_type());
  at::Tensor out =
      at::empty({o_lat.size(0), o_lat.size(1), v_up.size(1)}, v_up.options().dtype(out_dtype));
  ValueUp job{};
  job.o_lat = o_lat.const_data_ptr<float>();
  job.factors = v_up.const_data_ptr();
  job.bias = v_bias ? v_bias->const_data_ptr<float>() : nullptr;
  job.out = out.mutable_data_ptr();
  job.num_heads = static_cast<int>(o_lat.size(1));
  job.queries_per_kv = static_cast<int>(o_lat.size(1) / v_up.size(0));
  job.head_dim = static_cast<int>(v_up.size(1));
  job.v_width = static_cast<int>(v_up.size(2));
  job.rows = o_lat.size(0) * job.queries_per_kv;
  run_value_up(kernels, to, job);
  return out;
}

}  // namespace recalkv
