// Compile-time sizes of the decode kernel for Hopper and the layout of its shared memory.
#pragma once

#include <type_traits>

#include "shape.cuh"

namespace recalkv {

// Two warpgroups that consume tiles in turns, and one with a warp that copies latents and a warp
// or two that turn queries.
constexpr int kConsumerWarps = 8;
constexpr int kConsumerThreads = 32 * kConsumerWarps;
constexpr int kHopperThreads = kConsumerThreads + 128;
// Of a thread when a block starts: a multiprocessor has 65536, and counts in eights.
constexpr int kThreadRegisters = 65536 / kHopperThreads / 8 * 8;
// A block of 32 columns of a tile's elements, where latents are in bands.
constexpr int kSlotBytes = 64 * 64;
// Elements of latents in bands are what codes stand for by 2^-9, and keys made of them what they
// are without by 2^-4; ELEMENT_SCALE and KEY_SCALE of ops/cuda/hopper_layout.py.
constexpr int kElementScale = 9;
constexpr int kKeyScale = 4;

// kHeadDim is d; kColumnTiles and kVTiles are those of `DecodeParams::kernel`. A lean kernel
// rotates only the first half of the pairs and knows no key bias, key scales or soft cap. With
// `kBands`, latents are coded: a row of a tile has codes, and each warpgroup elements of its own,
// of two tiles at once.
template <typename Element_, int kHeadDim_, int kColumnTiles_, int kVTiles_, bool kLean_,
          bool kBands_>
struct HopperShape {
  using Element = Element_;  // of queries
  using Latent = std::conditional_t<kBands_, Float16, Element_>;
  static constexpr bool kLean = kLean_;
  static constexpr bool kBands = kBands_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kPairs = kHeadDim / 2;
  static constexpr int kTokens = 64;
  // Tiles that a warpgroup takes in a turn.
  static constexpr int kTurn = kBands ? 2 : 1;
  // Products of 8 columns hold four query rows and the derivatives of these.
  static constexpr int kColumnTiles = kColumnTiles_;
  static constexpr int kColumns = 4 * kColumnTiles;
  static constexpr int kVTiles = kVTiles_;
  // Steps of 16 key columns, 8 pairs, that are rotated: the rest are of slow pairs.
  static constexpr int kFastSteps = kLean ? kHeadDim / 32 : kHeadDim / 16;
  // Of a thread. Warpgroups trade what their block was started with: for one more register they
  // would wait without end. With 216, which leave 72 to producers, ptxas spills in some with bands,
  // with 200 in others, which issue more with them.
  static constexpr bool kCrowded =
      kBands && kLean && kColumnTiles == 2 && (kHeadDim == 64 ? kVTiles == 16 : kVTiles == 8);
  static constexpr int kConsumerRegisters = kCrowded ? 200 : 216;
  static constexpr int kProducerRegisters = 3 * kThreadRegisters - 2 * kConsumerRegisters;
  static constexpr int kQueryBytes = kHeadDim / 32 * 512;  // of 4 rows
  static constexpr int kOutStride = 16 * kVTiles + 4;
  static_assert(kHeadDim % 32 == 0 && kHeadDim <= 128 && kColumnTiles <= 2);
};

// Byte offsets into a block's shared memory. What the end needs reuses the ring.
template <typename S>
struct HopperLayout {
  int factor, factor_bytes, slots, rotation, bias, columns, blocks, barriers, ring, row_bytes,
      query, scales, stage_bytes, maxima, sums, total;

  RECALKV_BOTH explicit HopperLayout(const DecodeParams& p) {
    const auto& k = p.kernel;
    factor = 0;  // swizzled: aligned to 1024 bytes
    factor_bytes =
        S::kBands ? p.k_width * S::kHeadDim * 2 : (p.k_width + 63) / 64 * S::kHeadDim * 128;
    slots = factor + factor_bytes;  // swizzled too: aligned to 512 bytes
    rotation = slots + (S::kBands ? k.teams * S::kTurn * p.most_blocks * kSlotBytes : 0);
    bias = rotation + S::kFastSteps * 2048;
    columns = bias + (p.k_bias ? S::kHeadDim * 4 : 0);
    blocks = columns + (k.tile_width / 8 * 4 + 15) / 16 * 16;
    barriers = blocks + (S::kBands ? (p.most_blocks + 2) * 16 : 0);
    ring = barriers + (2 * k.stages + 1 + 1) / 2 * 16;
    // An odd number of 16-byte words: eight rows start in different banks.
    row_bytes = k.tile_width * 2 + 16;
    query = S::kTokens * row_bytes;  // in a stage, as the next
    scales = query + S::kColumnTiles * S::kQueryBytes;
    stage_bytes = scales + (S::kBands ? S::kTokens * p.token_scales : 0);
    maxima = ring;
    sums = maxima + kConsumerWarps * S::kColumns * 8;
    const int after_ring = ring + k.stages * stage_bytes;
    const int after_sums = sums + S::kColumns * S::kOutStride * 4;
    total = after_ring > after_sums ? after_ring : after_sums;
  }
};

// A block's barriers: a stage is full, a stage is empty, the factor is there.
struct HopperBarriers {
  uint64_t* full;
  uint64_t* empty;
  uint64_t* factor;
  template <typename S>
  RECALKV_DEVICE HopperBarriers(const HopperLayout<S>& shared, unsigned char* memory, int stages)
      : full(reinterpret_cast<uint64_t*>(memory + shared.barriers)),
        empty(full + stages),
        factor(empty + stages) {}
};

// A place in the ring and the parity of its current phase.
struct RingPlace {
  int stage;
  int parity;
  RECALKV_DEVICE void advance(int steps, int stages) {
    stage += steps;
    if (stage >= stages) {
      stage -= stages;
      parity ^= 1;
    }
  }
};

}  // namespace recalkv
