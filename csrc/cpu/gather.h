// Where a tile's latents lie, and these as dot-product operands.
#pragma once

#include "tile.h"

namespace recalkv::RECALKV_ISA {

// Where the latents of tokens [first, first + valid) lie; null past them.
template <class Format>
void Attention<Format>::locate(int64_t first, int valid, Tile& tile) const {
  int64_t block = first / batch.block_size;
  int offset = static_cast<int>(first % batch.block_size);
  for (int t = 0; t < valid; ++t) {
    const int64_t from = task.blocks[block] * batch.block_stride;
    if (quantized()) {
      const LatentLayout& layout = batch.latents;
      const uint8_t* codes = static_cast<const uint8_t*>(batch.cache) + from;
      const uint8_t* scales = codes + int64_t{batch.block_size} * layout.code_bytes;
      tile.codes[t] = codes + int64_t{offset} * layout.code_bytes;
      tile.scales[t] = scales + int64_t{offset} * layout.groups * scale_bytes(layout.scale_type);
      tile.latents[t] = dequantized + t * dequantized_stride;
    } else {
      tile.latents[t] = static_cast<const Raw*>(batch.cache) + from + offset * batch.token_stride;
    }
    if (layer.key_scales) {
      const char* scales = batch.key_scales + task.blocks[block] * batch.block_bytes;
      tile.key_scales[t] = reinterpret_cast<const float*>(scales) + offset * layer.key_scales;
    }
    if (++offset == batch.block_size) {
      offset = 0;
      ++block;
    }
  }
  for (int t = valid; t < kTile; ++t) tile.latents[t] = nullptr;
}

// The parts of a latent that this task reads, merged where they touch.
template <class Format>
void Attention<Format>::plan_parts() {
  num_parts = 0;
  for (int group = task.group_begin; group < task.group_end; ++group)
    add_part(layer.k_starts[group], layer.k_starts[group] + layer.k_width);
  const int heads_per_v_group = layer.num_kv_heads / layer.v_groups;
  for (int group = first_head / heads_per_v_group;
       group <= (first_head + num_heads - 1) / heads_per_v_group; ++group)
    add_part(layer.v_starts[group], layer.v_starts[group] + layer.v_width);
}

template <class Format>
void Attention<Format>::add_part(int64_t begin, int64_t end) {
  for (int i = 0; i < num_parts;) {
    if (begin > parts[i].end || end < parts[i].begin) {
      ++i;
      continue;
    }
    if (parts[i].begin < begin) begin = parts[i].begin;
    if (parts[i].end > end) end = parts[i].end;
    parts[i] = parts[--num_parts];
    i = 0;  // what it did not touch, it may touch now
  }
  parts[num_parts++] = {begin, end};
}

template <class Format>
void Attention<Format>::gather_columns(const Raw* const* latents, int64_t start) {
  for (int t = 0; t < kTile; t += kLanes) {
    const Unit* sources[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      const Raw* row = span(latents[t + i], start);
      if constexpr (Format::kRawIsUnits) {
        sources[i] = reinterpret_cast<const Unit*>(row);
      } else {
        Format::widen(row, widened + i * layer.k_width, layer.k_width);
        sources[i] = widened + i * layer.k_width;
      }
    }
    for (int k = 0; k < k_units; k += kLanes) {
      transpose(sources, z_columns + k * kTile + t, kTile,
                k_units - k < kLanes ? k_units - k : kLanes);
      for (int i = 0; i < kLanes; ++i) sources[i] += kLanes;
    }
  }
}

template <class Format>
void Attention<Format>::gather_values(const Raw* const* latents, int64_t start) {
  for (int t = 0; t < kTile; t += 2) {
    Format::interleave(span(latents[t], start), span(latents[t + 1], start),
                       values + t / Format::kPerUnit * layer.v_width, layer.v_width);
  }
}

template <class Format>
void Attention<Format>::gather_rows(const Raw* const* latents, int64_t start) {
  for (int t = 0; t < kTile; ++t)
    Format::widen(span(latents[t], start), z_rows + t * v_units, layer.v_width);
}

// Factors on a head's keys; zero past the end.
template <class Format>
void Attention<Format>::gather_key_scales(int head) {
  const int index = layer.key_scales == 1 ? 0 : first_head + head;
  for (int t = 0; t < kTile; ++t)
    key_scale[t] = tile->latents[t] ? tile->key_scales[t][index] : 0.0f;
}

}  // namespace recalkv::RECALKV_ISA
