// Vectors of 16 floats: AVX-512 (F, BW, VL, DQ).
#pragma once

#include <immintrin.h>

#include "inline.h"
#include "sizes.h"

namespace recalkv::RECALKV_ISA {

constexpr int kLanes = 16;
using Vec = __m512;
using IVec = __m512i;

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
// out[i] = f over the lanes of rows[i]; one reduction for four rows, whose shuffles they share.
template <class F>
RECALKV_INLINE void reduce_rows(const Vec (&rows)[4], float* out, F f) {
  const Vec first = f(_mm512_unpacklo_ps(rows[0], rows[1]), _mm512_unpackhi_ps(rows[0], rows[1]));
  const Vec second = f(_mm512_unpacklo_ps(rows[2], rows[3]), _mm512_unpackhi_ps(rows[2], rows[3]));
  Vec all = f(_mm512_shuffle_ps(first, second, 0x44), _mm512_shuffle_ps(first, second, 0xee));
  all = f(all, _mm512_shuffle_f32x4(all, all, 0x4e));
  all = f(all, _mm512_shuffle_f32x4(all, all, 0xb1));
  _mm_storeu_ps(out, _mm512_castps512_ps128(all));
}
RECALKV_INLINE Vec round(Vec a) {
  return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
// Powers of two from here on are zero.
constexpr float kLeastPower = -200.0f;
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

}  // namespace recalkv::RECALKV_ISA
