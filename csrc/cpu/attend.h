// Logits, online softmax and accumulation of value latents.
#pragma once

#include "tile.h"

namespace recalkv::RECALKV_ISA {

// Weights of rows [begin, begin + count) of a head from their scores of the tile's first `columns`
// tokens, and what new maxima do to sums so far. All maxima come first, so that no row's
// exponentials wait for its own.
template <class Format>
void Attention<Format>::softmax(int head, int begin, int count, int columns, int64_t first) {
  float* const maxima = running_max + int64_t{head} * rows + begin;
  float* const totals = running_sum + int64_t{head} * rows + begin;
  const float unit = scores_are_logits() ? 1.0f : layer.scale * kLog2E;
  const bool all_seen =
      visible(begin, first).end >= columns && visible(begin + count - 1, first).begin == 0;
  for (int row = 0; row < count; row += 4) {
    Vec tops[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      tops[i] = splat(0.0f);
      if (row + i >= count) continue;
      float* of_row = scores + (row + i) * kTile;
      if (!all_seen) hide(of_row, visible(begin + row + i, first), columns);
      tops[i] = load(of_row);
      for (int j = kLanes; j < columns; j += kLanes) tops[i] = max(tops[i], load(of_row + j));
    }
    reduce_rows(tops, new_max + row,
                [](Vec a, Vec b) __attribute__((always_inline)) { return max(a, b); });
  }
  for (int row = 0; row < count; row += kLanes) {
    const Vec before = load(maxima + row);
    const Vec now = max(before, mul(load(new_max + row), splat(unit)));
    store(new_max + row, now);
    store(rescale + row, exp2(sub(before, now)));
  }
  for (int row = 0; row < count; row += 4) {
    Vec sums[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      sums[i] = splat(0.0f);
      if (row + i >= count) continue;
      const Vec most = splat(-new_max[row + i]);
      for (int j = 0; j < columns; j += kLanes) {
        const Vec weight = exp2(fma(load(scores + (row + i) * kTile + j), splat(unit), most));
        sums[i] = add(sums[i], weight);
        Format::store_row(weights + (row + i) * kTokenUnits, j, weight);
      }
    }
    float of_row[4];
    reduce_rows(sums, of_row,
                [](Vec a, Vec b) __attribute__((always_inline)) { return add(a, b); });
    for (int i = 0; i < 4 && row + i < count; ++i) {
      maxima[row + i] = new_max[row + i];
      totals[row + i] = totals[row + i] * rescale[row + i] + of_row[i];
    }
  }
}

// Removes scores of tokens that a row does not see.
template <class Format>
RECALKV_INLINE void Attention<Format>::hide(float* of_row, Range seen, int columns) const {
  const int from = static_cast<int>(seen.begin), until = static_cast<int>(seen.end);
  if (from == 0 && until >= columns) return;
  for (int j = 0; j < columns; j += kLanes)
    store(of_row + j,
          select_range(from - j, until - j, load(of_row + j), splat(-__builtin_inff())));
}

// Tokens of the tile at `first` that a row sees.
template <class Format>
RECALKV_INLINE typename Attention<Format>::Range Attention<Format>::visible(int row,
                                                                            int64_t first) const {
  const int64_t position = task.first_position + row / batch.queries_per_kv;
  const int64_t oldest = layer.window ? position - layer.window + 1 : 0;
  return {clamp(oldest - first, kTile), clamp(position - first + 1, tile_tokens(first))};
}

// Whether scores are stored as logits of powers of two; else softmax() scales them.
template <class Format>
RECALKV_INLINE bool Attention<Format>::scores_are_logits() const {
  return layer.soft_cap > 0 || layer.key_scales;
}

// Scores of a vector of tokens as logits of powers of two.
template <class Format>
RECALKV_INLINE Vec Attention<Format>::logits(Vec score, int token) const {
  const bool capped = layer.soft_cap > 0;
  score = mul(score, splat(capped ? layer.scale : layer.scale * kLog2E));
  if (layer.key_scales) score = mul(score, load(key_scale + token));
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

// A block of a head's rows, from `begin` on, attends to the tile at `first`.
template <class Format>
void Attention<Format>::attend(int head, int begin, int64_t first) {
  const int count = rows - begin < kRowBlock ? rows - begin : kRowBlock;
  const int valid = tile_tokens(first);
  const int64_t oldest = task.first_position + begin / batch.queries_per_kv;
  const int64_t newest = task.first_position + (begin + count - 1) / batch.queries_per_kv;
  if (newest < first) return;
  if (layer.window && oldest - layer.window + 1 >= first + valid) return;
  // What no row sees is left out, but for the rest of a vector.
  const int seen = clamp(newest - first + 1, valid);
  const int columns = round_up(seen);

  products.template run<Format>(
      count, columns, {queries + (int64_t{head} * rows + begin) * depth, depth}, {keys, kTile},
      exact_rows / Format::kPerUnit,
      [&]<int kR, int kV>(Vec(&acc)[kR][kV], int row, int column) __attribute__((always_inline)) {
    const float* from = scores + row * kTile + column;
    if (!expansion) return from_zero(acc, row, column);
    for_sums(acc, [&](Vec& sum, int i, int j) __attribute__((always_inline)) {
      sum = load(from + i * kTile + j * kLanes);
    });
  }, [&]<int kR, int kV>(Vec(&acc)[kR][kV], int row, int column) __attribute__((always_inline)) {
    float* to = scores + row * kTile + column;
    if (scores_are_logits()) {
      for_sums(acc, [&](Vec& sum, int, int j)
                        __attribute__((always_inline)) { sum = logits(sum, column + j * kLanes); });
    }
    for_sums(acc, [&](Vec& sum, int i, int j)
                      __attribute__((always_inline)) { store(to + i * kTile + j * kLanes, sum); });
  });
  softmax(head, begin, count, columns, first);
  float* const totals = sums + (int64_t{head} * rows + begin) * width;
  const int64_t stride = width;
  products.template run<Format>(
      count, width, {weights, kTokenUnits}, {values, width},
      (seen + Format::kPerUnit - 1) / Format::kPerUnit,
      [&]<int kR, int kV>(Vec(&acc)[kR][kV], int row, int column) __attribute__((always_inline)) {
    const float* from = totals + row * stride + column;
    const float* factors = rescale + row;
    for_sums(acc, [&](Vec& sum, int i, int j) __attribute__((always_inline)) {
      sum = mul(load(from + i * stride + j * kLanes), splat(factors[i]));
    });
  }, [&]<int kR, int kV>(Vec(&acc)[kR][kV], int row, int column) __attribute__((always_inline)) {
    float* to = totals + row * stride + column;
    for_sums(acc, [&](Vec& sum, int i, int j)
                      __attribute__((always_inline)) { store(to + i * stride + j * kLanes, sum); });
  });
}

}  // namespace recalkv::RECALKV_ISA
