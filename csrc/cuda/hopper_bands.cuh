// Latents in bands (recalkv_vllm/band_format.py): from codes to elements.
//
// A block of 32 columns becomes a *slot* of shared memory, in the order of the block table: 64 rows
// of 64 bytes, as `NarrowOperand` reads them. A lane dequantizes 16 columns of one of its warp's
// tokens, which have one scale. A register holds a pair of them, columns q and q + 4 of eight, so
// that codes need no more than a shift and a mask; the factor's columns and the V span's are in the
// same order (ops/cuda/hopper_layout.py).
#pragma once

#include "hopper_primitives.cuh"
#include "hopper_shape.cuh"

namespace recalkv {

// One block of 32 columns, as the host describes it. Offsets are in bytes.
struct alignas(16) BandBlock {
  int32_t bits;   // 0: the end of a list
  int32_t low;    // of the plane of the lowest bits, in a row of the tile
  int32_t high;   // of the other plane
  int32_t scale;  // of its scale among a token's
};

// What a block of threads reads: one row of `band_blocks`. Two lists of blocks, those of the K span
// and the others, each with an end; slots are in this order. Those of the V span are neighbors.
struct BandTable {
  const int32_t* row;
  int most_blocks;
  RECALKV_DEVICE int k_blocks() const { return row[0]; }
  RECALKV_DEVICE int all_blocks() const { return row[1]; }
  RECALKV_DEVICE int first_value_slot() const { return row[2]; }
  RECALKV_DEVICE const BandBlock* blocks() const {
    return reinterpret_cast<const BandBlock*>(row + 4);
  }
  // Of the V span's block in one of its slots: where it is in the span.
  RECALKV_DEVICE int value_block(int slot) const { return row[4 * most_blocks + 12 + slot]; }
};

RECALKV_DEVICE BandTable band_table(const DecodeParams& p, int v_block, int kv_head) {
  const int64_t index = v_block * p.num_kv_heads + kv_head;
  return {p.band_blocks + index * ((5 * p.most_blocks + 15) / 4 * 4), p.most_blocks};
}

// Which column of a V span is at `place` in its slots.
RECALKV_DEVICE int value_column(const BandTable& bands, int place) {
  return bands.value_block(place / 32) * 32 + place % 32 / 8 * 8 + place % 2 * 4 + place % 8 / 2;
}

// The four 16-byte words of a row of a slot are permuted by the row.
RECALKV_DEVICE int slot_word(int row, int word) { return row * 64 + (word ^ row / 2 % 4) * 16; }

// A lane's 16 codes of a plane of `kBits` bits, so that pair q of either eight starts at bit
// kBits · q of both halves. Planes are aligned to 4 bytes only.
template <int kBits>
RECALKV_DEVICE void load_plane(uint32_t (&codes)[2], const unsigned char* from) {
  if (kBits == 4) {
    codes[0] = reinterpret_cast<const uint32_t*>(from)[0];
    codes[1] = reinterpret_cast<const uint32_t*>(from)[1];
  } else if (kBits == 2) {
    const uint32_t all = reinterpret_cast<const uint32_t*>(from)[0];
    codes[0] = spread_bytes<0>(all);
    codes[1] = spread_bytes<2>(all);
  } else {
    codes[0] = from[0] * 0x1001u;
    codes[1] = from[1] * 0x1001u;
  }
}

// Bits of pair `q` of such a plane, moved to bit `to` of both halves, among those of `rest`.
template <int kBits>
RECALKV_DEVICE uint32_t plane_bits(uint32_t plane, int q, int to, uint32_t rest) {
  const uint32_t mask = ((1u << kBits) - 1) << to;
  const int shift = to - kBits * q;
  return masked_or(shift < 0 ? plane >> -shift : plane << shift, mask | mask << 16, rest);
}

// The lowest bit of code u of pair q in an element's mantissa: with an exponent that gives it the
// value 1 and the bit below set, the element is 2^p + u + 1/2. In bfloat16, where that leaves a
// choice, neighbors share a shift.
template <typename Element, int kBits>
RECALKV_BOTH constexpr int code_place(int q) {
  return mantissa_bits(Element{}) > 7 || kBits > 3 ? mantissa_bits(Element{}) - kBits
         : kBits == 3                              ? 2 + q / 2 * 2
                                                   : 3 + q % 2 * 2;
}

// One fused operation takes 2^p + u + 1/2 to (u + 1/2 - 2^(bits - 1)) scale, rounded once as the
// format says, if (2^p + 2^(bits - 1)) scale is exact: a scale has four bits. Float16 might
// overflow on the way, and takes two.
template <typename Element>
RECALKV_DEVICE uint32_t scaled(uint32_t value, uint32_t scale, uint32_t center) {
  if (mantissa_bits(Element{}) > 7) {
    return multiply_pairs<Element>(add_pairs<Element>(value, center), scale);
  }
  return multiply_add_pairs<Element>(value, scale, multiply_pairs<Element>(center, scale));
}

// Sixteen columns of `kLow + kHigh` bits, as eight pairs.
template <typename Element, int kLow, int kHigh>
RECALKV_DEVICE void dequantize(uint32_t (&pairs)[8], const unsigned char* low,
                               const unsigned char* high, uint32_t scale) {
  constexpr int kBits = kLow + kHigh;
  constexpr int kMantissa = mantissa_bits(Element{});
  uint32_t low_codes[2], high_codes[2];
  load_plane<kLow>(low_codes, low);
  if (kHigh) load_plane<kHigh>(high_codes, high);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int place = code_place<Element, kBits>(i % 4);
    const int power = kMantissa - place;
    const uint32_t rest = one_bits(Element{}) + (power << kMantissa) + (1u << place >> 1);
    uint32_t value = plane_bits<kLow>(low_codes[i / 4], i % 4, place, rest | rest << 16);
    if (kHigh) value = plane_bits<kHigh>(high_codes[i / 4], i % 4, place + kLow, value);
    // -(2^power + 2^(kBits - 1)): the second is a bit of the first's mantissa.
    const uint32_t center = 0x8000u + one_bits(Element{}) + (power << kMantissa) +
                            (1u << (kMantissa + kBits - 1 - power));
    pairs[i] = scaled<Element>(value, scale, center | center << 16);
  }
}

// The same of 8 bits, for which an element's mantissa has no room: in float.
template <typename Element>
RECALKV_DEVICE void dequantize_bytes(uint32_t (&pairs)[8], const unsigned char* codes,
                                     uint32_t scale) {
  const float factor = unpack<Element>(scale).x;
  const float center = (kByteOffset + 127.5f) * -factor;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const uint32_t* words = reinterpret_cast<const uint32_t*>(codes) + i / 4 * 2;
    pairs[i] = pack<Element>(offset_byte(words[0], i % 4) * factor + center,
                             offset_byte(words[1], i % 4) * factor + center);
  }
}

// What a lane needs of a tile to dequantize its columns: offsets into shared memory.
struct CodedTile {
  int codes;
  int scales;
  int to;    // its place in the next slot
  int half;  // of a block's columns
};

// Dequantize blocks until one has another number of bits; `block` is the next in the table.
template <typename S, int kLow, int kHigh>
RECALKV_DEVICE void open_run(unsigned char* memory, CodedTile& tile, const BandBlock*& next,
                             BandBlock& block) {
  using Element = typename S::Element;
#pragma unroll 1
  while (block.bits == kLow + kHigh) {
    const uint32_t scale = scale_of_byte<Element>(memory[tile.scales + block.scale]);
    const unsigned char* low = memory + (tile.codes + block.low) + tile.half * (2 * kLow);
    const unsigned char* high = memory + (tile.codes + block.high) + tile.half * (2 * kHigh);
    block = *++next;
    uint32_t pairs[8];
    if (kLow == 8) {
      dequantize_bytes<Element>(pairs, low, scale);
    } else {
      dequantize<Element, kLow % 8, kHigh>(pairs, low, high, scale);
    }
    *reinterpret_cast<uint4*>(memory + tile.to) = {pairs[0], pairs[1], pairs[2], pairs[3]};
    *reinterpret_cast<uint4*>(memory + (tile.to ^ 16)) = {pairs[4], pairs[5], pairs[6], pairs[7]};
    tile.to += kSlotBytes;
  }
}

// Dequantize a list of blocks into the slots that follow. The host sorts lists by bits, but for
// blocks of one kind that have to come first.
template <typename S>
RECALKV_DEVICE void open_blocks(unsigned char* memory, CodedTile& tile, const BandBlock* next) {
  BandBlock block = *next;
#pragma unroll 1
  while (block.bits) {
    open_run<S, 8, 0>(memory, tile, next, block);
    open_run<S, 4, 2>(memory, tile, next, block);
    open_run<S, 4, 0>(memory, tile, next, block);
    open_run<S, 2, 1>(memory, tile, next, block);
    open_run<S, 2, 0>(memory, tile, next, block);
  }
}

// keys (+)= latents factor^T of the next slots.
template <typename S, int kCount>
RECALKV_DEVICE void multiply_slots(float (&keys)[S::kHeadDim / 2], NarrowOperand& slots,
                                   NarrowOperand& factor, bool add) {
#pragma unroll
  for (int i = 0; i < 2 * kCount; ++i) {
    const NarrowOperand a = slots.at(i / 2 * kSlotBytes + i % 2 * 32);
    const NarrowOperand b = factor.at(i / 2 * S::kHeadDim * 64 + i % 2 * 32);
    product(typename S::Element{}, keys, a, b, add || i > 0);
  }
  slots = slots.at(kCount * kSlotBytes);
  factor = factor.at(kCount * S::kHeadDim * 64);
}

// keys = latents factor^T of the first `k_blocks` slots, and the values of all.
template <typename S>
RECALKV_DEVICE void reconstruct_coded(float (&keys)[S::kHeadDim / 2], unsigned char* memory,
                                      CodedTile tile, const BandBlock* blocks, int k_blocks,
                                      NarrowOperand slots, NarrowOperand factor, int team) {
  using Element = typename S::Element;
  open_blocks<S>(memory, tile, blocks);
  shared_fence();
  team_sync(team, 128);
  product_fence();
  const int odd = k_blocks % 2;
  if (odd) multiply_slots<S, 1>(keys, slots, factor, false);
#pragma unroll 1
  for (int i = odd; i < k_blocks; i += 2) multiply_slots<S, 2>(keys, slots, factor, i > 0);
  product_commit();
  open_blocks<S>(memory, tile, blocks + k_blocks + 1);
  product_wait<0>(keys);
  warp_sync();  // values are there
}

}  // namespace recalkv
