// Query rows in, result rows out.
#pragma once

#include <limits>

#include "tile.h"

namespace recalkv::RECALKV_ISA {

template <class Format>
void Attention<Format>::load_queries() {
  const Raw* q = static_cast<const Raw*>(batch.q);
  const int pairs = layer.is_neox ? layer.rot_pairs : 0;
  for (int head = 0; head < num_heads; ++head) {
    for (int row = 0; row < rows; ++row) {
      const int query = row / batch.queries_per_kv;
      const int64_t query_head =
          (first_head + head) * batch.queries_per_kv + row % batch.queries_per_kv;
      const Raw* raw =
          q + (task.first_token + query) * batch.q_stride + query_head * layer.head_dim;
      Unit* out = queries + (int64_t{head} * rows + row) * depth;
      if constexpr (Format::kRawIsUnits) {
        const int whole = pairs / kLanes * kLanes;
        Format::interleave(raw, raw + pairs, out, whole);
        reorder(raw, reinterpret_cast<uint16_t*>(out), whole, pairs);
      } else {
        Format::widen(raw, widened, layer.head_dim);
        reorder(widened, out, 0, pairs);
      }
    }
  }
}

template <class Format>
template <class T>
void Attention<Format>::reorder(const T* in, T* out, int first, int pairs) const {
  for (int i = first; i < pairs; ++i) {
    out[2 * i] = in[i];
    out[2 * i + 1] = in[i + pairs];
  }
  for (int i = 2 * pairs; i < layer.head_dim; ++i) out[i] = in[i];
}

template <class Format>
void Attention<Format>::start() {
  load_queries();
  plan_parts();
  if (quantized()) plan_segments();
  const int widest = layer.k_width > layer.v_width ? layer.k_width : layer.v_width;
  for (int i = 0; i < widest; ++i) zeros[i] = 0;
  for (int head = 0; head < num_heads; ++head) {
    for (int row = 0; row < rows; ++row) {
      // Finite: a row that sees nothing yet still subtracts it from logits.
      running_max[int64_t{head} * rows + row] = -std::numeric_limits<float>::max();
      running_sum[int64_t{head} * rows + row] = 0.0f;
      float* out = row_sums(head, row);
      for (int i = 0; i < width; i += kLanes) store(out + i, splat(0.0f));
    }
  }
}

template <class Format>
void Attention<Format>::finish() {
  for (int head = 0; head < num_heads; ++head) {
    for (int row = 0; row < rows; ++row) {
      const float m = running_max[int64_t{head} * rows + row] / kLog2E;
      const float l = running_sum[int64_t{head} * rows + row];
      const int64_t index = out_row(head, row);
      if (task.weight) {
        task.lse[index] = m;
        task.weight[index] = l;
        continue;
      }
      float* out = row_sums(head, row);
      const Vec inverse = splat(l == 0.0f ? 0.0f : 1.0f / l);
      if (dense) {
        const float* bias =
            layer.v_bias ? layer.v_bias + int64_t{first_head + head} * layer.head_dim : nullptr;
        Raw* result = static_cast<Raw*>(task.heads) + index * layer.head_dim;
        for (int i = 0; i < width; i += kLanes)
          Format::store_latent(result + i,
                               fma(load(out + i), inverse, bias ? load(bias + i) : splat(0.0f)));
        continue;
      }
      for (int i = 0; i < width; i += kLanes) store(out + i, mul(load(out + i), inverse));
      task.lse[index] = m + __builtin_logf(l);
    }
  }
}

}  // namespace recalkv::RECALKV_ISA
