// The ops as torch sees them. Shapes, dtypes and strides of a call are validated in Python
// (recalkv_vllm/ops/validation.py); what only values tell is checked here.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>
#include <tuple>

#include "attention_layer.h"

namespace recalkv {

void latent_cache_update(const at::Tensor& z, at::Tensor& kv_cache, const at::Tensor& slot_mapping,
                         std::string_view latent_dtype, int64_t group_size,
                         const std::optional<at::Tensor>& bands);

at::Tensor latent_value_up(const at::Tensor& o_lat, const at::Tensor& v_up,
                           const std::optional<at::Tensor>& v_bias, at::ScalarType out_dtype,
                           std::string_view isa);

// All KV heads of `job`, whose `head` is not used, on torch's own threads.
void run_value_up(const ElementKernels& kernels, ElementType to, const ValueUp& job);

// latent_value_up of what paged_latent_attention gives, into `heads`, of the queries' type and
// shape; rows of no sequence are zero.
void paged_latent_attention_heads(const c10::intrusive_ptr<AttentionLayer>& attention_layer,
                                  const at::Tensor& q, const at::Tensor& kv_cache,
                                  const at::Tensor& block_table, const at::Tensor& seq_lens,
                                  const at::Tensor& query_start_loc, at::Tensor& heads);

std::tuple<at::Tensor, at::Tensor> paged_latent_attention(
    const c10::intrusive_ptr<AttentionLayer>& attention_layer, const at::Tensor& q,
    const at::Tensor& kv_cache, const at::Tensor& block_table, const at::Tensor& seq_lens,
    const at::Tensor& query_start_loc);

}  // namespace recalkv
