// Quantized latents on the host's side: formats by name, and writing a token's codes and scales.
#pragma once

#include <cstdint>
#include <string_view>

#include "latent_format.h"

namespace recalkv {

// A format of recalkv_vllm/latent_format.py; an empty name is no quantization.
LatentFormat latent_format_of(std::string_view dtype, int64_t group_size);

LatentLayout layout_of_rank(const LatentFormat& format, int64_t rank);

// The layout whose slots have this many bytes; without quantization, this many elements.
LatentLayout layout_of_slots(const LatentFormat& format, int64_t slot_size);

// Writes the packed codes and the bfloat16 scales of `z`, `rank` elements, and uses `units`, `rank`
// bytes. Bit for bit what LatentFormat.quantize and .pack make of finite elements.
void quantize(const LatentLayout& layout, const float* z, uint8_t* units, uint8_t* codes,
              uint16_t* scales);

}  // namespace recalkv
