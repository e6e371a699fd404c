// Logits, online softmax and accumulation of value latents.
#pragma once

#include "tile.h"

namespace recalkv::RECALKV_ISA {

// Weights of rows [begin, begin + count) of a head from their logits of the tile's first `columns`
// tokens, and what new maxima do to sums so far. All maxima come first, so that no row's
// exponentials wait for its own.
template <class Format>
void Attention<Format>::softmax(int head, int begin, int count, int columns, int64_t first) {
  float* const maxima = running_max + int64_t{head} * rows + begin;
  float* const totals = running_sum + int64_t{head} * rows + begin;
  const bool all_seen =
      visible(begin, first).end >= columns && visible(begin + count - 1, first).begin == 0;
  for (int row = 0; row < count; row += 4) {
    Vec tops[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      tops[i] = splat(0.0f);
      if (row + i >= count) continue;
      float* logits = scores + (row + i) * kTile;
      if (!all_seen) hide(logits, visible(begin + row + i, first), columns);
      tops[i] = splat(maxima[row + i]);
      for (int j = 0; j < columns; j += kLanes) tops[i] = max(tops[i], load(logits + j));
    }
    reduce_rows(tops, new_max + row,
                [](Vec a, Vec b) __attribute__((always_inline)) { return max(a, b); });
  }
  for (int row = 0; row < count; row += kLanes)
    store(rescale + row, exp2(sub(load(maxima + row), load(new_max + row))));
  for (int row = 0; row < count; row += 4) {
    Vec sums[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      sums[i] = splat(0.0f);
      if (row + i >= count) continue;
      const Vec most = splat(new_max[row + i]);
      for (int j = 0; j < columns; j += kLanes) {
        const Vec weight = exp2(sub(load(scores + (row + i) * kTile + j), most));
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

// Logits of tokens that a row does not see.
template <class Format>
RECALKV_INLINE void Attention<Format>::hide(float* logits, Range seen, int columns) const {
  const int from = static_cast<int>(seen.begin), until = static_cast<int>(seen.end);
  if (from == 0 && until >= columns) return;
  for (int j = 0; j < columns; j += kLanes)
    store(logits + j,
          select_range(from - j, until - j, load(logits + j), splat(-__builtin_inff())));
}

// Tokens of the tile at `first` that a row sees.
template <class Format>
RECALKV_INLINE typename Attention<Format>::Range Attention<Format>::visible(int row,
                                                                            int64_t first) const {
  const int64_t position = task.first_position + row / batch.queries_per_kv;
  const int64_t oldest = layer.window ? position - layer.window + 1 : 0;
  return {clamp(oldest - first, kTile), clamp(position - first + 1, tile_tokens(first))};
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
    for_sums(acc, [&](Vec& sum, int i, int j) __attribute__((always_inline)) {
      sum = expanded ? load(scores + (row + i) * kTile + column + j * kLanes) : splat(0.0f);
    });
  }, [&]<int kR, int kV>(Vec(&acc)[kR][kV], int row, int column) __attribute__((always_inline)) {
    for_sums(acc, [&](Vec& sum, int i, int j) __attribute__((always_inline)) {
      store(scores + (row + i) * kTile + column + j * kLanes, logits(sum, column + j * kLanes));
    });
  });
  softmax(head, begin, count, columns, first);
  products.template run<Format>(
      count, width, {weights, kTokenUnits}, {values, width},
      (seen + Format::kPerUnit - 1) / Format::kPerUnit,
      [&]<int kR, int kV>(Vec(&acc)[kR][kV], int row, int column) __attribute__((always_inline)) {
    for_sums(acc, [&](Vec& sum, int i, int j) __attribute__((always_inline)) {
      sum =
          mul(load(row_sums(head, begin + row + i) + column + j * kLanes), splat(rescale[row + i]));
    });
  }, [&]<int kR, int kV>(Vec(&acc)[kR][kV], int row, int column) __attribute__((always_inline)) {
    for_sums(acc, [&](Vec& sum, int i, int j) __attribute__((always_inline)) {
      store(row_sums(head, begin + row + i) + column + j * kLanes, sum);
    });
  });
}

}  // namespace recalkv::RECALKV_ISA
