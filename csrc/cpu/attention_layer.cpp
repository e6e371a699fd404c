#include "attention_layer.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <initializer_list>
#include <limits>

#include "dtypes.h"
#include "isa.h"

namespace recalkv {
namespace {

void check(const at::Tensor& tensor, const char* name, at::ScalarType dtype,
           std::initializer_list<int64_t> shape) {
  TORCH_CHECK_VALUE(tensor.is_cpu() && tensor.scalar_type() == dtype && tensor.is_contiguous() &&
                        tensor.sizes() == at::IntArrayRef(shape),
                    name, ": expected contiguous ", dtype, " on the CPU, of shape ",
                    at::IntArrayRef(shape), ", found ", tensor.scalar_type(), " on ",
                    tensor.device(), ", of shape ", tensor.sizes(), " and strides ",
                    tensor.strides());
}

void check_dims(const at::Tensor& tensor, const char* name, int64_t dims) {
  TORCH_CHECK_VALUE(tensor.dim() == dims, name, ": expected ", dims, " dimensions, found shape ",
                    tensor.sizes());
}

int64_t elements_per_unit(const Kernels& kernels) { return kernels.factors == kBFloat16 ? 2 : 1; }

const float* data_or_null(const std::optional<at::Tensor>& tensor) {
  return tensor ? tensor->const_data_ptr<float>() : nullptr;
}

}  // namespace

AttentionLayer::AttentionLayer(const std::string& isa, c10::intrusive_ptr<Keys> keys,
                               c10::intrusive_ptr<Spans> spans, c10::intrusive_ptr<Values> values,
                               std::optional<c10::intrusive_ptr<Rotation>> rotation,
                               std::vector<c10::intrusive_ptr<PairExpansion>> expansions,
                               c10::intrusive_ptr<Logits> logits, const std::string& latent_dtype,
                               int64_t group_size, const std::optional<at::Tensor>& bands)
    : keys_(std::move(keys)),
      spans_(std::move(spans)),
      values_(std::move(values)),
      rotation_(std::move(rotation)),
      expansions_(std::move(expansions)),
      logits_(std::move(logits)),
      kernels_(checked_isa(isa)),
      latent_format_(latent_dtype, group_size, bands) {
  set_keys(*keys_);
  set_spans(*spans_);
  set_values(*values_);
  layer_.max_position = std::numeric_limits<int32_t>::max();
  if (rotation_) set_rotation(**rotation_);
  TORCH_CHECK_VALUE(expansions_.size() <= kExpansions, "expansions: expected at most ", kExpansions,
                    ", found ", expansions_.size());
  for (const auto& expansion : expansions_) add_expansion(*expansion);
  set_logits(*logits_);
}

const ElementKernels& AttentionLayer::kernels(at::ScalarType dtype) const {
  const ElementKernels& found = kernels_.of[element_type_of(dtype, "q")];
  TORCH_CHECK_VALUE(found.attend, "q: the layer's instruction set has no kernels for ", dtype);
  return found;
}

void AttentionLayer::set_keys(const Keys& keys) {
  check_dims(keys.factors, "factors", 3);
  const int64_t heads = keys.factors.size(0), head_dim = keys.factors.size(1),
                width = keys.factors.size(2);
  TORCH_CHECK_VALUE(heads > 0 && head_dim > 0 && head_dim % 16 == 0 && width > 0 && width % 16 == 0,
                    "factors: expected KV heads, and head size and width in multiples of 16, found "
                    "shape ",
                    keys.factors.sizes());
  check(keys.factors, "factors", dtype_of(kernels_.factors), {heads, head_dim, width});
  if (keys.bias) check(*keys.bias, "bias", at::kFloat, {heads, head_dim});
  TORCH_CHECK_VALUE(keys.scales == 0 || keys.scales == 1 || keys.scales == heads,
                    "scales: expected 0, 1 or ", heads, " (KV heads), found ", keys.scales);
  layer_.num_kv_heads = static_cast<int>(heads);
  layer_.head_dim = static_cast<int>(head_dim);
  layer_.k_width = static_cast<int>(width);
  layer_.k_factors = static_cast<const Unit*>(keys.factors.const_data_ptr());
  layer_.k_bias = data_or_null(keys.bias);
  layer_.key_scales = static_cast<int>(keys.scales);
  if (!keys.pair_factors) return;
  const int64_t per_unit = elements_per_unit(kernels_);
  check(*keys.pair_factors, "pair_factors", dtype_of(kernels_.factors),
        {heads, head_dim / per_unit, width, per_unit});
  layer_.pair_factors = static_cast<const Unit*>(keys.pair_factors->const_data_ptr());
}

void AttentionLayer::set_spans(const Spans& spans) {
  const auto divides = [&](size_t groups) {
    return groups > 0 && layer_.num_kv_heads % groups == 0;
  };
  TORCH_CHECK_VALUE(divides(spans.k_starts.size()) && divides(spans.v_starts.size()),
                    "k_starts, v_starts: expected group counts that divide ", layer_.num_kv_heads,
                    " KV heads, found ", spans.k_starts.size(), " and ", spans.v_starts.size());
  TORCH_CHECK_VALUE(spans.v_width > 0 && spans.v_width % 16 == 0,
                    "v_width: expected a multiple of 16, found ", spans.v_width);
  layer_.k_groups = static_cast<int>(spans.k_starts.size());
  layer_.group_heads = layer_.num_kv_heads / layer_.k_groups;
  layer_.v_groups = static_cast<int>(spans.v_starts.size());
  layer_.v_width = static_cast<int>(spans.v_width);
  for (const int64_t start : spans.k_starts)
    layer_.rank = std::max<int64_t>(layer_.rank, start + layer_.k_width);
  for (const int64_t start : spans.v_starts)
    layer_.rank = std::max<int64_t>(layer_.rank, start + layer_.v_width);
  layer_.k_starts = spans.k_starts.data();
  layer_.v_starts = spans.v_starts.data();
}

void AttentionLayer::set_values(const Values& values) {
  const int64_t heads = layer_.num_kv_heads, head_dim = layer_.head_dim, width = layer_.v_width;
  check(values.factors, "v_up", values.factors.scalar_type(), {heads, head_dim, width});
  if (values.bias) check(*values.bias, "v_bias", at::kFloat, {heads, head_dim});
  layer_.v_up = values.factors.const_data_ptr();
  layer_.v_bias = data_or_null(values.bias);
  if (!values.panel) return;
  const int64_t per_unit = elements_per_unit(kernels_);
  check(*values.panel, "panel", dtype_of(kernels_.factors),
        {heads, width / per_unit, head_dim, per_unit});
  layer_.v_panel = static_cast<const Unit*>(values.panel->const_data_ptr());
}

void AttentionLayer::set_rotation(const Rotation& rotation) {
  check_dims(rotation.tiles, "tiles", 4);
  const int64_t tiles = rotation.tiles.size(0), pairs = rotation.tiles.size(2);
  check(rotation.tiles, "tiles", at::kFloat, {tiles, 2, pairs, kTile});
  TORCH_CHECK_VALUE(2 * pairs <= layer_.head_dim, "tiles: expected at most ", layer_.head_dim / 2,
                    " pairs, found ", pairs);
  TORCH_CHECK_VALUE(rotation.max_position <= tiles * kTile, "max_position: expected at most ",
                    tiles * kTile, " (the positions of tiles), found ", rotation.max_position);
  layer_.rope = rotation.tiles.const_data_ptr<float>();
  layer_.rot_pairs = static_cast<int>(pairs);
  layer_.is_neox = rotation.is_neox;
  layer_.max_position = rotation.max_position;
}

void AttentionLayer::add_expansion(const PairExpansion& expansion) {
  const auto padded = [](int64_t pairs) { return (pairs + 15) / 16 * 16; };
  const auto chunks = [&](int64_t length) { return (layer_.max_position + length - 1) / length; };
  TORCH_CHECK_VALUE(layer_.pair_factors && layer_.rope,
                    "expansions: expected pair_factors and a rotation beside them, found none");
  const int64_t tile = expansion.tile_pairs, stretch = expansion.stretch_pairs;
  TORCH_CHECK_VALUE(tile >= 0 && stretch >= 0 && 2 * (tile + stretch) <= layer_.head_dim,
                    "expansions: expected up to ", layer_.head_dim / 2, " pairs, found ", tile,
                    " and ", stretch);
  check_dims(expansion.basis, "basis", 2);
  const int64_t terms = expansion.basis.size(0);
  TORCH_CHECK_VALUE(terms > 0 && terms % kTerms == 0, "basis: expected a multiple of ", kTerms,
                    " functions, found ", terms);
  check(expansion.basis, "basis", at::kFloat, {terms, kTile});
  check(expansion.tile_coefficients, "tile_coefficients", at::kFloat,
        {chunks(kTile), terms, 2, padded(tile)});
  check(expansion.stretch_coefficients, "stretch_coefficients", at::kFloat,
        {chunks(kStretch), kTerms, 2, padded(stretch)});
  check(expansion.stretch_basis, "stretch_basis", at::kFloat, {kStretch / kTile, kTerms, terms});
  Expansion& added = layer_.expansions[layer_.num_expansions++];
  added.tile_pairs = static_cast<int>(tile);
  added.stretch_pairs = static_cast<int>(stretch);
  added.exact_pairs = layer_.head_dim / 2 - added.tile_pairs - added.stretch_pairs;
  added.terms = static_cast<int>(terms);
  added.basis = expansion.basis.const_data_ptr<float>();
  added.tile_coefficients = expansion.tile_coefficients.const_data_ptr<float>();
  added.stretch_coefficients = expansion.stretch_coefficients.const_data_ptr<float>();
  added.stretch_basis = expansion.stretch_basis.const_data_ptr<float>();
}

void AttentionLayer::set_logits(const Logits& logits) {
  layer_.scale = static_cast<float>(logits.scale);
  layer_.soft_cap = static_cast<float>(logits.soft_cap);
  layer_.window = logits.window;
  if (!logits.sinks) return;
  check_dims(*logits.sinks, "sinks", 1);
  const int64_t heads = logits.sinks->size(0);
  check(*logits.sinks, "sinks", at::kFloat, {heads});
  TORCH_CHECK_VALUE(heads > 0 && heads % layer_.num_kv_heads == 0, "sinks: expected a multiple of ",
                    layer_.num_kv_heads, " KV heads, found ", heads);
  layer_.sinks = logits.sinks->const_data_ptr<float>();
}

}  // namespace recalkv
