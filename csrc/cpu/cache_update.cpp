// latent_cache_update: latents, quantized where the cache is, into their slots.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <c10/util/Exception.h>

#include <cstring>
#include <vector>

#include "ops.h"
#include "quantization.h"

namespace recalkv {
namespace {

// Copying less than this many bytes is not worth waking a thread,
constexpr int64_t kBytesPerThread = 1 << 16;
// nor is quantizing fewer elements.
constexpr int64_t kElementsPerThread = 1 << 12;

int64_t tokens_per_thread(int64_t share, int64_t row) {
  return std::max<int64_t>(1, share / std::max<int64_t>(1, row));
}

template <class Slot>
const Slot* checked_slots(const at::Tensor& slot_mapping, int64_t capacity) {
  const Slot* slots = slot_mapping.const_data_ptr<Slot>();
  for (int64_t i = 0; i < slot_mapping.size(0); ++i)
    TORCH_CHECK_VALUE(slots[i] < capacity, "slot_mapping[", i, "]: expected a slot of kv_cache ",
                      "(below ", capacity, ") or a negative number, found ", slots[i]);
  return slots;
}

template <class Slot>
void copy(const at::Tensor& z, at::Tensor& kv_cache, const at::Tensor& slot_mapping) {
  const int64_t block_size = kv_cache.size(1);
  const Slot* slots = checked_slots<Slot>(slot_mapping, kv_cache.size(0) * block_size);
  const int64_t item = z.element_size(), row = z.size(1) * item;
  const char* from = static_cast<const char*>(z.const_data_ptr());
  char* to = static_cast<char*>(kv_cache.mutable_data_ptr());
  const int64_t z_stride = z.stride(0) * item, block_stride = kv_cache.stride(0) * item,
                token_stride = kv_cache.stride(1) * item;
  const int64_t grain = tokens_per_thread(kBytesPerThread, row);
  at::parallel_for(0, slot_mapping.size(0), grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (slots[i] < 0) continue;
      std::memcpy(to + slots[i] / block_size * block_stride + slots[i] % block_size * token_stride,
                  from + i * z_stride, row);
    }
  });
}

template <class Element, class Slot>
void quantize_all(const at::Tensor& z, at::Tensor& kv_cache, const at::Tensor& slot_mapping,
                  const LatentLayout& layout) {
  const int64_t block_size = kv_cache.size(1), block_stride = kv_cache.stride(0);
  const Slot* slots = checked_slots<Slot>(slot_mapping, kv_cache.size(0) * block_size);
  const Element* from = z.const_data_ptr<Element>();
  uint8_t* to = kv_cache.mutable_data_ptr<uint8_t>();
  const int64_t grain = tokens_per_thread(kElementsPerThread, layout.rank);
  at::parallel_for(0, slot_mapping.size(0), grain, [&](int64_t begin, int64_t end) {
    std::vector<float> elements(layout.rank);
    std::vector<uint8_t> units(layout.rank);
    for (int64_t i = begin; i < end; ++i) {
      if (slots[i] < 0) continue;
      const Element* row = from + i * z.stride(0);
      for (int j = 0; j < layout.rank; ++j) elements[j] = static_cast<float>(row[j]);
      uint8_t* block = to + slots[i] / block_size * block_stride;
      const int64_t offset = slots[i] % block_size;
      uint8_t* scales = block + block_size * layout.code_bytes;
      quantize(layout, elements.data(), units.data(), block + offset * layout.code_bytes,
               scales + offset * layout.groups * scale_bytes(layout.scale_type));
    }
  });
}

}  // namespace

void latent_cache_update(const at::Tensor& z, at::Tensor& kv_cache, const at::Tensor& slot_mapping,
                         std::string_view latent_dtype, int64_t group_size,
                         const std::optional<at::Tensor>& bands) {
  const OwnedLayout owned =
      LatentFormat(latent_dtype, group_size, bands).layout_of_slots(kv_cache.size(2));
  AT_DISPATCH_INDEX_TYPES(slot_mapping.scalar_type(), "latent_cache_update", [&] {
    if (!owned.layout.num_bands) return copy<index_t>(z, kv_cache, slot_mapping);
    AT_DISPATCH_FLOATING_TYPES_AND2(
        at::kHalf, at::kBFloat16, z.scalar_type(), "latent_cache_update",
        [&] { quantize_all<scalar_t, index_t>(z, kv_cache, slot_mapping, owned.layout); });
  });
}

}  // namespace recalkv
