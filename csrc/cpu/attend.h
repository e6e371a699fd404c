// Scores, online softmax and accumulation of value latents.
#pragma once

#include "tile.h"

namespace recalkv::RECALKV_ISA {

// Softmax of one row's scores in [low, high), in powers of two; returns the factor on what was
// accumulated before.
template <class Format>
RECALKV_INLINE float Attention<Format>::softmax(float* row_scores, Unit* row_weights, int low,
                                                int high, float& m, float& l) {
  constexpr int kCount = kTile / kLanes;
  const Vec hidden = splat(-__builtin_inff());
  const bool capped = layer.soft_cap > 0;
  const Vec scale = splat(capped ? layer.scale : layer.scale * kLog2E);
  Vec s[kCount];
  Vec top = hidden;
  for (int j = 0; j < kCount; ++j) {
    s[j] = mul(load(row_scores + j * kLanes), scale);
    if (layer.k_norm_weight) s[j] = mul(s[j], load(key_scale + j * kLanes));
    if (capped) s[j] = mul(cap(s[j]), splat(kLog2E));
    if (low > 0 || high < kTile)
      s[j] = select_range(low - j * kLanes, high - j * kLanes, s[j], hidden);
    top = max(top, s[j]);
  }
  if (low >= high) {
    for (int j = 0; j < kCount; ++j) Format::store_row(row_weights, j * kLanes, splat(0.0f));
    return 1.0f;
  }
  const float tile_max = maximum(top);
  const float new_max = tile_max > m ? tile_max : m;
  Vec total = splat(0.0f);
  for (int j = 0; j < kCount; ++j) {
    s[j] = exp2(sub(s[j], splat(new_max)));
    total = add(total, s[j]);
    Format::store_row(row_weights, j * kLanes, s[j]);
  }
  const float factor = m == new_max ? 1.0f : __builtin_exp2f(m - new_max);
  l = l * factor + sum(total);
  m = new_max;
  return factor;
}

// cap · tanh(x / cap), with tanh(y) = sign(y) (1 - 2 e / (1 + e)), e = 2^(-2 |y| / ln 2).
template <class Format>
RECALKV_INLINE Vec Attention<Format>::cap(Vec x) const {
  const Vec y = mul(x, splat(1.0f / layer.soft_cap));
  const Vec size = max(y, sub(splat(0.0f), y));
  const Vec e = exp2(mul(size, splat(-2.0f * kLog2E)));
  const Vec t = div(sub(splat(1.0f), e), add(splat(1.0f), e));
  const Vec capped = mul(t, splat(layer.soft_cap));
  return copy_sign(capped, x);
}

template <class Format>
void Attention<Format>::attend(int head, int64_t first, int valid) {
  const Unit* head_queries = queries + int64_t{head} * rows * depth;
  const int used_units = (valid + Format::kPerUnit - 1) / Format::kPerUnit;
  for (int begin = 0; begin < rows; begin += kRowBlock) {
    const int count = rows - begin < kRowBlock ? rows - begin : kRowBlock;
    const int64_t oldest = task.first_position + begin / batch.queries_per_kv;
    const int64_t newest = task.first_position + (begin + count - 1) / batch.queries_per_kv;
    if (newest < first) continue;
    if (layer.window && oldest - layer.window + 1 >= first + valid) continue;

    products.template run<Format>(
        count, kTile, {head_queries + int64_t{begin} * depth, depth}, {keys, kTile},
        exact_rows / Format::kPerUnit,
        [&]<int kR, int kV>(Vec(&acc)[kR][kV], int row, int column) __attribute__((always_inline)) {
      for (int i = 0; i < kR; ++i)
        for (int j = 0; j < kV; ++j)
          acc[i][j] =
              expanded ? load(scores + (row + i) * kTile + column + j * kLanes) : splat(0.0f);
    }, [&]<int kR, int kV>(Vec(&acc)[kR][kV], int row, int column) __attribute__((always_inline)) {
      for (int i = 0; i < kR; ++i)
        for (int j = 0; j < kV; ++j)
          store(scores + (row + i) * kTile + column + j * kLanes, acc[i][j]);
    });
    for (int row = 0; row < count; ++row) {
      const int64_t position = task.first_position + (begin + row) / batch.queries_per_kv;
      const int64_t low = layer.window ? position - layer.window + 1 - first : 0;
      const int64_t high = position - first + 1;
      const int64_t state = int64_t{head} * rows + begin + row;
      rescale[row] = softmax(scores + row * kTile, weights + row * kTokenUnits, clamp(low, kTile),
                             clamp(high, valid), running_max[state], running_sum[state]);
    }
    products.template run<Format>(
        count, width, {weights, kTokenUnits}, {values, width}, used_units,
        [&]<int kR, int kV>(Vec(&acc)[kR][kV], int row, int column) __attribute__((always_inline)) {
      for (int i = 0; i < kR; ++i) {
        const float* sum = row_sums(head, begin + row + i) + column;
        const Vec factor = splat(rescale[row + i]);
        for (int j = 0; j < kV; ++j) acc[i][j] = mul(load(sum + j * kLanes), factor);
      }
    }, [&]<int kR, int kV>(Vec(&acc)[kR][kV], int row, int column) __attribute__((always_inline)) {
      for (int i = 0; i < kR; ++i) {
        float* sum = row_sums(head, begin + row + i) + column;
        for (int j = 0; j < kV; ++j) store(sum + j * kLanes, acc[i][j]);
      }
    });
  }
}

}  // namespace recalkv::RECALKV_ISA
