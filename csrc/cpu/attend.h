// Logits, online softmax and accumulation of value latents.
#pragma once

#include "tile.h"

namespace recalkv::RECALKV_ISA {

// Weights of rows [begin, begin + count) of a head from their logits, and what new maxima do to
// sums so far. All maxima come first, so that no row's exponentials wait for its own.
template <class Format>
void Attention<Format>::softmax(int head, int begin, int count, int64_t first, int valid) {
  float* const maxima = running_max + int64_t{head} * rows + begin;
  float* const totals = running_sum + int64_t{head} * rows + begin;
  for (int row = 0; row < count; ++row) {
    float* logits = scores + row * kTile;
    const Range seen = visible(begin + row, first, valid);
    if (seen.begin > 0 || seen.end < kTile) {
      const int from = static_cast<int>(seen.begin), until = static_cast<int>(seen.end);
      for (int j = 0; j < kTile; j += kLanes)
        store(logits + j,
              select_range(from - j, until - j, load(logits + j), splat(-__builtin_inff())));
    }
    Vec top = splat(maxima[row]);
    for (int j = 0; j < kTile; j += kLanes) top = max(top, load(logits + j));
    new_max[row] = maximum(top);
  }
  for (int row = 0; row < count; row += kLanes)
    store(rescale + row, exp2(sub(load(maxima + row), load(new_max + row))));
  for (int row = 0; row < count; ++row) {
    const Vec most = splat(new_max[row]);
    Vec total = splat(0.0f);
    for (int j = 0; j < kTile; j += kLanes) {
      const Vec weight = exp2(sub(load(scores + row * kTile + j), most));
      total = add(total, weight);
      Format::store_row(weights + row * kTokenUnits, j, weight);
    }
    maxima[row] = new_max[row];
    totals[row] = totals[row] * rescale[row] + sum(total);
  }
}

// Tokens of the tile at `first` that a row sees.
template <class Format>
RECALKV_INLINE typename Attention<Format>::Range Attention<Format>::visible(int row, int64_t first,
                                                                            int valid) const {
  const int64_t position = task.first_position + row / batch.queries_per_kv;
  const int64_t oldest = layer.window ? position - layer.window + 1 : 0;
  return {clamp(oldest - first, kTile), clamp(position - first + 1, valid)};
}

// Scores of a vector of tokens as logits of powers of two.
template <class Format>
RECALKV_INLINE Vec Attention<Format>::logits(Vec score, int token) const {
  const bool capped = layer.soft_cap > 0;
  score = mul(score, splat(capped ? layer.scale : layer.scale * kLog2E));
  if (layer.k_norm_weight) score = mul(score, load(key_scale + token));
  return capped ? mul(cap(score), splat(kLog2E)) : score;
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
          store(scores + (row + i) * kTile + column + j * kLanes,
                logits(acc[i][j], column + j * kLanes));
    });
    softmax(head, begin, count, first, valid);
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
