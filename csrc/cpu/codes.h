// Codes of quantized latents as vectors: kLanes columns of a token, from one on that is a multiple
// of 16 away from the first one in `plane`. Integers come as they are stored, without the half step
// and the offset.
#pragma once

#include "latent_format.h"
#include "simd.h"

namespace recalkv::RECALKV_ISA {

template <class T>
RECALKV_INLINE T load_as(const uint8_t* p) {
  T x;
  __builtin_memcpy(&x, p, sizeof(T));
  return x;
}

// An integer code u of b bits stands for (u + 0.5 - 2^(b-1)) · scale.
constexpr float center(Codec codec) {
  return 0.5f - static_cast<float>(1 << (planes_of(codec).bits() - 1));
}

RECALKV_INLINE Vec to_floats(IVec x) {
#if RECALKV_AVX512
  return _mm512_cvtepi32_ps(x);
#else
  return _mm256_cvtepi32_ps(x);
#endif
}

RECALKV_INLINE IVec either(IVec a, IVec b) {
#if RECALKV_AVX512
  return _mm512_or_si512(a, b);
#else
  return _mm256_or_si256(a, b);
#endif
}

RECALKV_INLINE IVec load_bytes(const uint8_t* plane, int64_t column) {
#if RECALKV_AVX512
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(plane + column)));
#else
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(plane + column)));
#endif
}

// Fields of 4 bits.
RECALKV_INLINE IVec load_nibbles(const uint8_t* plane, int64_t column) {
  const uint8_t* p = plane + column / 2;
  const __m128i low = _mm_set1_epi16(0x0f0f);
  // A byte in 16 bits: its low half stays, its high half goes to the upper byte.
#if RECALKV_AVX512
  const __m128i x = _mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  return _mm512_cvtepu8_epi32(_mm_and_si128(_mm_or_si128(x, _mm_slli_epi16(x, 4)), low));
#else
  const __m128i x = _mm_cvtepu8_epi16(_mm_cvtsi32_si128(load_as<int32_t>(p)));
  return _mm256_cvtepu8_epi32(_mm_and_si128(_mm_or_si128(x, _mm_slli_epi16(x, 4)), low));
#endif
}

// Fields of 1 or 2 bits, shifted left by kShift.
template <int kBits, int kShift>
RECALKV_INLINE IVec load_fields(const uint8_t* plane, int64_t column) {
  const uint8_t* p = plane + column * kBits / 8;
  constexpr int kMask = ((1 << kBits) - 1) << kShift;
#if RECALKV_AVX512
  const IVec lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const IVec counts =
      _mm512_sub_epi32(_mm512_slli_epi32(lane, kBits - 1), _mm512_set1_epi32(kShift));
  const int fields = kBits == 2 ? load_as<int32_t>(p) : load_as<uint16_t>(p);
  return _mm512_and_si512(_mm512_rorv_epi32(_mm512_set1_epi32(fields), counts),
                          _mm512_set1_epi32(kMask));
#else
  const IVec lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const int fields = (kBits == 2 ? load_as<uint16_t>(p) : *p) << kShift;
  return _mm256_and_si256(
      _mm256_srlv_epi32(_mm256_set1_epi32(fields), _mm256_slli_epi32(lane, kBits - 1)),
      _mm256_set1_epi32(kMask));
#endif
}

// e4m3 in the bits of a half has 8 less in the exponent's bias, so this is 2^-8 of the value. A NaN
// becomes a finite value: quantizing writes one only beside a scale that is NaN itself.
RECALKV_INLINE Vec load_fp8(const uint8_t* plane, int64_t column) {
#if RECALKV_AVX512
  const __m256i x =
      _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(plane + column)));
  const __m256i sign = _mm256_slli_epi16(_mm256_and_si256(x, _mm256_set1_epi16(0x80)), 8);
  const __m256i size = _mm256_slli_epi16(_mm256_and_si256(x, _mm256_set1_epi16(0x7f)), 7);
  return _mm512_cvtph_ps(_mm256_or_si256(sign, size));
#else
  const __m128i x =
      _mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(plane + column)));
  const __m128i sign = _mm_slli_epi16(_mm_and_si128(x, _mm_set1_epi16(0x80)), 8);
  const __m128i size = _mm_slli_epi16(_mm_and_si128(x, _mm_set1_epi16(0x7f)), 7);
  return _mm256_cvtph_ps(_mm_or_si128(sign, size));
#endif
}

// `low` and `high` are a token's planes of the codes.
template <Codec kCodec>
RECALKV_INLINE Vec load_codes(const uint8_t* low, const uint8_t* high, int64_t column) {
  switch (kCodec) {
    case Codec::kInt8: return to_floats(load_bytes(low, column));
    case Codec::kFp8: return load_fp8(low, column);
    case Codec::kInt6:
      return to_floats(either(load_nibbles(low, column), load_fields<2, 4>(high, column)));
    case Codec::kInt4: return to_floats(load_nibbles(low, column));
    case Codec::kInt3:
      return to_floats(either(load_fields<2, 0>(low, column), load_fields<1, 2>(high, column)));
    case Codec::kInt2: return to_floats(load_fields<2, 0>(low, column));
  }
}

#if RECALKV_BF16_DOT

// Fields of 1 or 2 bits of 32 columns, as bytes, shifted left by kShift. `column` is a multiple
// of 32.
template <int kBits, int kShift>
RECALKV_INLINE __m256i load_32_fields(const uint8_t* plane, int64_t column) {
  const uint8_t* p = plane + column * kBits / 8;
  // Of every byte, the bit that its field starts at; positions are modulo 64.
  alignas(32) static constexpr auto kStarts = [] {
    struct {
      uint8_t of[32];
    } starts{};
    for (int i = 0; i < 32; ++i) starts.of[i] = static_cast<uint8_t>((i * kBits - kShift) & 63);
    return starts;
  }();
  const __m256i fields =
      kBits == 2 ? _mm256_set1_epi64x(load_as<int64_t>(p)) : _mm256_set1_epi32(load_as<int32_t>(p));
  const __m256i starts = _mm256_load_si256(reinterpret_cast<const __m256i*>(kStarts.of));
  constexpr char kMask = static_cast<char>(((1 << kBits) - 1) << kShift);
  return _mm256_and_si256(_mm256_multishift_epi64_epi8(starts, fields), _mm256_set1_epi8(kMask));
}

RECALKV_INLINE __m256i load_32_nibbles(const uint8_t* plane, int64_t column) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(plane + column / 2));
  const __m256i x = _mm256_cvtepu8_epi16(bytes);
  return _mm256_and_si256(_mm256_or_si256(x, _mm256_slli_epi16(x, 4)), _mm256_set1_epi8(0x0f));
}

// load_codes of integers for 32 columns, as bytes.
template <Codec kCodec>
RECALKV_INLINE __m256i load_32_codes(const uint8_t* low, const uint8_t* high, int64_t column) {
  switch (kCodec) {
    case Codec::kInt6:
      return _mm256_or_si256(load_32_nibbles(low, column), load_32_fields<2, 4>(high, column));
    case Codec::kInt4: return load_32_nibbles(low, column);
    case Codec::kInt3:
      return _mm256_or_si256(load_32_fields<2, 0>(low, column), load_32_fields<1, 2>(high, column));
    case Codec::kInt2: return load_32_fields<2, 0>(low, column);
    default: return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(low + column));
  }
}

// Latents of 32 columns of one scale, in bf16. Up to 4 bits, every value that a code can stand for
// is looked up.
template <Codec kCodec>
RECALKV_INLINE void store_32_latents(const uint8_t* low, const uint8_t* high, int64_t column,
                                     float step, uint16_t* out) {
  const __m256i codes = load_32_codes<kCodec>(low, high, column);
  const Vec scale = splat(step);
  if constexpr (planes_of(kCodec).bits() <= 4) {
    const Vec code = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const Vec values = mul(add(code, splat(center(kCodec))), scale);
    const __m512i table = _mm512_castsi256_si512((__m256i)_mm512_cvtneps_pbh(values));
    _mm512_storeu_si512(out, _mm512_permutexvar_epi16(_mm512_cvtepu8_epi16(codes), table));
    return;
  }
  const Vec offset = splat(step * center(kCodec));
  const Vec first = to_floats(_mm512_cvtepu8_epi32(_mm256_castsi256_si128(codes)));
  const Vec second = to_floats(_mm512_cvtepu8_epi32(_mm256_extracti128_si256(codes, 1)));
  _mm512_storeu_si512(
      out, (__m512i)_mm512_cvtne2ps_pbh(fma(second, scale, offset), fma(first, scale, offset)));
}

#endif

}  // namespace recalkv::RECALKV_ISA
