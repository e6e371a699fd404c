// Merge of the splits of one decode call by their log-sum-exp.
#pragma once

#include "params.h"
#include "primitives.cuh"

namespace recalkv {

constexpr int kMergeWarps = 4;

// One warp per row. A split that has seen no token has minus infinity in `partial_lse`; its partial
// output was never written and is not read.
RECALKV_KERNEL void RECALKV_LAUNCH_BOUNDS(32 * kMergeWarps) merge_splits(const MergeParams p) {
  const float minus_infinity = -__builtin_huge_valf();
  const float log2_e = 1.4426950408889634f;
  const int64_t row = static_cast<int64_t>(block_x()) * kMergeWarps + thread_index() / 32;
  if (row >= p.rows) return;
  float highest = minus_infinity;
  for (int split = 0; split < p.splits; ++split) {
    highest = fmaxf(highest, p.partial_lse[static_cast<int64_t>(split) * p.rows + row]);
  }
  for (int v = thread_index() % 32; v < p.v_width; v += 32) {
    float sum = 0.0f;
    float total = 0.0f;
    for (int split = 0; split < p.splits; ++split) {
      const int64_t source = static_cast<int64_t>(split) * p.rows + row;
      const float lse = p.partial_lse[source];
      if (lse == minus_infinity) continue;
      const float weight = exp2_fast((lse - highest) * log2_e);
      total += weight;
      sum += weight * p.partial_out[source * p.v_width + v];
    }
    p.out[row * p.v_width + v] = total > 0.0f ? sum / total : 0.0f;
    if (v == 0) {
      p.lse[row] = total > 0.0f ? highest + log2_fast(total) / log2_e : minus_infinity;
    }
  }
}

}  // namespace recalkv
