// Decode attention for Hopper (sm_90a): see docs/kernels/cuda_decode.md.
//
// A block owns `kColumns` query rows under one KV head, and the tokens that they see or a piece of
// these.
#pragma once

#include "hopper_consumer.cuh"
#include "hopper_producer.cuh"
#include "results.cuh"

namespace recalkv {

// Barriers, small constants, and a ring of zeros: products read columns past a row's span, which
// must not be NaN.
template <typename S>
RECALKV_DEVICE void prepare_block(const DecodeParams& p, const HopperLayout<S>& shared,
                                  unsigned char* memory, const HopperBarriers& barriers,
                                  const TileColumns& columns, const BandTable& bands, int kv_head) {
  const int thread = thread_index();
  if (thread == 0) {
    for (int i = 0; i < p.kernel.stages; ++i) {
      // The lanes that copy, and one of each warp with queries.
      barrier_init(barriers.full + i, 32 + S::kColumnTiles);
      barrier_init(barriers.empty + i, 4);  // the warps of the warpgroup that consumes it
    }
    barrier_init(barriers.factor, 1);
    barrier_init_done();
  }
  int32_t* sources = reinterpret_cast<int32_t*>(memory + shared.columns);
  for (int i = thread; i < columns.chunks(); i += kHopperThreads) sources[i] = columns.source(1, i);
  BandBlock* blocks = reinterpret_cast<BandBlock*>(memory + shared.blocks);
  for (int i = thread; S::kBands && i < bands.all_blocks() + 2; i += kHopperThreads) {
    blocks[i] = bands.blocks()[i];
  }
  float* bias = reinterpret_cast<float*>(memory + shared.bias);
  for (int i = thread; p.k_bias && i < S::kHeadDim; i += kHopperThreads) {
    bias[i] = p.k_bias[kv_head * S::kHeadDim + i];
  }
  uint4* ring = reinterpret_cast<uint4*>(memory + shared.ring);
  for (int i = thread; i < p.kernel.stages * shared.stage_bytes / 16; i += kHopperThreads) {
    ring[i] = {0, 0, 0, 0};
  }
  block_sync();
}

RECALKV_DEVICE void consumer_sync() { team_sync(1, kConsumerThreads); }

// Merge the consumer warps' results through shared memory, in a fixed order, and write them.
template <typename S>
RECALKV_DEVICE void merge_warps(const DecodeParams& p, const HopperLayout<S>& shared,
                                unsigned char* memory, HopperState<S>& state, const OwnRows& own,
                                const BandTable& bands, int kv_head, int v_block, int v_columns) {
  const int lane = thread_index() % 32;
  const int warp = thread_index() / 32;
  float2* maxima = reinterpret_cast<float2*>(memory + shared.maxima);  // (maximum, sum), by warp
  float* sums = reinterpret_cast<float*>(memory + shared.sums);
  consumer_sync();  // the ring is free from here on
#pragma unroll
  for (int c = 0; c < S::kColumnTiles; ++c) {
    float sum = state.sum[c];
    sum += shuffle_xor(sum, 4);
    sum += shuffle_xor(sum, 8);
    sum += shuffle_xor(sum, 16);
    if (lane < 4) {
      maxima[warp * S::kColumns + c * 4 + lane] = {state.maximum[c], sum};
    }
  }
  consumer_sync();
#pragma unroll
  for (int c = 0; c < S::kColumnTiles; ++c) {
    float highest = kNoMaximum;
    for (int w = 0; w < kConsumerWarps; ++w) {
      highest = fmaxf(highest, maxima[w * S::kColumns + c * 4 + lane % 4].x);
    }
    const float weight = exp2_fast(state.maximum[c] - highest);
#pragma unroll
    for (int v = 0; v < S::kVTiles; ++v) {
      state.out[v][c] *= weight;
      state.out[v][c + 2] *= weight;
    }
  }
  for (int w = 0; w < kConsumerWarps; ++w) {
    if (w == warp) {
#pragma unroll
      for (int v = 0; v < S::kVTiles; ++v) {
        if (v * 16 >= v_columns) break;
#pragma unroll
        for (int c = 0; c < S::kColumnTiles; ++c) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            float* sum = sums + (c * 4 + lane % 4) * S::kOutStride + v * 16 + lane / 4 + i * 8;
            *sum = state.out[v][c + 2 * i] + (w == 0 ? 0.0f : *sum);
          }
        }
      }
    }
    consumer_sync();
  }
  for (int row = warp; row < S::kColumns; row += kConsumerWarps) {
    if (row >= own.count) continue;
    float highest = kNoMaximum;
    for (int w = 0; w < kConsumerWarps; ++w) {
      highest = fmaxf(highest, maxima[w * S::kColumns + row].x);
    }
    float total = 0.0f;
    for (int w = 0; w < kConsumerWarps; ++w) {
      const float2 part = maxima[w * S::kColumns + row];
      total += part.y * exp2_fast(part.x - highest);
    }
    const int64_t to = result_row(p, own, kv_head, row, S::kColumns);
    const float unit = S::kBands ? 1 << kElementScale : 1;
    const float inverse = total > 0.0f ? unit / total : 0.0f;
    float* out = p.out + to * p.v_width + v_block * (16 * S::kVTiles);
    for (int v = lane; v < v_columns; v += 32) {
      const int column = S::kBands ? value_column(bands, v) : v;
      out[column] = sums[row * S::kOutStride + v] * inverse;
    }
    if (lane == 0 && v_block == 0) {
      p.lse[to] = total > 0.0f ? (highest + log2_fast(total)) / kLog2E : kMinusInfinity;
    }
  }
}

template <typename S>
RECALKV_KERNEL void RECALKV_LAUNCH_BOUNDS(kHopperThreads)
    decode_attention_hopper(const DecodeParams p) {
#if RECALKV_HOPPER
  const int v_blocks = (p.v_width + 16 * S::kVTiles - 1) / (16 * S::kVTiles);
  // Blocks that read the same latents are neighbors, so that all but one hit L2.
  const int kv_head = block_x() % p.num_kv_heads;
  const int v_block = block_x() / p.num_kv_heads % v_blocks;
  // In tiles that a warpgroup takes in a turn, and from there on in tiles.
  Work work = find_work(p, block_x() / p.num_kv_heads / v_blocks, S::kColumns, kv_head, v_block,
                        16 * S::kVTiles, S::kTurn * S::kTokens, p.kernel.teams);
  if (!work.some) return;
  const Rows& rows = work.rows;
  TokenRange& range = work.range;
  range.tile_from *= S::kTurn;
  range.tile_to *= S::kTurn;
  unsigned char* memory = shared_memory();
  const HopperLayout<S> shared(p);
  const HopperBarriers barriers(shared, memory, p.kernel.stages);
  const TileColumns columns = tile_columns(p, v_block, kv_head);
  const BandTable bands = band_table(p, v_block, kv_head);
  prepare_block<S>(p, shared, memory, barriers, columns, bands, kv_head);
  const int lane = thread_index() % 32;
  const int warp = thread_index() / 32;
  const int v_left = p.v_width - v_block * (16 * S::kVTiles);
  const int v_columns = v_left < 16 * S::kVTiles ? v_left : 16 * S::kVTiles;
  if (warp >= kConsumerWarps) {
    shrink_registers<S::kProducerRegisters>();
    if (warp == kConsumerWarps) {
      // With bands, the order of a factor's columns depends on the block's part of the V span.
      const int factor = S::kBands ? kv_head * v_blocks + v_block : kv_head;
      produce_latents<S>(p, shared, memory, barriers, rows, range, columns, factor, lane);
    } else if (warp <= kConsumerWarps + S::kColumnTiles) {
      produce_queries<S>(p, shared, memory, barriers, rows, range, warp - kConsumerWarps - 1,
                         kv_head, lane);
    }
  } else {
    grow_registers<S::kConsumerRegisters>();
    const OwnRows own(p, rows);
    HopperState<S> state(p, rows, lane);
    consume<S>(p, shared, memory, barriers, state, rows, range, columns, bands, kv_head, v_columns,
               lane, warp);
    // Found anew: through the loop they would take registers that there are none of.
    const int block = block_x_anew();
    merge_warps<S>(p, shared, memory, state, own, bands, block % p.num_kv_heads,
                   block / p.num_kv_heads % v_blocks, v_columns);
  }
#endif
}

}  // namespace recalkv
