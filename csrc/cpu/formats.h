// Compute formats: how a tile's elements become dot-product units, and what one step of a dot
// product is. Everything else in the tile kernels is written once for all of them.
#pragma once

#include "simd.h"

namespace recalkv::RECALKV_ISA {

RECALKV_INLINE float bits_to_float(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, 4);
  return x;
}

RECALKV_INLINE uint32_t float_to_bits(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  return bits;
}

struct Float32Source {
  using Raw = float;
  static RECALKV_INLINE Vec load(const Raw* p) { return RECALKV_ISA::load(p); }
  static RECALKV_INLINE void store(Raw* p, Vec v) { RECALKV_ISA::store(p, v); }
};

struct Float16Source {
  using Raw = uint16_t;
  static RECALKV_INLINE Vec load(const Raw* p) { return from_fp16(p); }
  static RECALKV_INLINE void store(Raw* p, Vec v) { to_fp16(p, v); }
};

struct BFloat16Source {
  using Raw = uint16_t;
  static RECALKV_INLINE Vec load(const Raw* p) { return from_bf16(p); }
  static RECALKV_INLINE void store(Raw* p, Vec v) { to_bf16(p, v); }
};

// One float per unit, fused multiply-add; the source is widened when a tile is gathered.
template <class Source>
struct Float32Dot {
  using Raw = typename Source::Raw;
  static constexpr int kPerUnit = 1;
  static constexpr bool kRawIsUnits = false;

  static RECALKV_INLINE Vec step(Vec acc, Vec a, Vec b) { return fma(a, b, acc); }
  static RECALKV_INLINE void store_pair(Unit* out, int64_t stride, Vec a, Vec b) {
    store_units(out, a);
    store_units(out + stride, b);
  }
  static RECALKV_INLINE void store_row(Unit* out, int index, Vec v) { store_units(out + index, v); }
  // The two members of up to kLanes neighboring pairs; lanes from `count` on are zero.
  static RECALKV_INLINE void load_pairs(const Unit* in, int count, Vec& first, Vec& second) {
    float lanes[2][kLanes] = {};
    for (int i = 0; i < kLanes && i < count; ++i) {
      lanes[0][i] = bits_to_float(in[2 * i]);
      lanes[1][i] = bits_to_float(in[2 * i + 1]);
    }
    first = RECALKV_ISA::load(lanes[0]);
    second = RECALKV_ISA::load(lanes[1]);
  }
  static RECALKV_INLINE void store_pairs(Unit* out, Vec first, Vec second) {
    float lanes[2][kLanes];
    RECALKV_ISA::store(lanes[0], first);
    RECALKV_ISA::store(lanes[1], second);
    for (int i = 0; i < kLanes; ++i) {
      out[2 * i] = float_to_bits(lanes[0][i]);
      out[2 * i + 1] = float_to_bits(lanes[1][i]);
    }
  }
  // `width` elements of a row as units, a multiple of 16.
  static RECALKV_INLINE void widen(const Raw* row, Unit* out, int width) {
    for (int i = 0; i < width; i += kLanes) store_units(out + i, Source::load(row + i));
  }
  // `width` floats of a row as units.
  static RECALKV_INLINE void narrow(const float* row, Unit* out, int width) {
    for (int i = 0; i < width; i += kLanes) store_units(out + i, RECALKV_ISA::load(row + i));
  }
  // A vector of elements as the cache would hold them.
  static RECALKV_INLINE void store_latent(Raw* out, Vec v) { Source::store(out, v); }
  // Units along tokens: rows of the tile as they are.
  static RECALKV_INLINE void interleave(const Raw* even, const Raw* odd, Unit* out, int width) {
    widen(even, out, width);
    widen(odd, out + width, width);
  }
};

#if RECALKV_BF16_DOT

// Two bf16 per unit, vdpbf16ps.
struct BFloat16Dot {
  using Raw = uint16_t;
  static constexpr int kPerUnit = 2;
  static constexpr bool kRawIsUnits = true;

  static RECALKV_INLINE Vec step(Vec acc, Vec a, Vec b) {
    return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b);
  }
  static RECALKV_INLINE void store_pair(Unit* out, int64_t, Vec a, Vec b) {
    const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(a));
    const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(b));
    _mm512_storeu_si512(out, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }
  static RECALKV_INLINE void load_pairs(const Unit* in, int count, Vec& low, Vec& high) {
    const __mmask16 valid = count >= 16 ? 0xffff : (1u << count) - 1;
    const __m512i units = _mm512_maskz_loadu_epi32(valid, in);
    low = _mm512_castsi512_ps(_mm512_slli_epi32(units, 16));
    high = _mm512_castsi512_ps(_mm512_and_si512(units, _mm512_set1_epi32(0xffff0000)));
  }
  static RECALKV_INLINE void store_pairs(Unit* out, Vec low, Vec high) {
    store_pair(out, 0, low, high);
  }
  static RECALKV_INLINE void store_row(Unit* out, int index, Vec v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(reinterpret_cast<uint16_t*>(out) + index),
                        (__m256i)_mm512_cvtneps_pbh(v));
  }
  static RECALKV_INLINE void widen(const Raw* row, Unit* out, int width) {
    __builtin_memcpy(out, row, width * sizeof(Raw));
  }
  static RECALKV_INLINE void narrow(const float* row, Unit* out, int width) {
    for (int i = 0; i < width; i += kLanes) store_row(out, i, RECALKV_ISA::load(row + i));
  }
  static RECALKV_INLINE void store_latent(Raw* out, Vec v) { to_bf16(out, v); }
  static RECALKV_INLINE void interleave(const Raw* even, const Raw* odd, Unit* out, int width) {
    for (int i = 0; i < width; i += 16) {
      const __m512i low =
          _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(even + i)));
      const __m512i high =
          _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(odd + i)));
      _mm512_storeu_si512(out + i, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
  }
};

#endif

}  // namespace recalkv::RECALKV_ISA
