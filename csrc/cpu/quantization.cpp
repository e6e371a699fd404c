#include "quantization.h"

#include <c10/util/BFloat16.h>
#include <c10/util/Float8_e4m3fn.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

namespace recalkv {
namespace {

constexpr float kLargestFp8 = 448;
constexpr float kSmallestScale = std::numeric_limits<float>::min();  // that of bfloat16 too

int32_t bits_of(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

// The largest magnitude; NaN if any element is. As integers, magnitudes have the same order, and
// NaN is above all.
float largest_of(const float* z, int count) {
  int32_t largest = 0;
  for (int i = 0; i < count; ++i) {
    const int32_t bits = bits_of(z[i]) & 0x7fffffff;
    largest = bits > largest ? bits : largest;
  }
  float size;
  std::memcpy(&size, &largest, sizeof size);
  return size;
}

// encode_scales of band_format.py for one scale.
uint8_t half_byte(float scale) {
  constexpr int kDroppedBits = 20, kRebias = (127 - 15) << 3, kLargest = 0xf7;
  if (std::isnan(scale)) return 0xff;
  if (std::isinf(scale)) return 0xf8;
  if (scale < 0x1p-14f) return static_cast<uint8_t>(std::ceil(scale * 0x1p17f));
  const int rounded = ((bits_of(scale) + (1 << kDroppedBits) - 1) >> kDroppedBits) - kRebias;
  return static_cast<uint8_t>(std::min(rounded, kLargest));
}

// Writes scale `group`, rounded as its type is; returns what it then is.
float store_scale(ScaleType type, float scale, uint8_t* scales, int group) {
  if (type == ScaleType::kHalfByte) {
    scales[group] = half_byte(scale);
    return c10::Half(static_cast<uint16_t>(scales[group] << 7), c10::Half::from_bits());
  }
  c10::BFloat16 rounded(scale);
  if (rounded < kSmallestScale) rounded = 0;
  std::memcpy(scales + group * sizeof rounded.x, &rounded.x, sizeof rounded.x);
  return rounded;
}

void fp8_codes(const float* z, int count, float inverse, uint8_t* codes) {
  for (int i = 0; i < count; ++i) {
    const float scaled = z[i] * inverse;
    const float clamped = scaled > kLargestFp8 ? kLargestFp8 : scaled;
    codes[i] = c10::Float8_e4m3fn(clamped < -kLargestFp8 ? -kLargestFp8 : clamped).x;
  }
}

// floor(z · inverse) + half, within a code's range.
void int_codes(const float* z, int count, float inverse, int half, uint8_t* codes) {
  const float low = static_cast<float>(-half), high = static_cast<float>(half - 1);
  for (int i = 0; i < count; ++i) {
    float scaled = z[i] * inverse;
    scaled = scaled > low ? scaled : low;  // NaN too
    scaled = scaled < high ? scaled : high;
    const int toward_zero = static_cast<int>(scaled);
    const int floor = toward_zero - (scaled < static_cast<float>(toward_zero) ? 1 : 0);
    codes[i] = static_cast<uint8_t>(floor + half);
  }
}

// Fields of `kWidth` bits at the bottom of eight bytes, moved together.
template <int kWidth>
uint64_t gathered(uint64_t fields) {
  if constexpr (kWidth == 1) return fields * 0x0102040810204080 >> 56;
  if constexpr (kWidth == 2) {
    fields = (fields | fields >> 6) & 0x000f000f000f000f;
    fields = (fields | fields >> 12) & 0x000000ff000000ff;
    return fields | fields >> 24;
  }
  fields = (fields | fields >> 4) & 0x00ff00ff00ff00ff;
  fields = (fields | fields >> 8) & 0x0000ffff0000ffff;
  return fields | fields >> 16;
}

// `kWidth` bits from bit `from` on of each unit, earlier units in lower bits; `count` is a
// multiple of 8.
template <int kWidth>
void pack_plane(const uint8_t* units, int count, int from, uint8_t* out) {
  constexpr uint64_t kFields = 0x0101010101010101 * ((1 << kWidth) - 1);
  for (int i = 0; i < count; i += 8) {
    uint64_t eight;
    std::memcpy(&eight, units + i, sizeof eight);
    const uint64_t packed = gathered<kWidth>(eight >> from & kFields);
    std::memcpy(out + i / 8 * kWidth, &packed, kWidth);
  }
}

void pack(const uint8_t* units, int count, int from, int width, uint8_t* out) {
  switch (width) {
    case 1: return pack_plane<1>(units, count, from, out);
    case 2: return pack_plane<2>(units, count, from, out);
    case 4: return pack_plane<4>(units, count, from, out);
    case 8: std::copy(units, units + count, out);
  }
}

}  // namespace

// With wider vectors where the processor has them. Nothing here multiplies and adds, so that
// nothing is fused, and rounds otherwise, in one of them alone.
__attribute__((target_clones("avx2", "default"), flatten)) void quantize(
    const LatentLayout& layout, const float* z, uint8_t* units, uint8_t* codes, uint8_t* scales) {
  const int group_size = 1 << layout.group_shift;
  int used = 0;
  for (int i = 0; i < layout.num_bands; ++i) {
    const Band& band = layout.bands[i];
    const Planes planes = planes_of(band.codec);
    const bool fp8 = band.codec == Codec::kFp8;
    const int half = 1 << (planes.bits() - 1);
    const float steps = fp8 ? kLargestFp8 : static_cast<float>(half);
    for (int first = band.begin; first < band.end; first += group_size) {
      const int count = std::min(group_size, band.end - first);
      const float scale = store_scale(layout.scale_type, largest_of(z + first, count) / steps,
                                      scales, first >> layout.group_shift);
      const float inverse = scale == 0 ? 0 : 1 / scale;
      if (fp8) {
        fp8_codes(z + first, count, inverse, units + first);
      } else {
        int_codes(z + first, count, inverse, half, units + first);
      }
    }
    const int columns = band.end - band.begin;
    pack(units + band.begin, columns, 0, planes.low, codes + band.low);
    pack(units + band.begin, columns, planes.low, planes.high, codes + band.high);
    used = band.high + columns * planes.high / 8;
  }
  std::fill(codes + used, codes + layout.code_bytes, uint8_t{0});
}

}  // namespace recalkv
