// A tile of quantized latents as rows of elements, which all else then reads like an unquantized
// cache: once per task and tile, and only the columns that the task's heads read.
#pragma once

#include "codes.h"
#include "tile.h"

namespace recalkv::RECALKV_ISA {

// Tokens whose codes are still in the nearest cache when a next segment of them is read.
constexpr int kTokenBlock = 8;

// The parts, cut where bands are.
template <class Format>
void Attention<Format>::plan_segments() {
  for (int i = 0; i < batch.latents.num_bands; ++i) {
    const Band& band = batch.latents.bands[i];
    const Planes planes = planes_of(band.codec);
    for (int part = 0; part < num_parts; ++part) {
      const int64_t begin = parts[part].begin > band.begin ? parts[part].begin : band.begin;
      const int64_t end = parts[part].end < band.end ? parts[part].end : band.end;
      if (begin >= end) continue;
      const int64_t skipped = begin - band.begin, columns = end - begin;
      const int64_t low = band.low + skipped * planes.low / 8;
      const int64_t high = band.high + skipped * planes.high / 8;
      segments[num_segments++] = {band.codec, begin, end, low, high};
      add_codes(low, low + columns * planes.low / 8);
      if (planes.high) add_codes(high, high + columns * planes.high / 8);
    }
  }
}

template <class Format>
void Attention<Format>::add_codes(int64_t begin, int64_t end) {
  if (num_code_ranges && code_ranges[num_code_ranges - 1].end == begin) {
    code_ranges[num_code_ranges - 1].end = end;
  } else {
    code_ranges[num_code_ranges++] = {begin, end};
  }
}

// An integer code u of b bits stands for (u + 0.5 - 2^(b-1)) · scale.
constexpr float center(Codec codec) {
  return 0.5f - static_cast<float>(1 << (planes_of(codec).bits() - 1));
}

template <ScaleType kType>
RECALKV_INLINE float load_scale(const uint8_t* scales, int64_t group) {
  if (kType == ScaleType::kHalfByte) return _cvtsh_ss(static_cast<uint16_t>(scales[group] << 7));
  return bits_to_float(uint32_t{load_as<uint16_t>(scales + 2 * group)} << 16);
}

template <class Format>
template <ScaleType kType, Codec kCodec>
void Attention<Format>::dequantize(const Segment& segment, const Tile& tile, int begin, int end) {
  constexpr bool kFp8 = kCodec == Codec::kFp8;
  const int shift = batch.latents.group_shift;
  for (int t = begin; t < end; ++t) {
    Raw* out = dequantized + t * dequantized_stride;
    const uint8_t* low = tile.codes[t] + segment.low;
    const uint8_t* high = tile.codes[t] + segment.high;
    for (int64_t column = segment.begin; column < segment.end;) {
      const int64_t group = column >> shift;
      const int64_t next_group = (group + 1) << shift;
      const int64_t until = next_group < segment.end ? next_group : segment.end;
      const float stored = load_scale<kType>(tile.scales[t], group);
      const Vec scale = splat(kFp8 ? stored * 256 : stored);
      const Vec offset = splat(stored * center(kCodec));
#if RECALKV_BF16_DOT
      if constexpr (!kFp8) {
        for (; (column - segment.begin) % 32 == 0 && column + 32 <= until; column += 32)
          store_32_latents<kCodec>(low, high, column - segment.begin, scale, offset, out + column);
      }
#endif
      for (; column < until; column += kLanes) {
        const Vec units = load_codes<kCodec>(low, high, column - segment.begin);
        Format::store_latent(out + column, kFp8 ? mul(units, scale) : fma(units, scale, offset));
      }
    }
  }
}

template <class Format>
template <ScaleType kType>
void Attention<Format>::dequantize(const Tile& tile, int begin, int end) {
  for (int i = 0; i < num_segments; ++i) {
    const Segment& s = segments[i];
    switch (s.codec) {
      case Codec::kInt8: dequantize<kType, Codec::kInt8>(s, tile, begin, end); break;
      case Codec::kFp8: dequantize<kType, Codec::kFp8>(s, tile, begin, end); break;
      case Codec::kInt6: dequantize<kType, Codec::kInt6>(s, tile, begin, end); break;
      case Codec::kInt4: dequantize<kType, Codec::kInt4>(s, tile, begin, end); break;
      case Codec::kInt3: dequantize<kType, Codec::kInt3>(s, tile, begin, end); break;
      case Codec::kInt2: dequantize<kType, Codec::kInt2>(s, tile, begin, end); break;
    }
  }
}

template <class Format>
void Attention<Format>::dequantize(const Tile& tile, int valid) {
  const bool half_bytes = batch.latents.scale_type == ScaleType::kHalfByte;
  for (int begin = 0; begin < valid; begin += kTokenBlock) {
    const int end = begin + kTokenBlock < valid ? begin + kTokenBlock : valid;
    if (half_bytes) {
      dequantize<ScaleType::kHalfByte>(tile, begin, end);
    } else {
      dequantize<ScaleType::kBFloat16>(tile, begin, end);
    }
  }
}

RECALKV_INLINE void prefetch_bytes(const uint8_t* p, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i += 64) __builtin_prefetch(p + i, 0, 2);
}

// Starts fetching codes and scales of a token of the next tile.
template <class Format>
RECALKV_INLINE void Attention<Format>::prefetch_codes(int token) const {
  const LatentLayout& layout = batch.latents;
  for (int i = 0; i < num_code_ranges; ++i)
    prefetch_bytes(next->codes[token], code_ranges[i].begin, code_ranges[i].end);
  prefetch_bytes(next->scales[token], 0, layout.groups * scale_bytes(layout.scale_type));
}

}  // namespace recalkv::RECALKV_ISA
