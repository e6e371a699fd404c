// Fetching the next tile ahead of time, a few cache lines between blocks of arithmetic: all at once
// would fill the core's miss buffers and stall it.
#pragma once

#include "tile.h"

namespace recalkv::RECALKV_ISA {

constexpr int kLineBytes = 64;

template <class Format>
void Attention<Format>::add_read(int64_t begin, int64_t end) {
  if (num_reads && reads[num_reads - 1].end == begin) {
    reads[num_reads - 1].end = end;
  } else {
    reads[num_reads++] = {begin, end};
  }
}

// How many lines a call of prefetch_some() fetches, so that those of a tile fetch all of the next.
template <class Format>
void Attention<Format>::plan_prefetch() {
  if (!quantized())
    for (int i = 0; i < num_parts; ++i)
      add_read(parts[i].begin * sizeof(Raw), parts[i].end * sizeof(Raw));
  int64_t lines = quantized();  // of a token: scales count as one
  for (int i = 0; i < num_reads; ++i)
    lines += (reads[i].end - reads[i].begin + kLineBytes - 1) / kLineBytes;
  int blocks = exact_rows / Products::kBlockRows + 1;
  if (expansion) blocks += rows * expansion->terms / kTerms;
  const int calls = num_heads * blocks * (kTile / (kVecs * kLanes));
  prefetch_lines = static_cast<int>((kTile * lines + calls - 1) / calls);
}

template <class Format>
RECALKV_INLINE void Attention<Format>::restart_prefetch() {
  fetch_token = fetch_read = 0;
  fetch_byte = reads[0].begin;
}

template <class Format>
RECALKV_INLINE void Attention<Format>::prefetch_some() {
  const int64_t scales =
      quantized() ? batch.latents.groups * scale_bytes(batch.latents.scale_type) : 0;
  for (int left = prefetch_lines; left > 0 && fetch_token < kTile;) {
    const char* from = quantized() ? reinterpret_cast<const char*>(next->codes[fetch_token])
                                   : reinterpret_cast<const char*>(next->latents[fetch_token]);
    if (!next->latents[fetch_token]) return;
    for (; left > 0 && fetch_byte < reads[fetch_read].end; fetch_byte += kLineBytes, --left)
      __builtin_prefetch(from + fetch_byte, 0, 2);
    if (fetch_byte < reads[fetch_read].end) return;
    if (++fetch_read == num_reads) {
      for (int64_t i = 0; i < scales; i += kLineBytes, --left)
        __builtin_prefetch(next->scales[fetch_token] + i, 0, 2);
      ++fetch_token;
      fetch_read = 0;
    }
    fetch_byte = reads[fetch_read].begin;
  }
}

}  // namespace recalkv::RECALKV_ISA
