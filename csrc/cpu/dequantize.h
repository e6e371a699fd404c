// A tile of quantized latents as rows of elements, which all else then reads like an unquantized
// cache: once per task and tile, and only the columns that the task's heads read.
#pragma once

#include "codes.h"
#include "tile.h"

namespace recalkv::RECALKV_ISA {

template <Codec kCodec>
RECALKV_INLINE Vec load_codes(const uint8_t* codes, int64_t column, int rank) {
  if constexpr (kCodec == Codec::kInt8) return load_int8(codes, column);
  if constexpr (kCodec == Codec::kFp8) return load_fp8(codes, column);
  if constexpr (kCodec == Codec::kInt4) return load_int4(codes, column);
  return load_int3(codes, column, rank);
}

// An integer code u of b bits stands for (u + 0.5 - 2^(b-1)) · scale.
constexpr float center(Codec codec) {
  return codec == Codec::kInt8 ? -127.5f : codec == Codec::kInt4 ? -7.5f : -3.5f;
}

template <class Format>
template <Codec kCodec>
void Attention<Format>::dequantize_from(const Tile& tile, int valid) {
  const LatentLayout& layout = batch.latents;
  for (int t = 0; t < valid; ++t) {
    Raw* out = dequantized + t * dequantized_stride;
    for (int part = 0; part < num_parts; ++part) {
      for (int64_t column = parts[part].begin; column < parts[part].end;) {
        const int64_t group = column >> layout.group_shift;
        const int64_t next_group = (group + 1) << layout.group_shift;
        const int64_t end = next_group < parts[part].end ? next_group : parts[part].end;
        const float stored = bits_to_float(uint32_t{tile.scales[t][group]} << 16);
        const Vec scale = splat(kCodec == Codec::kFp8 ? stored * 256 : stored);
        const Vec offset = splat(stored * center(kCodec));
        for (; column < end; column += kLanes) {
          const Vec units = load_codes<kCodec>(tile.codes[t], column, layout.rank);
          Format::store_latent(
              out + column, kCodec == Codec::kFp8 ? mul(units, scale) : fma(units, scale, offset));
        }
      }
    }
  }
}

template <class Format>
void Attention<Format>::dequantize(const Tile& tile, int valid) {
  switch (batch.latents.codec) {
    case Codec::kInt8: return dequantize_from<Codec::kInt8>(tile, valid);
    case Codec::kFp8: return dequantize_from<Codec::kFp8>(tile, valid);
    case Codec::kInt4: return dequantize_from<Codec::kInt4>(tile, valid);
    case Codec::kInt3: return dequantize_from<Codec::kInt3>(tile, valid);
    case Codec::kNone: return;
  }
}

RECALKV_INLINE void prefetch_bytes(const uint8_t* p, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i += 64) __builtin_prefetch(p + i, 0, 2);
}

// Starts fetching codes and scales of a token of the next tile.
template <class Format>
RECALKV_INLINE void Attention<Format>::prefetch_codes(int token) const {
  const LatentLayout& layout = batch.latents;
  const uint8_t* codes = next->codes[token];
  for (int part = 0; part < num_parts; ++part) {
    const int64_t begin = parts[part].begin, end = parts[part].end;
    if (layout.codec == Codec::kInt3) {
      prefetch_bytes(codes, begin / 4, end / 4);
      prefetch_bytes(codes + layout.rank / 4, begin / 8, end / 8);
    } else {
      const int per_byte = layout.codec == Codec::kInt4 ? 2 : 1;
      prefetch_bytes(codes, begin / per_byte, end / per_byte);
    }
  }
  prefetch_bytes(reinterpret_cast<const uint8_t*>(next->scales[token]), 0, 2 * layout.groups);
}

}  // namespace recalkv::RECALKV_ISA
