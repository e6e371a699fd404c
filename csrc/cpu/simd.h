// The few vector operations that the tile kernels need, for the instruction set that the including
// file selected: RECALKV_ISA (the namespace), RECALKV_AVX512, RECALKV_BF16_DOT, #pragma GCC target.
// Own macros, because GCC 12 does not define __AVX512F__ and the like for that pragma in C++.
#pragma once

#include <immintrin.h>

#include "attention.h"

namespace recalkv::RECALKV_ISA {

#define RECALKV_INLINE inline __attribute__((always_inline))

#if RECALKV_AVX512

constexpr int kLanes = 16;
using Vec = __m512;

RECALKV_INLINE Vec load(const float* p) { return _mm512_loadu_ps(p); }
RECALKV_INLINE void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
RECALKV_INLINE Vec splat(float x) { return _mm512_set1_ps(x); }
RECALKV_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
RECALKV_INLINE Vec fnma(Vec a, Vec b, Vec c) { return _mm512_fnmadd_ps(a, b, c); }
RECALKV_INLINE Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
RECALKV_INLINE Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
RECALKV_INLINE Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
RECALKV_INLINE Vec div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
RECALKV_INLINE Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
RECALKV_INLINE Vec sqrt(Vec a) { return _mm512_sqrt_ps(a); }
RECALKV_INLINE float sum(Vec a) { return _mm512_reduce_add_ps(a); }
RECALKV_INLINE float maximum(Vec a) { return _mm512_reduce_max_ps(a); }
RECALKV_INLINE Vec round(Vec a) {
  return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
RECALKV_INLINE Vec scale_by_power(Vec a, Vec n) { return _mm512_scalef_ps(a, n); }
// Lanes [begin, end) of a, the others from b.
RECALKV_INLINE Vec select_range(int begin, int end, Vec a, Vec b) {
  const uint32_t below_end = end >= kLanes ? 0xffffu : (end <= 0 ? 0u : (1u << end) - 1);
  const uint32_t below_begin = begin >= kLanes ? 0xffffu : (begin <= 0 ? 0u : (1u << begin) - 1);
  return _mm512_mask_blend_ps(__mmask16(below_end & ~below_begin), b, a);
}
RECALKV_INLINE Vec from_bf16(const uint16_t* p) {
  const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
}
RECALKV_INLINE Vec from_fp16(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
RECALKV_INLINE void to_fp16(uint16_t* p, Vec v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
// Rounds to nearest even; NaN stays NaN.
RECALKV_INLINE void to_bf16(uint16_t* p, Vec v) {
#if RECALKV_BF16_DOT
  const __m256i narrow = (__m256i)_mm512_cvtneps_pbh(v);
#else
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  const __m512i kept = _mm512_mask_blend_epi32(nan, rounded, _mm512_set1_epi32(0x7fc00000));
  const __m256i narrow = _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16));
#endif
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow);
}
RECALKV_INLINE Vec copy_sign(Vec size, Vec sign) {
  const __m512i mask = _mm512_set1_epi32(0x7fffffff);
  return _mm512_castsi512_ps(
      _mm512_ternarylogic_epi32(mask, _mm512_castps_si512(size), _mm512_castps_si512(sign), 0xca));
}
RECALKV_INLINE Vec load_units(const Unit* p) { return _mm512_loadu_ps(p); }
RECALKV_INLINE void store_units(Unit* p, Vec v) { _mm512_storeu_ps(p, v); }
RECALKV_INLINE Vec splat_unit(const Unit* p) {
  return _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(*p)));
}

// out[i][j] = rows[j][i] for kLanes rows of `count` units, 8 or 16.
RECALKV_INLINE void transpose(const Unit* const* rows, Unit* out, int64_t stride, int count) {
  __m512i a[16], b[16];
  const __mmask16 valid = count == 16 ? 0xffff : 0x00ff;
  for (int i = 0; i < 16; ++i) a[i] = _mm512_maskz_loadu_epi32(valid, rows[i]);
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
    a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
    a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    const __m512i x = _mm512_shuffle_i32x4(a[i], a[i + 4], 0x88);
    const __m512i y = _mm512_shuffle_i32x4(a[i], a[i + 4], 0xdd);
    const __m512i z = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0x88);
    const __m512i w = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0xdd);
    _mm512_storeu_si512(out + (i + 0) * stride, _mm512_shuffle_i32x4(x, z, 0x88));
    _mm512_storeu_si512(out + (i + 4) * stride, _mm512_shuffle_i32x4(y, w, 0x88));
    if (count < 16) continue;
    _mm512_storeu_si512(out + (i + 8) * stride, _mm512_shuffle_i32x4(x, z, 0xdd));
    _mm512_storeu_si512(out + (i + 12) * stride, _mm512_shuffle_i32x4(y, w, 0xdd));
  }
}

#else  // AVX2, FMA, F16C

constexpr int kLanes = 8;
using Vec = __m256;
using IVec = __m256i;

RECALKV_INLINE Vec load(const float* p) { return _mm256_loadu_ps(p); }
RECALKV_INLINE void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
RECALKV_INLINE Vec splat(float x) { return _mm256_set1_ps(x); }
RECALKV_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
RECALKV_INLINE Vec fnma(Vec a, Vec b, Vec c) { return _mm256_fnmadd_ps(a, b, c); }
RECALKV_INLINE Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
RECALKV_INLINE Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
RECALKV_INLINE Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
RECALKV_INLINE Vec div(Vec a, Vec b) { return _mm256_div_ps(a, b); }
RECALKV_INLINE Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
RECALKV_INLINE Vec sqrt(Vec a) { return _mm256_sqrt_ps(a); }
RECALKV_INLINE float sum(Vec a) {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
RECALKV_INLINE float maximum(Vec a) {
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}
RECALKV_INLINE Vec round(Vec a) {
  return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
RECALKV_INLINE Vec scale_by_power(Vec a, Vec n) {
  const IVec biased = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return mul(a, _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23)));
}
RECALKV_INLINE Vec select_range(int begin, int end, Vec a, Vec b) {
  const IVec lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const IVec from = _mm256_cmpgt_epi32(lane, _mm256_set1_epi32(begin - 1));
  const IVec until = _mm256_cmpgt_epi32(_mm256_set1_epi32(end), lane);
  return _mm256_blendv_ps(b, a, _mm256_castsi256_ps(_mm256_and_si256(from, until)));
}
RECALKV_INLINE Vec from_bf16(const uint16_t* p) {
  const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
}
RECALKV_INLINE Vec from_fp16(const uint16_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
RECALKV_INLINE void to_fp16(uint16_t* p, Vec v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
// Rounds to nearest even; NaN stays NaN.
RECALKV_INLINE void to_bf16(uint16_t* p, Vec v) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const Vec nan = _mm256_cmp_ps(v, v, _CMP_UNORD_Q);
  const __m256i kept =
      _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), _mm256_castps_si256(nan));
  const __m256i high = _mm256_srli_epi32(kept, 16);
  _mm_storeu_si128(
      reinterpret_cast<__m128i*>(p),
      _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1)));
}
RECALKV_INLINE Vec copy_sign(Vec size, Vec sign) {
  const Vec mask = splat(-0.0f);
  return _mm256_or_ps(_mm256_andnot_ps(mask, size), _mm256_and_ps(mask, sign));
}
RECALKV_INLINE Vec load_units(const Unit* p) {
  return _mm256_loadu_ps(reinterpret_cast<const float*>(p));
}
RECALKV_INLINE void store_units(Unit* p, Vec v) {
  _mm256_storeu_ps(reinterpret_cast<float*>(p), v);
}
RECALKV_INLINE Vec splat_unit(const Unit* p) {
  return _mm256_broadcast_ss(reinterpret_cast<const float*>(p));
}

// out[i][j] = rows[j][i] for kLanes rows of 8 units.
RECALKV_INLINE void transpose(const Unit* const* rows, Unit* out, int64_t stride, int) {
  __m256 a[8], b[8];
  for (int i = 0; i < 8; ++i) a[i] = load_units(rows[i]);
  for (int i = 0; i < 8; i += 2) {
    b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    a[i] = _mm256_shuffle_ps(b[i], b[i + 2], 0x44);
    a[i + 1] = _mm256_shuffle_ps(b[i], b[i + 2], 0xee);
    a[i + 2] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0x44);
    a[i + 3] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    store_units(out + i * stride, _mm256_permute2f128_ps(a[i], a[i + 4], 0x20));
    store_units(out + (i + 4) * stride, _mm256_permute2f128_ps(a[i], a[i + 4], 0x31));
  }
}

#endif

// exp(x) for x <= 0 within 2 ulp (Cephes' expf: argument reduction by ln 2, degree-5 polynomial).
RECALKV_INLINE Vec exp(Vec x) {
  x = max(splat(-87.0f), x);  // this order keeps NaN
  const Vec n = round(mul(x, splat(1.44269504f)));
  Vec r = fnma(n, splat(0.693359375f), x);
  r = fnma(n, splat(-2.12194440e-4f), r);
  Vec p = splat(1.9875691500e-4f);
  p = fma(p, r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  p = add(fma(p, mul(r, r), r), splat(1.0f));
  return scale_by_power(p, n);
}

}  // namespace recalkv::RECALKV_ISA
