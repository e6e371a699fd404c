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
  plan_prefetch();
  const int widest = layer.k_width > layer.v_width ? layer.k_width : layer.v_width;
  for (int i = 0; i < widest; ++i) zeros[i] = 0;
  for (int head = 0; head < num_heads; ++head) {
    for (int row = 0; row < rows; ++row) {
      // Finite: a row that sees nothing yet still subtracts it from logits.
      running_max[int64_t{head} * rows + row] = -std::numeric_limits<float>::max();
      running_sum[int64_t{head} * rows + row] = 0.0f;
    }
  }
  const int64_t all = int64_t{num_heads} * rows * width;
  for (int64_t i = 0; i < all; i += kLanes) store(sums + i, splat(0.0f));
}

// What a row's sum `sum * exp(maximum)` is of the same with its sink.
template <class Format>
RECALKV_INLINE float Attention<Format>::share_beside_sink(int head, int row, float maximum,
                                                          float sum) const {
  const float sink = layer.sinks[out_row(head, row) % batch.num_heads];
  return sum == 0.0f ? 0.0f : sum / (sum + __builtin_expf(sink - maximum));
}

template <class Format>
void Attention<Format>::finish() {
  for (int head = 0; head < num_heads; ++head) {
    const float* bias = dense && layer.v_bias
                            ? layer.v_bias + int64_t{first_head + head} * layer.head_dim
                            : nullptr;
    for (int row = 0; row < rows; ++row) {
      const int64_t own = int64_t{head} * rows + row;
      const float m = running_max[own] / kLog2E, l = running_sum[own];
      const float* from = sums + own * width;
      const int64_t index = out_row(head, row);
      // Splits are merged, and divided by the sum, later; sinks are for heads alone.
      const float share = dense && layer.sinks ? share_beside_sink(head, row, m, l) : 1.0f;
      const Vec factor = splat(task.weight ? 1.0f : (l == 0.0f ? 0.0f : share / l));
      if (dense) {
        Raw* to = static_cast<Raw*>(task.heads) + index * layer.head_dim;
        for (int i = 0; i < width; i += kLanes)
          Format::store_latent(to + i, fma(load(from + i), factor,
                                           bias ? mul(load(bias + i), splat(share)) : splat(0.0f)));
        continue;
      }
      float* to = task.out + index * width;
      for (int i = 0; i < width; i += kLanes) store(to + i, mul(load(from + i), factor));
      task.lse[index] = task.weight ? m : m + __builtin_logf(l);
      if (task.weight) task.weight[index] = l;
    }
  }
}

}  // namespace recalkv::RECALKV_ISA
