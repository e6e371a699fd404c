// Formats of quantized latents, and their layouts.
#include <c10/util/Exception.h>

#include <algorithm>

#include "quantization.h"

namespace recalkv {
namespace {

// The shift of a single scale for all columns.
constexpr int kOneGroup = 30;
// What band_format.py fixes.
constexpr int kBandShift = 5;
constexpr int kBandCodeAlignment = 16;

Codec codec_of(std::string_view dtype) {
  if (dtype == "int8") return Codec::kInt8;
  if (dtype == "fp8") return Codec::kFp8;
  if (dtype == "int4") return Codec::kInt4;
  if (dtype == "int3") return Codec::kInt3;
  TORCH_CHECK_VALUE(false, "latent_dtype: expected int8, fp8, int4, int3, bands or none, found ",
                    dtype);
}

Codec codec_of_bits(int64_t bits) {
  switch (bits) {
    case 2: return Codec::kInt2;
    case 3: return Codec::kInt3;
    case 4: return Codec::kInt4;
    case 6: return Codec::kInt6;
    case 8: return Codec::kInt8;
    default: TORCH_CHECK_VALUE(false, "bands: expected 2, 3, 4, 6 or 8 bits, found ", bits);
  }
}

int shift_of(int64_t group_size) {
  if (group_size == 0) return kOneGroup;
  int shift = 0;
  while (int64_t{1} << shift < group_size) ++shift;
  return shift;
}

}  // namespace

OwnedLayout::OwnedLayout(std::vector<Band> owned, const LatentLayout& of)
    : bands(std::move(owned)), layout(of) {
  layout.bands = bands.data();
  layout.num_bands = static_cast<int>(bands.size());
}

LatentFormat::LatentFormat(std::string_view dtype, int64_t group_size,
                           const std::vector<int64_t>& bands)
    : group_shift_(shift_of(group_size)) {
  if (dtype.empty()) return;
  if (dtype != "bands") {
    TORCH_CHECK_VALUE(bands.empty(), "bands: expected none with ", dtype, ", found ", bands);
    bands_ = {{codec_of(dtype), 0}};
    return;
  }
  TORCH_CHECK_VALUE(!bands.empty() && bands.size() % 2 == 0 && group_shift_ == kBandShift,
                    "bands: expected pairs of columns and bits, and a group_size of ",
                    1 << kBandShift, ", found ", bands, " and ", group_size);
  scale_type_ = ScaleType::kHalfByte;
  code_alignment_ = kBandCodeAlignment;
  for (size_t i = 0; i < bands.size(); i += 2) {
    TORCH_CHECK_VALUE(bands[i] > 0 && bands[i] % (1 << kBandShift) == 0,
                      "bands: expected multiples of ", 1 << kBandShift, " columns, found ",
                      bands[i]);
    bands_.push_back({codec_of_bits(bands[i + 1]), static_cast<int>(bands[i])});
  }
}

int64_t LatentFormat::rank_of_slots(int64_t slot_size) const {
  if (bands_.empty()) return slot_size;
  if (scale_type_ == ScaleType::kHalfByte) {
    int64_t rank = 0;
    for (const Stretch& band : bands_) rank += band.columns;
    return rank;
  }
  const int64_t bits = planes_of(bands_[0].codec).bits(), scale = scale_bytes(scale_type_);
  const int64_t whole_group = (bits << group_shift_) / 8 + scale;
  const int64_t groups = (slot_size + whole_group - 1) / whole_group;
  return (slot_size - groups * scale) * 8 / bits;
}

OwnedLayout LatentFormat::layout_of_slots(int64_t slot_size) const {
  LatentLayout layout{};
  layout.rank = static_cast<int>(rank_of_slots(slot_size));
  layout.scale_type = scale_type_;
  layout.group_shift = group_shift_;
  layout.groups = ((layout.rank - 1) >> group_shift_) + 1;
  std::vector<Band> bands;
  bands.reserve(bands_.size());
  int column = 0, bytes = 0;
  for (const auto& [codec, columns] : bands_) {
    const Planes planes = planes_of(codec);
    const int end = columns ? column + columns : layout.rank;
    const int high = bytes + (end - column) * planes.low / 8;
    bands.push_back({codec, column, end, bytes, high});
    column = end;
    bytes = high + (end - bands.back().begin) * planes.high / 8;
  }
  layout.code_bytes = (bytes + code_alignment_ - 1) / code_alignment_ * code_alignment_;
  return {std::move(bands), layout};
}

}  // namespace recalkv
