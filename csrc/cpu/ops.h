// The ops as torch sees them. Shapes, dtypes and strides are validated in Python
// (recalkv_vllm/ops/validation.py); what only values tell is checked here.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>
#include <tuple>

namespace recalkv {

void latent_cache_update(const at::Tensor& z, at::Tensor& kv_cache, const at::Tensor& slot_mapping,
                         std::string_view latent_dtype, int64_t group_size);

at::Tensor latent_value_up(const at::Tensor& o_lat, const at::Tensor& v_up,
                           const std::optional<at::Tensor>& v_bias, at::ScalarType out_dtype,
                           std::string_view isa);

std::tuple<at::Tensor, at::Tensor> paged_latent_attention(
    const at::Tensor& q, const at::Tensor& kv_cache, const at::Tensor& block_table,
    const at::Tensor& seq_lens, const at::Tensor& query_start_loc, const at::Tensor& k_factors,
    const std::optional<at::Tensor>& k_bias, const std::optional<at::Tensor>& k_norm_weight,
    const std::optional<at::Tensor>& rope, const std::optional<at::Tensor>& basis,
    const std::optional<at::Tensor>& coefficients, const std::optional<at::Tensor>& pair_factors,
    at::IntArrayRef k_starts, at::IntArrayRef v_starts, int64_t v_width, int64_t max_position,
    bool is_neox, double scale, double k_norm_eps, double soft_cap, int64_t window,
    std::string_view isa, std::string_view latent_dtype, int64_t group_size, int64_t rank);

}  // namespace recalkv
