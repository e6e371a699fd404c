// Codes of quantized latents as vectors of floats: kLanes columns of a token, from one that is a
// multiple of kLanes on. Integers come as they are stored, without the half step and the offset.
#pragma once

#include "simd.h"

namespace recalkv::RECALKV_ISA {

template <class T>
RECALKV_INLINE T load_as(const uint8_t* p) {
  T x;
  __builtin_memcpy(&x, p, sizeof(T));
  return x;
}

// kLanes bytes, in the low bytes of x.
RECALKV_INLINE Vec from_bytes(__m128i x) {
#if RECALKV_AVX512
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(x));
#else
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(x));
#endif
}

RECALKV_INLINE Vec load_int8(const uint8_t* codes, int64_t column) {
#if RECALKV_AVX512
  return from_bytes(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + column)));
#else
  return from_bytes(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + column)));
#endif
}

// e4m3 in the bits of a half has 8 less in the exponent's bias, so this is 2^-8 of the value. A NaN
// becomes a finite value: quantizing writes one only beside a scale that is NaN itself.
RECALKV_INLINE Vec load_fp8(const uint8_t* codes, int64_t column) {
#if RECALKV_AVX512
  const __m256i x =
      _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + column)));
  const __m256i sign = _mm256_slli_epi16(_mm256_and_si256(x, _mm256_set1_epi16(0x80)), 8);
  const __m256i size = _mm256_slli_epi16(_mm256_and_si256(x, _mm256_set1_epi16(0x7f)), 7);
  return _mm512_cvtph_ps(_mm256_or_si256(sign, size));
#else
  const __m128i x =
      _mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + column)));
  const __m128i sign = _mm_slli_epi16(_mm_and_si128(x, _mm_set1_epi16(0x80)), 8);
  const __m128i size = _mm_slli_epi16(_mm_and_si128(x, _mm_set1_epi16(0x7f)), 7);
  return _mm256_cvtph_ps(_mm_or_si128(sign, size));
#endif
}

RECALKV_INLINE Vec load_int4(const uint8_t* codes, int64_t column) {
  const uint8_t* p = codes + column / 2;
#if RECALKV_AVX512
  const __m128i packed = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
#else
  const __m128i packed = _mm_cvtsi32_si128(load_as<int32_t>(p));
#endif
  // A byte in 16 bits: its low half stays, its high half goes to the upper byte.
  const __m128i x = _mm_cvtepu8_epi16(packed);
  return from_bytes(_mm_and_si128(_mm_or_si128(x, _mm_slli_epi16(x, 4)), _mm_set1_epi16(0x0f0f)));
}

RECALKV_INLINE Vec load_int3(const uint8_t* codes, int64_t column, int rank) {
  const uint8_t* low = codes + column / 4;
  const uint8_t* high = codes + rank / 4 + column / 8;
#if RECALKV_AVX512
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i two =
      _mm512_srlv_epi32(_mm512_set1_epi32(load_as<int32_t>(low)), _mm512_slli_epi32(lane, 1));
  const __m512i one = _mm512_srlv_epi32(_mm512_set1_epi32(load_as<uint16_t>(high) << 2), lane);
  return _mm512_cvtepi32_ps(_mm512_or_si512(_mm512_and_si512(two, _mm512_set1_epi32(3)),
                                            _mm512_and_si512(one, _mm512_set1_epi32(4))));
#else
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i two =
      _mm256_srlv_epi32(_mm256_set1_epi32(load_as<uint16_t>(low)), _mm256_slli_epi32(lane, 1));
  const __m256i one = _mm256_srlv_epi32(_mm256_set1_epi32(*high << 2), lane);
  return _mm256_cvtepi32_ps(_mm256_or_si256(_mm256_and_si256(two, _mm256_set1_epi32(3)),
                                            _mm256_and_si256(one, _mm256_set1_epi32(4))));
#endif
}

}  // namespace recalkv::RECALKV_ISA
