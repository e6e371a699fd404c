#include <ATen/Parallel.h>
#include <c10/util/Exception.h>

#include <cstring>

#include "ops.h"

namespace recalkv {
namespace {

// Copying less than this many bytes is not worth waking a thread.
constexpr int64_t kBytesPerThread = 1 << 16;

template <class Slot>
void update(const at::Tensor& z, at::Tensor& kv_cache, const at::Tensor& slot_mapping) {
  const Slot* slots = slot_mapping.const_data_ptr<Slot>();
  const int64_t tokens = slot_mapping.size(0);
  const int64_t block_size = kv_cache.size(1), capacity = kv_cache.size(0) * block_size;
  for (int64_t i = 0; i < tokens; ++i)
    TORCH_CHECK_VALUE(slots[i] < capacity, "slot_mapping[", i, "]: expected a slot of kv_cache ",
                      "(below ", capacity, ") or a negative number, found ", slots[i]);
  const int64_t item = z.element_size(), row = z.size(1) * item;
  const char* from = static_cast<const char*>(z.const_data_ptr());
  char* to = static_cast<char*>(kv_cache.mutable_data_ptr());
  const int64_t z_stride = z.stride(0) * item, block_stride = kv_cache.stride(0) * item,
                token_stride = kv_cache.stride(1) * item;
  const int64_t grain = std::max<int64_t>(1, kBytesPerThread / std::max<int64_t>(1, row));
  at::parallel_for(0, tokens, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (slots[i] < 0) continue;
      std::memcpy(to + slots[i] / block_size * block_stride + slots[i] % block_size * token_stride,
                  from + i * z_stride, row);
    }
  });
}

}  // namespace

void latent_cache_update(const at::Tensor& z, at::Tensor& kv_cache,
                         const at::Tensor& slot_mapping) {
  if (slot_mapping.scalar_type() == at::kInt) {
    update<int32_t>(z, kv_cache, slot_mapping);
  } else {
    update<int64_t>(z, kv_cache, slot_mapping);
  }
}

}  // namespace recalkv
