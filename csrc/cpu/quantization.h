// Quantised latents on the host's side: formats by name, and writing a token's codes and scales.
#pragma once

#include <cstdint>
#include <string_view>

#include "attention.h"

namespace recalkv {

// Sizes of a format of recalkv_vllm/latent_format.py; an empty name is no quantisation.
Quantization quantization_of(std::string_view dtype, int64_t rank, int64_t group_size);

// Writes the packed codes and the bfloat16 scales of `z`, `rank` numbers, and uses `units`, `rank`
// bytes. Bit for bit what LatentFormat.quantize and .pack make of finite numbers.
void quantize(const Quantization& how, const float* z, uint8_t* units, uint8_t* codes,
              uint16_t* scales);

}  // namespace recalkv
