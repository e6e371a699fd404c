// Quantized latents on the host's side: formats as Python names them, and writing a token's codes
// and scales.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <string_view>
#include <vector>

#include "latent_format.h"

namespace recalkv {

// A layout and the bands that it points to, which stay where they are when the vector moves.
struct OwnedLayout {
  std::vector<Band> bands;
  LatentLayout layout;

  OwnedLayout(std::vector<Band> bands, const LatentLayout& layout);
  OwnedLayout(const OwnedLayout&) = delete;
  OwnedLayout(OwnedLayout&&) = default;
};

// A format of recalkv_vllm/latent_format.py or band_format.py.
class LatentFormat {
 public:
  // An empty dtype is no quantization. `bands`, [bands, 2] int64 on the CPU, are columns and bits,
  // for dtype "bands" alone. Throws a ValueError for what there is no codec for.
  LatentFormat(std::string_view dtype, int64_t group_size, const std::optional<at::Tensor>& bands);

  // Of a cache whose slots have this many bytes; without quantization, this many elements.
  OwnedLayout layout_of_slots(int64_t slot_size) const;

 private:
  struct Stretch {
    Codec codec;
    int columns;
  };

  void set_bands(const at::Tensor& bands);
  int64_t rank_of_slots(int64_t slot_size) const;

  std::vector<Stretch> bands_;  // without columns where the rank tells them
  ScaleType scale_type_ = ScaleType::kBFloat16;
  int code_alignment_ = 1;  // bytes of a token's codes are a multiple of it
  int group_shift_;
};

// Writes the packed codes and the scales of `z`, `rank` elements, and uses `units`, `rank` bytes.
// Bit for bit what quantize and pack of the format in Python make of it.
void quantize(const LatentLayout& layout, const float* z, uint8_t* units, uint8_t* codes,
              uint8_t* scales);

}  // namespace recalkv
