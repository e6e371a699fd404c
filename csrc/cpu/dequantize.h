// A tile of quantized latents as rows of elements, which all else then reads like an unquantized
// cache: once per task and tile, and only the columns that the task's heads read.
#pragma once

#include "codes.h"
#include "tile.h"

namespace recalkv::RECALKV_ISA {

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
      const int shift = batch.latents.group_shift;
      const Range read{begin >> shift, ((end - 1) >> shift) + 1};
      if (num_segments == 1 || read.begin < groups.begin) groups.begin = read.begin;
      if (num_segments == 1 || read.end > groups.end) groups.end = read.end;
      add_read(low, low + columns * planes.low / 8);
      if (planes.high) add_read(high, high + columns * planes.high / 8);
    }
  }
}

template <ScaleType kType>
RECALKV_INLINE float load_scale(const uint8_t* scales, int64_t group) {
  if (kType == ScaleType::kHalfByte) return _cvtsh_ss(static_cast<uint16_t>(scales[group] << 7));
  return bits_to_float(uint32_t{load_as<uint16_t>(scales + 2 * group)} << 16);
}

#if RECALKV_BF16_DOT
// Those of `count` groups, up to a vector; no byte beyond is read.
template <ScaleType kType>
RECALKV_INLINE Vec load_scales(const uint8_t* scales, int64_t group, int count) {
  const __mmask16 valid = count >= kLanes ? 0xffff : (1u << count) - 1;
  if (kType == ScaleType::kHalfByte) {
    const __m256i halves = _mm256_cvtepu8_epi16(_mm_maskz_loadu_epi8(valid, scales + group));
    return _mm512_cvtph_ps(_mm256_slli_epi16(halves, 7));
  }
  const __m256i narrow = _mm256_maskz_loadu_epi16(valid, scales + 2 * group);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow), 16));
}
#endif

template <class Format>
template <ScaleType kType, Codec kCodec>
void Attention<Format>::dequantize(const Segment& segment, const Tile& tile, int begin, int end) {
  constexpr bool kFp8 = kCodec == Codec::kFp8;
  const int shift = batch.latents.group_shift;
#if RECALKV_BF16_DOT
  if (!kFp8 && (1 << shift) % 32 == 0 && segment.begin % 32 == 0 && segment.end % 32 == 0)
    return dequantize_blocks<kCodec>(segment, tile, begin, end);
#endif
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
      for (; column < until; column += kLanes) {
        const Vec units = load_codes<kCodec>(low, high, column - segment.begin);
        Format::store_latent(out + column, kFp8 ? mul(units, scale) : fma(units, scale, offset));
      }
    }
  }
}

#if RECALKV_BF16_DOT

// Scales of tokens [begin, end), of the groups that the segments have.
template <class Format>
template <ScaleType kType>
RECALKV_INLINE void Attention<Format>::widen_scales(const Tile& tile, int begin, int end) {
  for (int t = begin; t < end; ++t)
    for (int64_t group = groups.begin; group < groups.end; group += kLanes)
      store(scales + (t - begin) * scales_stride + group - groups.begin,
            load_scales<kType>(tile.scales[t], group, clamp(groups.end - group, kLanes)));
}

// A segment that is made of whole blocks of 32 columns, of tokens whose scales are in `scales`.
template <class Format>
template <Codec kCodec>
RECALKV_INLINE void Attention<Format>::dequantize_blocks(const Segment& segment, const Tile& tile,
                                                         int begin, int end) {
  for (int64_t column = segment.begin; column < segment.end; column += 32) {
    const float* scale = scales + (column >> batch.latents.group_shift) - groups.begin;
    for (int t = begin; t < end; ++t, scale += scales_stride)
      store_32_latents<kCodec>(tile.codes[t] + segment.low, tile.codes[t] + segment.high,
                               column - segment.begin, *scale,
                               dequantized + t * dequantized_stride + column);
  }
}

#endif

template <class Format>
template <ScaleType kType>
void Attention<Format>::dequantize(const Tile& tile, int begin, int end) {
#if RECALKV_BF16_DOT
  widen_scales<kType>(tile, begin, end);
#endif
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

}  // namespace recalkv::RECALKV_ISA
