// A layer's constants as Python hands them over: checked and packed once, when the layer is bound.
// Calls only read them, from any number of threads.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/custom_class.h>

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "kernels.h"
#include "quantization.h"

namespace recalkv {

// How keys come from latents. Rows of a head are in pair order, see Layer::k_factors.
struct Keys : torch::CustomClassHolder {
  const at::Tensor factors;              // [num_kv_heads, head_dim, k_width]
  const std::optional<at::Tensor> bias;  // [num_kv_heads, head_dim] float32
  const int64_t scales;                  // see Layer::key_scales
  // [num_kv_heads, units of both rows of pairs, k_width, elements of a unit], where there are
  // expansions; in the type of `factors`
  const std::optional<at::Tensor> pair_factors;

  Keys(at::Tensor factors, std::optional<at::Tensor> bias, int64_t scales,
       std::optional<at::Tensor> pair_factors)
      : factors(std::move(factors)),
        bias(std::move(bias)),
        scales(scales),
        pair_factors(std::move(pair_factors)) {}
};

// Where the spans of the K groups and of the V groups start in a latent.
struct Spans : torch::CustomClassHolder {
  const std::vector<int64_t> k_starts;
  const std::vector<int64_t> v_starts;
  const int64_t v_width;

  Spans(std::vector<int64_t> k_starts, std::vector<int64_t> v_starts, int64_t v_width)
      : k_starts(std::move(k_starts)), v_starts(std::move(v_starts)), v_width(v_width) {}
};

// How values come from latents.
struct Values : torch::CustomClassHolder {
  const at::Tensor factors;               // [num_kv_heads, head_dim, v_width]
  const std::optional<at::Tensor> bias;   // [num_kv_heads, head_dim] float32
  const std::optional<at::Tensor> panel;  // see Layer::v_panel; in the type of Keys::factors

  Values(at::Tensor factors, std::optional<at::Tensor> bias, std::optional<at::Tensor> panel)
      : factors(std::move(factors)), bias(std::move(bias)), panel(std::move(panel)) {}
};

struct Rotation : torch::CustomClassHolder {
  const at::Tensor tiles;  // [tiles, 2 (cos, sin), rot_pairs, kTile] float32
  const int64_t max_position;
  const bool is_neox;

  Rotation(at::Tensor tiles, int64_t max_position, bool is_neox)
      : tiles(std::move(tiles)), max_position(max_position), is_neox(is_neox) {}
};

// Low-frequency pairs, see expansion.h.
struct PairExpansion : torch::CustomClassHolder {
  const int64_t tile_pairs, stretch_pairs;
  const at::Tensor basis;                 // [terms, kTile] float32
  const at::Tensor tile_coefficients;     // [tiles, terms, 2 (cos, sin), pairs up to 16s] float32
  const at::Tensor stretch_coefficients;  // [stretches, kTerms, 2, pairs up to 16s] float32
  const at::Tensor stretch_basis;         // [kStretch / kTile, kTerms, terms] float32

  PairExpansion(int64_t tile_pairs, int64_t stretch_pairs, at::Tensor basis,
                at::Tensor tile_coefficients, at::Tensor stretch_coefficients,
                at::Tensor stretch_basis)
      : tile_pairs(tile_pairs),
        stretch_pairs(stretch_pairs),
        basis(std::move(basis)),
        tile_coefficients(std::move(tile_coefficients)),
        stretch_coefficients(std::move(stretch_coefficients)),
        stretch_basis(std::move(stretch_basis)) {}
};

struct Logits : torch::CustomClassHolder {
  const double scale;
  const double soft_cap;  // 0 is none
  const int64_t window;   // newest keys that a query sees, itself included; 0 is all
  const std::optional<at::Tensor> sinks;  // [query heads] float32, see Layer::sinks

  Logits(double scale, double soft_cap, int64_t window, std::optional<at::Tensor> sinks)
      : scale(scale), soft_cap(soft_cap), window(window), sinks(std::move(sinks)) {}
};

class AttentionLayer : public torch::CustomClassHolder {
 public:
  // Throws a ValueError for parts that fit neither each other nor the instruction set.
  AttentionLayer(const std::string& isa, c10::intrusive_ptr<Keys> keys,
                 c10::intrusive_ptr<Spans> spans, c10::intrusive_ptr<Values> values,
                 std::optional<c10::intrusive_ptr<Rotation>> rotation,
                 std::vector<c10::intrusive_ptr<PairExpansion>> expansions,
                 c10::intrusive_ptr<Logits> logits, const std::string& latent_dtype,
                 int64_t group_size, const std::optional<at::Tensor>& bands);

  const Layer& layer() const { return layer_; }
  const LatentFormat& latent_format() const { return latent_format_; }
  int64_t v_width() const { return layer_.v_width; }
  at::ScalarType values_dtype() const { return values_->factors.scalar_type(); }
  // Whether the layer has what queries of so many heads need.
  bool serves(int64_t heads) const { return !logits_->sinks || logits_->sinks->size(0) == heads; }
  // Kernels for a cache and queries of `dtype`; throws a ValueError where there are none.
  const ElementKernels& kernels(at::ScalarType dtype) const;

 private:
  void set_keys(const Keys& keys);
  void set_spans(const Spans& spans);
  void set_values(const Values& values);
  void set_rotation(const Rotation& rotation);
  void add_expansion(const PairExpansion& expansion);
  void set_logits(const Logits& logits);

  // What layer_ points into.
  const c10::intrusive_ptr<Keys> keys_;
  const c10::intrusive_ptr<Spans> spans_;
  const c10::intrusive_ptr<Values> values_;
  const std::optional<c10::intrusive_ptr<Rotation>> rotation_;
  const std::vector<c10::intrusive_ptr<PairExpansion>> expansions_;
  const c10::intrusive_ptr<Logits> logits_;
  const Kernels& kernels_;
  const LatentFormat latent_format_;
  Layer layer_{};
};

}  // namespace recalkv
