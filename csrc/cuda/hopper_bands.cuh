// Latents in bands (recalkv_vllm/band_format.py): from codes to elements.
//
// A warpgroup takes two tiles at once, so that each lane has a token. A block of 32 columns of a
// tile becomes a *slot* of shared memory, in the order of the block table: 64 rows of 64 bytes, as
// `NarrowOperand` reads them. A register holds a pair of columns, q and q + 4 of eight, so that
// codes need no more than a shift and a mask, or with 8 bits neighbors; the factor's columns and
// the V span's are in the same order (ops/cuda/hopper_bands.py).
//
// Elements are float16 whatever the model's are, and 2^-9 of what codes stand for: nothing on the
// way to the largest one overflows.
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
  // Of the V span's block in one of its slots: twice its place in the span, and one more where
  // columns are in their own order.
  RECALKV_DEVICE int value_block(int slot) const { return row[4 * most_blocks + 12 + slot]; }
};

RECALKV_DEVICE BandTable band_table(const DecodeParams& p, int v_block, int kv_head) {
  const int64_t index = v_block * p.num_kv_heads + kv_head;
  return {p.band_blocks + index * ((5 * p.most_blocks + 15) / 4 * 4), p.most_blocks};
}

// Which column of a V span is at `place` in its slots.
RECALKV_DEVICE int value_column(const BandTable& bands, int place) {
  const int block = bands.value_block(place / 32);
  const int column = block % 2 ? place % 8 : place % 2 * 4 + place % 8 / 2;
  return block / 2 * 32 + place % 32 / 8 * 8 + column;
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
// value 1 and the bit below set, the element is 2^p + u + 1/2, where p <= 8. Places are those with
// which fewest shifts differ.
template <int kBits>
RECALKV_BOTH constexpr int code_place(int q) {
  return kBits == 2   ? 3 + q % 2 * 2
         : kBits == 3 ? 2 + q / 2 * 2
         : kBits == 4 ? 2 + q % 2 * 4
                      : 2 + q % 2 * 2;
}

// Sixteen columns of `kLow + kHigh` bits, as eight pairs. One fused operation takes 2^p + u + 1/2
// to (u + 1/2 - 2^(bits - 1)) scale, rounded once as the format says: a scale has four bits, so
// that (2^p + 2^(bits - 1)) scale is exact.
template <int kLow, int kHigh>
RECALKV_DEVICE void dequantize(uint32_t (&pairs)[8], const unsigned char* low,
                               const unsigned char* high, uint32_t scale) {
  constexpr int kBits = kLow + kHigh;
  uint32_t low_codes[2], high_codes[2];
  load_plane<kLow>(low_codes, low);
  if (kHigh) load_plane<kHigh>(high_codes, high);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int place = code_place<kBits>(i % 4);
    const int power = 10 - place;
    const uint32_t exponent = kOneBits + ((power - kElementScale) << 10);
    const uint32_t rest = exponent + (1u << place >> 1);
    uint32_t value = plane_bits<kLow>(low_codes[i / 4], i % 4, place, rest | rest << 16);
    if (kHigh) value = plane_bits<kHigh>(high_codes[i / 4], i % 4, place + kLow, value);
    // -(2^power + 2^(kBits - 1)): the second is a bit of the first's mantissa.
    const uint32_t center = 0x8000u + exponent + (1u << (10 + kBits - 1 - power));
    pairs[i] = multiply_add_pairs(value, scale, multiply_pairs(center | center << 16, scale));
  }
}

// The same of 8 bits, for which a mantissa has no room with the bit below: the half is added with
// the scale.
RECALKV_DEVICE void dequantize_bytes(uint32_t (&pairs)[8], const unsigned char* codes,
                                     uint32_t scale) {
  constexpr uint32_t kExponent = kOneBits + ((10 - kElementScale) << 10);
  constexpr uint32_t kCenter = 0x8000u + kExponent + (1u << 7);  // -(1024 + 128)
  constexpr uint32_t kHalf = kOneBits - ((kElementScale + 1) << 10);
  const uint32_t half = multiply_pairs(kHalf | kHalf << 16, scale);
  const uint32_t* words = reinterpret_cast<const uint32_t*>(codes);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const uint32_t value = i % 2 ? bytes_below<2>(words[i / 2], kExponent >> 8)
                                 : bytes_below<0>(words[i / 2], kExponent >> 8);
    pairs[i] = multiply_add_pairs(add_pairs(value, kCenter | kCenter << 16), scale, half);
  }
}

// What a lane needs of its token to dequantize it: offsets into shared memory, and from a slot to
// the four words of its row.
struct CodedTile {
  int codes;
  int scales;
  int words[4];
};

// Dequantize blocks until one has another number of bits; `block` is the next in the table.
template <int kLow, int kHigh>
RECALKV_DEVICE void open_run(const unsigned char* memory, const CodedTile& tile,
                             unsigned char*& slot, const BandBlock*& next, BandBlock& block) {
#pragma unroll 1
  while (block.bits == kLow + kHigh) {
    const uint32_t scale = scale_of_byte(memory[tile.scales + block.scale]);
    const unsigned char* low = memory + (tile.codes + block.low);
    const unsigned char* high = memory + (tile.codes + block.high);
    block = *++next;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t pairs[8];
      if (kLow == 8) {
        dequantize_bytes(pairs, low + 16 * half, scale);
      } else {
        dequantize<kLow % 8, kHigh>(pairs, low + 2 * kLow * half, high + 2 * kHigh * half, scale);
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t* word = pairs + 4 * i;
        *reinterpret_cast<uint4*>(slot + tile.words[2 * half + i]) = {word[0], word[1], word[2],
                                                                      word[3]};
      }
    }
    slot += kSlotBytes;
  }
}

// Dequantize a list of blocks into the slots that follow. The host sorts lists by bits, but for
// blocks of one kind that have to come first.
RECALKV_DEVICE void open_blocks(const unsigned char* memory, const CodedTile& tile,
                                unsigned char* slot, const BandBlock* next) {
  BandBlock block = *next;
#pragma unroll 1
  while (block.bits) {
    open_run<8, 0>(memory, tile, slot, next, block);
    open_run<4, 2>(memory, tile, slot, next, block);
    open_run<4, 0>(memory, tile, slot, next, block);
    open_run<2, 1>(memory, tile, slot, next, block);
    open_run<2, 0>(memory, tile, slot, next, block);
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
    product(Float16{}, keys, a, b, add || i > 0);
  }
  slots = slots.at(kCount * kSlotBytes);
  factor = factor.at(kCount * S::kHeadDim * 64);
}

// Start keys = latents factor^T of a tile's first `k_blocks` slots.
template <typename S>
RECALKV_DEVICE void start_keys(float (&keys)[S::kHeadDim / 2], NarrowOperand slots,
                               NarrowOperand factor, int k_blocks) {
  product_fence();
  int i = 0;
#pragma unroll 1
  for (; i < k_blocks % 4; ++i) multiply_slots<S, 1>(keys, slots, factor, i > 0);
#pragma unroll 1
  for (; i < k_blocks; i += 4) multiply_slots<S, 4>(keys, slots, factor, i > 0);
  product_commit();
}

}  // namespace recalkv
