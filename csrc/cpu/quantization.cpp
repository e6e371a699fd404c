#include "quantization.h"

#include <c10/util/BFloat16.h>
#include <c10/util/Exception.h>
#include <c10/util/Float8_e4m3fn.h>

#include <algorithm>
#include <cstring>
#include <limits>

namespace recalkv {
namespace {

constexpr float kLargestFp8 = 448;
constexpr float kSmallestScale = std::numeric_limits<float>::min();  // that of bfloat16 too
// The shift of a single scale for all columns.
constexpr int kOneGroup = 30;
constexpr int kScaleBytes = 2;

int bits(Codec codec) {
  switch (codec) {
    case Codec::kInt3: return 3;
    case Codec::kInt4: return 4;
    default: return 8;
  }
}

Codec codec_of(std::string_view dtype) {
  if (dtype.empty()) return Codec::kNone;
  if (dtype == "int8") return Codec::kInt8;
  if (dtype == "fp8") return Codec::kFp8;
  if (dtype == "int4") return Codec::kInt4;
  if (dtype == "int3") return Codec::kInt3;
  TORCH_CHECK_VALUE(false, "latent_dtype: expected int8, fp8, int4, int3 or none, found ", dtype);
}

// The largest magnitude; NaN if any element is. As integers, magnitudes have the same order, and
// NaN is above all.
float largest_of(const float* z, int count) {
  int32_t largest = 0;
  for (int i = 0; i < count; ++i) {
    int32_t bits;
    std::memcpy(&bits, z + i, sizeof bits);
    bits &= 0x7fffffff;
    largest = bits > largest ? bits : largest;
  }
  float size;
  std::memcpy(&size, &largest, sizeof size);
  return size;
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

// `width` bits from bit `from` on of each unit, earlier units in lower bits.
void pack(const uint8_t* units, int count, int from, int width, uint8_t* out) {
  const int per_byte = 8 / width, mask = (1 << width) - 1;
  for (int i = 0; i < count / per_byte; ++i) {
    int byte = 0;
    for (int j = 0; j < per_byte; ++j)
      byte |= (units[i * per_byte + j] >> from & mask) << (j * width);
    out[i] = static_cast<uint8_t>(byte);
  }
}

}  // namespace

LatentFormat latent_format_of(std::string_view dtype, int64_t group_size) {
  LatentFormat format{codec_of(dtype), kOneGroup};
  if (group_size)
    for (format.group_shift = 0; int64_t{1} << format.group_shift < group_size;)
      ++format.group_shift;
  return format;
}

LatentLayout layout_of_rank(const LatentFormat& format, int64_t rank) {
  LatentLayout layout{};
  layout.codec = format.codec;
  layout.rank = static_cast<int>(rank);
  layout.code_bytes = layout.rank * bits(format.codec) / 8;
  layout.group_shift = format.group_shift;
  layout.groups = ((layout.rank - 1) >> format.group_shift) + 1;
  return layout;
}

LatentLayout layout_of_slots(const LatentFormat& format, int64_t slot_size) {
  if (format.codec == Codec::kNone) return layout_of_rank(format, slot_size);
  const int64_t whole_group = (int64_t{bits(format.codec)} << format.group_shift) / 8 + kScaleBytes;
  const int64_t groups = (slot_size + whole_group - 1) / whole_group;
  return layout_of_rank(format, (slot_size - groups * kScaleBytes) * 8 / bits(format.codec));
}

void quantize(const LatentLayout& layout, const float* z, uint8_t* units, uint8_t* codes,
              uint16_t* scales) {
  const bool fp8 = layout.codec == Codec::kFp8;
  const int half = 1 << (bits(layout.codec) - 1);
  const int group_size = 1 << layout.group_shift;
  for (int group = 0; group < layout.groups; ++group) {
    const int first = group << layout.group_shift;
    const int count = std::min(group_size, layout.rank - first);
    const float steps = fp8 ? kLargestFp8 : static_cast<float>(half);
    c10::BFloat16 rounded(largest_of(z + first, count) / steps);
    if (rounded < kSmallestScale) rounded = 0;
    scales[group] = rounded.x;
    const float scale = rounded, inverse = scale == 0 ? 0 : 1 / scale;
    if (fp8) {
      fp8_codes(z + first, count, inverse, units + first);
    } else {
      int_codes(z + first, count, inverse, half, units + first);
    }
  }
  switch (layout.codec) {
    case Codec::kInt4: return pack(units, layout.rank, 0, 4, codes);
    case Codec::kInt3:
      pack(units, layout.rank, 0, 2, codes);
      return pack(units, layout.rank, 2, 1, codes + layout.rank / 4);
    default: std::copy(units, units + layout.rank, codes);
  }
}

}  // namespace recalkv
