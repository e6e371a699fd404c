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
                           const std::optional<at::Tensor>& bands)
    : group_shift_(shift_of(group_size)) {
  TORCH_CHECK_VALUE(bands.has_value() == (dtype == "bands"), "bands: expected ",
                    bands ? "none" : "some", " with latent_dtype ", dtype);
  if (bands) {
    set_bands(*bands);
  } else if (!dtype.empty()) {
    bands_ = {{codec_of(dtype), 0}};
  }
}

void LatentFormat::set_bands(const at::Tensor& bands) {
  TORCH_CHECK_VALUE(bands.is_cpu() && bands.scalar_type() == at::kLong && bands.dim() == 2 &&
                        bands.size(0) > 0 && bands.size(1) == 2 && bands.is_contiguous(),
                    "bands: expected contiguous Long on the CPU, of shape [bands, 2], found ",
                    bands.scalar_type(), " on ", bands.device(), ", of shape ", bands.sizes());
  constexpr int kColumns = 1 << kBandShift;
  TORCH_CHECK_VALUE(group_shift_ == kBandShift, "group_size: expected ", kColumns, " with bands");
  scale_type_ = ScaleType::kHalfByte;
  code_alignment_ = kBandCodeAlignment;
  bands_.reserve(bands.size(0));
  for (const int64_t* band = bands.const_data_ptr<int64_t>();
       static_cast<int64_t>(bands_.size()) < bands.size(0); band += 2) {
    TORCH_CHECK_VALUE(band[0] > 0 && band[0] % kColumns == 0, "bands: expected multiples of ",
                      kColumns, " columns, found ", band[0]);
    bands_.push_back({codec_of_bits(band[1]), static_cast<int>(band[0])});
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
