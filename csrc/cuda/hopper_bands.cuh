// Latents in bands (recalkv_vllm/band_format.py): from codes to operands.
//
// A lane takes 8 of a block's 32 columns, those from 8t on, of its two tokens. A register holds a
// pair of them, columns q and q + 4: as neighbors of the product's inner dimension, whose order is
// free, since the factor's columns are in the same order (ops/cuda/hopper_layout.py).
#pragma once

#include "hopper_primitives.cuh"
#include "hopper_shape.cuh"

namespace recalkv {

// One block of 32 columns, as the host describes it. Offsets are in bytes.
struct alignas(16) BandBlock {
  int32_t bits;
  int32_t low;    // of the plane of the lowest bits, in a row of the tile
  int32_t high;   // of the other plane
  int32_t place;  // of its scale among a token's; above 16 bits, 1 + its place in the V span, or 0
  RECALKV_DEVICE int scale() const { return place & 0xffff; }
  RECALKV_DEVICE int v_block() const { return (place >> 16) - 1; }
};

// What a block of threads reads: one row of `band_blocks`, blocks of the K span first, in its
// order.
struct BandTable {
  const int32_t* row;
  RECALKV_DEVICE int k_blocks() const { return row[0]; }
  RECALKV_DEVICE int all_blocks() const { return row[1]; }
  RECALKV_DEVICE const BandBlock* blocks() const {
    return reinterpret_cast<const BandBlock*>(row + 4);
  }
};

RECALKV_DEVICE BandTable band_table(const DecodeParams& p, int v_block, int kv_head) {
  const int64_t index = v_block * p.num_kv_heads + kv_head;
  return {p.band_blocks + index * (4 + 4 * p.most_blocks)};
}

// Where column `v` of a V span is in rows of values, and so in sums of them.
RECALKV_DEVICE int value_place(int v) {
  return v / 32 * 32 + v % 4 * 8 + v % 32 / 8 * 2 + v % 8 / 4;
}

// A lane's share of a block: operands of two products, [product][operand register]. Pair q of token
// i is register i + 2 (q % 2) of product q / 2.
using BlockOperands = uint32_t[2][4];
RECALKV_DEVICE uint32_t& pair_of(BlockOperands& operands, int token, int q) {
  return operands[q / 2][token + q % 2 * 2];
}

template <int kBits>
struct Bits {
  RECALKV_BOTH constexpr operator int() const { return kBits; }
};

// Eight codes of a plane of `kBits` bits, so that pair q starts at bit kBits · q of both halves.
template <int kBits>
RECALKV_DEVICE uint32_t load_plane(const unsigned char* block, int member) {
  if (kBits == 4) return reinterpret_cast<const uint32_t*>(block)[member];
  if (kBits == 2) {
    const uint32_t codes = reinterpret_cast<const uint16_t*>(block)[member];
    return codes | codes << 8;
  }
  const uint32_t codes = block[member];
  return codes | codes << 12;
}

// Bits of pair `q` of such a plane, moved to bit `kTo` of both halves, among those of `rest`.
template <int kBits, int kTo>
RECALKV_DEVICE uint32_t plane_bits(uint32_t plane, int q, uint32_t rest) {
  constexpr uint32_t kMask = ((1u << kBits) - 1) << kTo;
  const int shift = kTo - kBits * q;
  return masked_or(shift < 0 ? plane >> -shift : plane << shift, kMask | kMask << 16, rest);
}

// Four pairs of `kLow + kHigh` bits: code u becomes 2^bits + u by setting the exponent, and then
// (u + 1/2 - 2^(bits - 1)) scale, rounded once.
template <typename Element, int kLow, int kHigh>
RECALKV_DEVICE void dequantize(BlockOperands& operands, int token, const unsigned char* row,
                               const BandBlock& block, uint32_t scale, int member) {
  constexpr int kBits = kLow + kHigh;
  constexpr int kMantissa = mantissa_bits(Element{});
  constexpr int kTo = kMantissa - kBits;
  constexpr uint32_t kPower = one_bits(Element{}) + (kBits << kMantissa);
  constexpr float kCenter = static_cast<float>((1 << kBits) + (1 << (kBits - 1))) - 0.5f;
  const uint32_t center = pack<Element>(-kCenter, -kCenter);
  const uint32_t low = load_plane<kLow>(row + block.low, member);
  const uint32_t high = kHigh ? load_plane<kHigh>(row + block.high, member) : 0;
#pragma unroll
  for (int q = 0; q < 4; ++q) {
    uint32_t value = plane_bits<kLow, kTo>(low, q, kPower | kPower << 16);
    if (kHigh) value = plane_bits<kHigh, kTo + kLow>(high, q, value);
    pair_of(operands, token, q) = multiply_pairs<Element>(add_pairs<Element>(value, center), scale);
  }
}

// The same of 8 bits, for which an element's mantissa has no room: in float.
template <typename Element>
RECALKV_DEVICE void dequantize_bytes(BlockOperands& operands, int token, const unsigned char* row,
                                     const BandBlock& block, uint32_t scale, int member) {
  const uint32_t* codes = reinterpret_cast<const uint32_t*>(row + block.low) + 2 * member;
  const uint32_t low = codes[0];
  const uint32_t high = codes[1];
  const float factor = unpack<Element>(scale).x;
  const float center = (kByteOffset + 127.5f) * -factor;
#pragma unroll
  for (int q = 0; q < 4; ++q) {
    pair_of(operands, token, q) = pack<Element>(offset_byte(low, q) * factor + center,
                                                offset_byte(high, q) * factor + center);
  }
}

// What a lane needs of a tile to dequantize its two tokens: offsets into shared memory.
struct CodedTile {
  uint32_t codes[2];
  uint32_t scales[2];
  uint32_t values;  // its place in the warp's rows of values
};

// A block's operands, which are also values if the V span has them.
template <typename S>
RECALKV_DEVICE void open_block(BlockOperands& operands, unsigned char* memory,
                               const CodedTile& tile, const BandBlock& block, int member) {
  using Element = typename S::Element;
  uint32_t scale[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    scale[i] = scale_of_byte<Element>(memory[tile.scales[i] + block.scale()]);
  }
  const auto planes = [&](auto low, auto high) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      dequantize<Element, low, high>(operands, i, memory + tile.codes[i], block, scale[i], member);
    }
  };
  if (block.bits == 4) {
    planes(Bits<4>{}, Bits<0>{});
  } else if (block.bits == 3) {
    planes(Bits<2>{}, Bits<1>{});
  } else if (block.bits == 6) {
    planes(Bits<4>{}, Bits<2>{});
  } else if (block.bits == 2) {
    planes(Bits<2>{}, Bits<0>{});
  } else {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      dequantize_bytes<Element>(operands, i, memory + tile.codes[i], block, scale[i], member);
    }
  }
  if (block.v_block() < 0) return;
  uint32_t* to = reinterpret_cast<uint32_t*>(memory + tile.values + block.v_block() * 64);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int q = 0; q < 4; ++q) to[i * 2 * S::kValueRowBytes + q * 4] = pair_of(operands, i, q);
  }
}

// keys = latents factor^T of the first `k_blocks` blocks, and the values of all.
template <typename S>
RECALKV_DEVICE void reconstruct_coded(float (&keys)[S::kHeadDim / 2], unsigned char* memory,
                                      const CodedTile& tile, const BandBlock* blocks, int k_blocks,
                                      int all_blocks, SwizzledOperand factor, int member) {
  using Element = typename S::Element;
  BlockOperands operands[2];  // of the block at hand, and of products that may be under way
#pragma unroll 1
  for (int first = 0; first < k_blocks; first += 2) {
#pragma unroll
    for (int turn = 0; turn < 2; ++turn) {
      const int i = first + turn;
      if (i >= k_blocks) break;
      product_wait_some<1>();
      open_block<S>(operands[turn], memory, tile, blocks[i], member);
      product_fence();
      const SwizzledOperand b = factor.at(turn * 64);
      product(Element{}, keys, operands[turn][0], b, i > 0);
      product(Element{}, keys, operands[turn][1], b.at(32), true);
      product_commit();
    }
    factor = factor.at(S::kHeadDim * 128);
  }
  product_wait<0>(keys);
#pragma unroll 1
  for (int i = k_blocks; i < all_blocks; ++i) {
    open_block<S>(operands[0], memory, tile, blocks[i], member);
  }
  warp_sync();  // values are there
}

}  // namespace recalkv
