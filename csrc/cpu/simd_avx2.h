// Vectors of 8 floats: AVX2, FMA and F16C.
#pragma once

#include <immintrin.h>

#include "inline.h"
#include "sizes.h"

namespace recalkv::RECALKV_ISA {

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
// out[i] = f over the lanes of rows[i]; one reduction for four rows, whose shuffles they share.
template <class F>
RECALKV_INLINE void reduce_rows(const Vec (&rows)[4], float* out, F f) {
  const Vec first = f(_mm256_unpacklo_ps(rows[0], rows[1]), _mm256_unpackhi_ps(rows[0], rows[1]));
  const Vec second = f(_mm256_unpacklo_ps(rows[2], rows[3]), _mm256_unpackhi_ps(rows[2], rows[3]));
  Vec all = f(_mm256_shuffle_ps(first, second, 0x44), _mm256_shuffle_ps(first, second, 0xee));
  all = f(all, _mm256_permute2f128_ps(all, all, 1));
  _mm_storeu_ps(out, _mm256_castps256_ps128(all));
}
RECALKV_INLINE Vec round(Vec a) {
  return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
// Powers of two from here on are zero.
constexpr float kLeastPower = -127.0f;
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

}  // namespace recalkv::RECALKV_ISA
