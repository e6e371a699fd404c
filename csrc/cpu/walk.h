// The order of a task's work: a few query rows take tile after tile, many take slices of several
// tiles, whose keys and values are reconstructed first.
#pragma once

#include "tile.h"

namespace recalkv::RECALKV_ISA {

// Makes the tile at `first`, which is `next`, the one to work on.
template <class Format>
void Attention<Format>::enter(int64_t first) {
  Tile* const done = tile;
  tile = next;
  next = done;
  locate(first + kTile, tile_tokens(first + kTile), *next);
  restart_prefetch();
  if (quantized()) dequantize(*tile, tile_tokens(first));
}

// Latents of a head, unless they are those of the head before.
template <class Format>
void Attention<Format>::gather(int head, bool values_are_shared) {
  const int global = first_head + head;
  const int heads_per_v_group = layer.num_kv_heads / layer.v_groups;
  const int group = global / heads_per_v_group;
  if (global % layer.group_heads == 0)
    gather_columns(tile->latents, layer.k_starts[global / layer.group_heads]);
  if (layer.key_scales) gather_key_scales(head);
  if (values_are_shared && head > 0 && group == (global - 1) / heads_per_v_group) return;
  if (dense) {
    gather_rows(tile->latents, layer.v_starts[group]);
  } else {
    gather_values(tile->latents, layer.v_starts[group]);
  }
}

// Heads in turn, each of which finds its operands in the nearest cache.
template <class Format>
void Attention<Format>::run_tile(int64_t first) {
  enter(first);
  for (int head = 0; head < num_heads; ++head) {
    const int global = first_head + head;
    gather(head, true);
    if (dense) reconstruct_values(global);
    if (expansion) {
      if (first % kStretch == 0 || first == task.kv_begin) absorb_stretch(head, first);
      absorb(head, first);
      score_expanded(head);
    }
    reconstruct(global, first / kTile);
    for (int begin = 0; begin < rows; begin += kRowBlock) attend(head, begin, first);
  }
}

// Sums of a block of rows stay in the nearest cache for all tiles of the slice.
template <class Format>
void Attention<Format>::run_slice(int64_t begin, int64_t end) {
  for (int64_t first = begin, panel = 0; first < end; first += kTile) {
    enter(first);
    for (int head = 0; head < num_heads; ++head) {
      use_panel(panel++);
      gather(head, dense);
      if (dense) reconstruct_values(first_head + head);
      reconstruct(first_head + head, first / kTile);
    }
  }
  for (int head = 0; head < num_heads; ++head) {
    for (int row = 0; row < rows; row += kRowBlock) {
      for (int64_t first = begin, panel = head; first < end; first += kTile, panel += num_heads) {
        use_panel(panel);
        attend(head, row, first);
      }
    }
  }
}

template <class Format>
void Attention<Format>::run() {
  start();
  locate(task.kv_begin, tile_tokens(task.kv_begin), *next);
  const int64_t slice = int64_t{slice_tiles} * kTile;
  for (int64_t first = task.kv_begin; first < task.kv_end; first += slice) {
    if (slice_tiles == 1) {
      run_tile(first);
    } else {
      run_slice(first, first + slice < task.kv_end ? first + slice : task.kv_end);
    }
  }
  finish();
}

template <class Format>
void attend_task(const Layer& layer, const Batch& batch, const Task& task, void* scratch) {
  Scratch memory{static_cast<char*>(scratch)};
  Attention<Format>(layer, batch, task, memory).run();
}

template <class Format>
int64_t attend_scratch_bytes(const Layer& layer, const Batch& batch, const Task& task) {
  Scratch memory{nullptr};
  Attention<Format> unused(layer, batch, task, memory);
  return memory.used;
}

}  // namespace recalkv::RECALKV_ISA
