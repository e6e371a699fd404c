// The kernels as torch ops, on LibTorch's stable ABI: one build serves torch 2.10 and later.
//
// Arguments have been checked in Python (recalkv_vllm/ops/validation, ops/cuda).
#define TORCH_TARGET_VERSION (((0ULL + 2) << 56) | ((0ULL + 10) << 48))
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <vector>

#include "launch.h"

// Tests register the ops for CPU tensors, with the kernels emulated.
#ifndef RECALKV_DISPATCH_KEY
#define RECALKV_DISPATCH_KEY CUDA
#endif

namespace recalkv {
namespace {

using torch::stable::Tensor;

template <typename T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

const float* optional_data(const std::optional<Tensor>& tensor) {
  return tensor ? data<const float>(*tensor) : nullptr;
}

// Makes a tensor's device current and names its current stream; none where torch has no CUDA.
class Stream {
 public:
#ifdef USE_CUDA
  explicit Stream(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream_) == 0,
                    "recalkv: torch names no current stream");
  }
#else
  explicit Stream(const Tensor&) {}
#endif
  void* get() const { return stream_; }

 private:
#ifdef USE_CUDA
  torch::stable::accelerator::DeviceGuard guard_;
#endif
  void* stream_ = nullptr;
};

void check(const char* error, const char* what) {
  STD_TORCH_CHECK(error == nullptr, "recalkv: ", what, ": ", error ? error : "");
}

// Gives the elements of an int[] argument, in order, to the fields that they are named after.
template <typename... Fields>
void assign(const std::vector<int64_t>& elements, const char* argument, Fields&... fields) {
  STD_TORCH_CHECK(elements.size() == sizeof...(fields), argument, ": expected ", sizeof...(fields),
                  " integers, found ", elements.size());
  auto next = elements.begin();
  ((fields = static_cast<Fields>(*next++)), ...);
}

using Launch = decltype(&launch_decode);

// What only the decode kernel for Hopper is told.
struct HopperArguments {
  std::optional<Tensor> slow_rotation;
  std::optional<Tensor> band_blocks;
  int64_t most_blocks = 0;
  int64_t token_scales = 0;
};

// What both decode kernels are told; `launch` starts one of them.
void run_decode(Launch launch, const char* what, const HopperArguments& hopper, const Tensor& q,
                const Tensor& kv_cache, const std::optional<Tensor>& key_scales,
                const Tensor& block_table, const Tensor& seq_lens, const Tensor& query_start_loc,
                const std::optional<Tensor>& pieces, const Tensor& k_factor,
                const std::optional<Tensor>& k_bias, const Tensor& base_rotation,
                const Tensor& local_rotation, const Tensor& tile_columns, Tensor out, Tensor lse,
                std::vector<int64_t> sizes, std::vector<int64_t> kernel, double scale,
                double soft_cap) {
  const Stream stream(q);
  DecodeParams p{};
  p.q = data<const uint16_t>(q);
  p.kv_cache = data<const uint16_t>(kv_cache);
  if (key_scales) {
    p.key_scales = data<const float>(*key_scales);
    p.key_scale_block_stride = key_scales->stride(0);
    p.key_scale_slot_stride = static_cast<int32_t>(key_scales->stride(1));
    p.key_scale_head_stride = key_scales->size(2) > 1;
  }
  p.block_table = data<const int32_t>(block_table);
  p.seq_lens = data<const int32_t>(seq_lens);
  p.query_start_loc = data<const int32_t>(query_start_loc);
  if (pieces) {
    p.pieces = data<const int32_t>(*pieces);
    p.capacity = static_cast<int32_t>(pieces->size(0));
  }
  p.k_factor = data<const void>(k_factor);
  p.k_bias = optional_data(k_bias);
  p.base_rotation = data<const float>(base_rotation);
  p.local_rotation = data<const float>(local_rotation);
  p.slow_rotation = optional_data(hopper.slow_rotation);
  p.band_blocks = hopper.band_blocks ? data<const int32_t>(*hopper.band_blocks) : nullptr;
  p.most_blocks = static_cast<int32_t>(hopper.most_blocks);
  p.token_scales = static_cast<int32_t>(hopper.token_scales);
  p.tile_columns = data<const int32_t>(tile_columns);
  p.out = data<float>(out);
  p.lse = data<float>(lse);
  p.q_token_stride = q.stride(0);
  p.cache_block_stride = kv_cache.stride(0);
  p.cache_slot_stride = kv_cache.stride(1);
  p.table_stride = block_table.stride(0);
  p.tokens = static_cast<int32_t>(q.size(0));
  p.num_seqs = static_cast<int32_t>(seq_lens.size(0));
  p.num_heads = static_cast<int32_t>(q.size(1));
  p.num_kv_heads = static_cast<int32_t>(k_factor.size(0));
  p.block_size = static_cast<int32_t>(kv_cache.size(1));
  // LayerSizes of recalkv_vllm/ops/cuda/layout.py.
  assign(sizes, "sizes", p.k_width, p.v_width, p.rotated_half, p.window, p.base_rotation_stride);
  p.scale = static_cast<float>(scale);
  p.soft_cap = static_cast<float>(soft_cap);
  // KernelShape of recalkv_vllm/ops/cuda/shapes.py.
  auto& shape = p.kernel;
  assign(kernel, "kernel", shape.column_tiles, shape.v_tiles, shape.heads, shape.teams,
         shape.stages, shape.tile_width, shape.resident, shape.shared_bytes, shape.lean);
  const auto type = q.scalar_type() == torch::headeronly::ScalarType::BFloat16
                        ? ElementType::kBFloat16
                        : ElementType::kFloat16;
  check(launch(p, type, static_cast<int>(q.size(2)), stream.get()), what);
}

void decode(const Tensor& q, const Tensor& kv_cache, const std::optional<Tensor>& key_scales,
            const Tensor& block_table, const Tensor& seq_lens, const Tensor& query_start_loc,
            const std::optional<Tensor>& pieces, const Tensor& k_factor,
            const std::optional<Tensor>& k_bias, const Tensor& base_rotation,
            const Tensor& local_rotation, const Tensor& tile_columns, Tensor out, Tensor lse,
            std::vector<int64_t> sizes, std::vector<int64_t> kernel, double scale,
            double soft_cap) {
  run_decode(launch_decode, "decode attention", {}, q, kv_cache, key_scales, block_table, seq_lens,
             query_start_loc, pieces, k_factor, k_bias, base_rotation, local_rotation, tile_columns,
             out, lse, sizes, kernel, scale, soft_cap);
}

void decode_hopper(const Tensor& q, const Tensor& kv_cache, const std::optional<Tensor>& key_scales,
                   const Tensor& block_table, const Tensor& seq_lens, const Tensor& query_start_loc,
                   const std::optional<Tensor>& pieces, const Tensor& k_factor,
                   const std::optional<Tensor>& k_bias, const Tensor& base_rotation,
                   const Tensor& local_rotation, const Tensor& slow_rotation,
                   const Tensor& tile_columns, Tensor out, Tensor lse, std::vector<int64_t> sizes,
                   std::vector<int64_t> kernel, double scale, double soft_cap,
                   const std::optional<Tensor>& band_blocks, int64_t most_blocks,
                   int64_t token_scales) {
  run_decode(launch_hopper, "decode attention on Hopper",
             {slow_rotation, band_blocks, most_blocks, token_scales}, q, kv_cache, key_scales,
             block_table, seq_lens, query_start_loc, pieces, k_factor, k_bias, base_rotation,
             local_rotation, tile_columns, out, lse, sizes, kernel, scale, soft_cap);
}

}  // namespace
}  // namespace recalkv

STABLE_TORCH_LIBRARY(recalkv_cuda, library) {
  library.def(
      "decode(Tensor q, Tensor kv_cache, Tensor? key_scales, Tensor block_table, Tensor seq_lens, "
      "Tensor query_start_loc, Tensor? pieces, Tensor k_factor, Tensor? k_bias, "
      "Tensor base_rotation, Tensor local_rotation, Tensor tile_columns, Tensor(a!) out, "
      "Tensor(b!) lse, int[] sizes, int[] kernel, float scale, float soft_cap) -> ()");
  library.def(
      "decode_hopper(Tensor q, Tensor kv_cache, Tensor? key_scales, Tensor block_table, "
      "Tensor seq_lens, Tensor query_start_loc, Tensor? pieces, Tensor k_factor, Tensor? k_bias, "
      "Tensor base_rotation, Tensor local_rotation, Tensor slow_rotation, Tensor tile_columns, "
      "Tensor(a!) out, Tensor(b!) lse, int[] sizes, int[] kernel, float scale, float soft_cap, "
      "Tensor? band_blocks, int most_blocks, int token_scales) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(recalkv_cuda, RECALKV_DISPATCH_KEY, library) {
  library.impl("decode", TORCH_BOX(&recalkv::decode));
  library.impl("decode_hopper", TORCH_BOX(&recalkv::decode_hopper));
}
