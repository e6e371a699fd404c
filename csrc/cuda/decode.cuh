// Decode attention over a paged cache of latents; see docs/kernels/cuda_decode.md.
//
// A block owns `columns` query rows under each of `heads` KV heads of one K group, and the tokens
// that they see or a piece of these. It runs `teams` independent token streams; a team has one warp
// per head, which all read the same tiles from the team's ring. Teams meet only at the end.
#pragma once

#include "results.cuh"
#include "rows.cuh"
#include "scores.cuh"
#include "shape.cuh"
#include "softmax.cuh"
#include "staging.cuh"

namespace recalkv {

// Merge the teams' results through shared memory and write them. All threads take part; no copy may
// be under way any more.
template <typename S>
RECALKV_DEVICE void merge_teams(const DecodeParams& p, const SharedLayout<S>& shared,
                                unsigned char* memory, RunningSoftmax<S>& state, const OwnRows& own,
                                int first_head, int v_block, int v_columns) {
  const int lane = thread_index() % 32;
  const int warp = thread_index() / 32;
  const int head = warp % p.kernel.heads;
  const int team = warp / p.kernel.heads;
  const int num_columns = p.kernel.heads * S::kColumns;
  float2* maxima = reinterpret_cast<float2*>(memory + shared.maxima);  // (maximum, sum), by team
  float* sums = reinterpret_cast<float*>(memory + shared.sums);
  block_sync();  // the ring is free from here on
#pragma unroll
  for (int c = 0; c < S::kColumnTiles; ++c) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float sum = state.sum[c][i];
      sum += shuffle_xor(sum, 4);
      sum += shuffle_xor(sum, 8);
      sum += shuffle_xor(sum, 16);
      const int column = head * S::kColumns + c * 8 + lane % 4 * 2 + i;
      if (lane < 4) maxima[team * num_columns + column] = {state.maximum[c][i], sum};
    }
  }
  block_sync();
#pragma unroll
  for (int c = 0; c < S::kColumnTiles; ++c) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int column = head * S::kColumns + c * 8 + lane % 4 * 2 + i;
      float highest = kMinusInfinity;
      for (int t = 0; t < p.kernel.teams; ++t) {
        highest = fmaxf(highest, maxima[t * num_columns + column].x);
      }
      const float weight =
          highest == kMinusInfinity ? 0.0f : exp2_fast(state.maximum[c][i] - highest);
#pragma unroll
      for (int v = 0; v < S::kVTiles; ++v) {
        state.out[v][c][i] *= weight;
        state.out[v][c][i + 2] *= weight;
      }
    }
  }
  for (int t = 0; t < p.kernel.teams; ++t) {
    if (t == team) {
#pragma unroll
      for (int v = 0; v < S::kVTiles; ++v) {
        if (v * 16 >= v_columns) break;
#pragma unroll
        for (int c = 0; c < S::kColumnTiles; ++c) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int column = head * S::kColumns + c * 8 + lane % 4 * 2 + i % 2;
            float* sum = sums + column * S::kOutStride + v * 16 + lane / 4 + i / 2 * 8;
            *sum = state.out[v][c][i] + (t == 0 ? 0.0f : *sum);
          }
        }
      }
    }
    block_sync();
  }
  for (int column = warp; column < num_columns; column += p.kernel.heads * p.kernel.teams) {
    if (column % S::kColumns >= own.count) continue;
    float highest = kMinusInfinity;
    for (int t = 0; t < p.kernel.teams; ++t) {
      highest = fmaxf(highest, maxima[t * num_columns + column].x);
    }
    float total = 0.0f;
    for (int t = 0; t < p.kernel.teams; ++t) {
      const float2 part = maxima[t * num_columns + column];
      if (part.x != kMinusInfinity) total += part.y * exp2_fast(part.x - highest);
    }
    const int64_t row =
        result_row(p, own, first_head + column / S::kColumns, column % S::kColumns, S::kColumns);
    const float inverse = total > 0.0f ? 1.0f / total : 0.0f;
    float* out = p.out + row * p.v_width + v_block * (16 * S::kVTiles);
    for (int v = lane; v < v_columns; v += 32) {
      out[v] = sums[column * S::kOutStride + v] * inverse;
    }
    if (lane == 0 && v_block == 0) {
      p.lse[row] = total > 0.0f ? (highest + log2_fast(total)) / kLog2E : kMinusInfinity;
    }
  }
}

template <typename S, bool kResident>
RECALKV_KERNEL void RECALKV_LAUNCH_BOUNDS(kLargestBlock) decode_attention(const DecodeParams p) {
  const int head_blocks = p.num_kv_heads / p.kernel.heads;
  const int v_blocks = (p.v_width + 16 * S::kVTiles - 1) / (16 * S::kVTiles);
  // Blocks that read the same latents are neighbors, so that all but one hit L2.
  const int head_block = block_x() % head_blocks;
  const int v_block = block_x() / head_blocks % v_blocks;
  const int first_head = head_block * p.kernel.heads;
  const Work work = find_work(p, block_x() / head_blocks / v_blocks, S::kColumns, first_head,
                              v_block, 16 * S::kVTiles, S::kTokens, p.kernel.teams);
  if (!work.some) return;
  const Rows& rows = work.rows;
  const TokenRange& range = work.range;

  const int thread = thread_index();
  unsigned char* memory = shared_memory();
  const SharedLayout<S> shared(p);
  const int factor_size = S::kHeadDim * p.k_width / 8;  // 16-byte words of one head
  const uint4* factor = static_cast<const uint4*>(p.k_factor) + first_head * factor_size;
  if (kResident) {
    uint4* resident = reinterpret_cast<uint4*>(memory + shared.factor);
    for (int i = thread; i < p.kernel.heads * factor_size; i += thread_count()) {
      copy_async(resident + i, factor + i, true);
    }
    copy_commit();
    factor = resident;
  }
  const TileColumns columns = tile_columns(p, v_block, head_block);
  load_constants<S>(p, shared, memory, rows, columns, first_head);
  block_sync();

  const int lane = thread % 32;
  const int head = thread / 32 % p.kernel.heads;
  const int team = thread / 32 / p.kernel.heads;
  const int stages = p.kernel.stages;
  const int32_t* sources = reinterpret_cast<const int32_t*>(memory + shared.columns);
  unsigned char* ring = memory + shared.ring + team * stages * shared.stage_bytes;
  int next_tile = range.tile_from + team;
  int next_stage = 0;
  int page = fetch_page<S>(p, rows.seq, range, next_tile, lane);
  auto load_next = [&]() {
    if (next_tile < range.tile_to) {
      load_tile<S>(p, shared, ring + next_stage * shared.stage_bytes, sources, columns.chunks(),
                   next_tile, page, head, lane);
      next_tile += p.kernel.teams;
      page = fetch_page<S>(p, rows.seq, range, next_tile, lane);
      next_stage = next_stage + 1 == stages ? 0 : next_stage + 1;
    }
    copy_commit();
  };
  for (int i = 0; i < stages - 1; ++i) load_next();
  wait_copies(stages - 1);  // the factor
  block_sync();

  ScoreInputs in;
  in.factor = factor + head * factor_size;
  in.query = reinterpret_cast<const uint32_t*>(memory + shared.query) +
             head * S::kColumns * (S::kQueryStride / 2);
  in.rotation = reinterpret_cast<const float2*>(memory + shared.rotation);
  in.bias =
      p.k_bias ? reinterpret_cast<const float2*>(memory + shared.bias) + head * S::kPairs : nullptr;
  in.k_offset = columns.k_offset();
  const int v_offset = columns.v_offset(head);
  const int v_left = p.v_width - v_block * (16 * S::kVTiles);
  const int v_columns = v_left < 16 * S::kVTiles ? v_left : 16 * S::kVTiles;

  const int32_t* table = p.block_table + rows.seq * p.table_stride;
  int row_position[S::kColumnTiles][2];
#pragma unroll
  for (int c = 0; c < S::kColumnTiles; ++c) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = rows.begin + c * 8 + lane % 4 * 2 + i;
      const int query = row / (p.num_heads / p.num_kv_heads);
      row_position[c][i] = row < rows.end ? rows.length - rows.num_queries + query : -1;
    }
  }

  const OwnRows own(p, rows);
  RunningSoftmax<S> state;
  state.clear();
  int stage = 0;
  for (int tile = range.tile_from + team; tile < range.tile_to; tile += p.kernel.teams) {
    wait_copies(stages - 2);
    // The tile is here for the whole team, and all of it is done with the tile that is overwritten.
    team_sync(1 + team, 32 * p.kernel.heads);
    load_next();
    const uint16_t* latents = reinterpret_cast<const uint16_t*>(ring + stage * shared.stage_bytes);
    const float2* base = reinterpret_cast<const float2*>(latents + S::kTokens * shared.tile_stride);
    float scores[S::kRowTiles][S::kColumnTiles][4];
    const int position = tile * S::kTokens + lane / 4;
    // Asked for before the keys are reconstructed, which takes longer than they take to come.
    float key_scales[S::kRowTiles][2] = {};
    if (p.key_scales) {
#pragma unroll
      for (int m = 0; m < S::kRowTiles; ++m) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          key_scales[m][i] =
              key_scale(p, table, range, position + m * 16 + i * 8, first_head + head);
        }
      }
    }
    score_tile<S>(scores, p, in, latents, shared.tile_stride, base, lane);
    finish_logits<S>(scores, key_scales, p, position, row_position);
    accumulate<S>(state, scores, latents + v_offset, shared.tile_stride, v_columns / 16, lane);
    stage = stage + 1 == stages ? 0 : stage + 1;
  }
  copy_wait<0>();
  merge_teams<S>(p, shared, memory, state, own, first_head, v_block, v_columns);
}

}  // namespace recalkv
