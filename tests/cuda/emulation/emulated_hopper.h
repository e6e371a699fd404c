// csrc/cuda/hopper_primitives.cuh on the host, after the PTX ISA: "mbarrier", "cp.async.bulk",
// "Asynchronous Warpgroup Level Matrix Instructions".
//
// Made to catch mistakes, as `emulated_primitives.h` is: registers of a product read as NaN until
// it is waited for, and writing them is an error, as are a missing fence, descriptors that the
// warps of a warpgroup do not share, barriers that nobody initialized, and more arrivals than a
// barrier takes. Copies and products happen as late or as early as they may.
#pragma once

#include "emulated_primitives.h"

#define RECALKV_HOPPER 1

namespace recalkv {

namespace emulation {

constexpr uint64_t kBarrierMark = 0x5eed0ba44e4d0bedull;
constexpr uint32_t kPoison = 0x7fc0dead;
// Shared addresses of the emulation start here.
constexpr uint32_t kWindow = 1024;

inline SharedBarrier& barrier_at(uint64_t* barrier) {
  auto& machine = Machine::get();
  const auto found = machine.shared_barriers.find(barrier);
  if (found == machine.shared_barriers.end()) machine.fail("a barrier that nobody initialized");
  if (*barrier != kBarrierMark) machine.fail("a barrier that was overwritten");
  return found->second;
}

inline void end_phase_if_complete(SharedBarrier& barrier) {
  if (barrier.phase.arrived == barrier.phase.threads && barrier.bytes == 0) {
    barrier.phase.arrived = 0;
    ++barrier.phase.generation;
  }
}

inline void arrive(uint64_t* at, int64_t bytes) {
  SharedBarrier& barrier = barrier_at(at);
  barrier.bytes += bytes;
  if (++barrier.phase.arrived > barrier.phase.threads) {
    Machine::get().fail("more arrivals than a barrier's phase takes");
  }
  end_phase_if_complete(barrier);
}

inline uint32_t shared_offset(const void* pointer) {
  const auto* base = reinterpret_cast<const char*>(Machine::get().shared.data());
  return static_cast<uint32_t>(static_cast<const char*>(pointer) - base) + kWindow;
}

// Element (n, k) of an operand in shared memory whose rows n hold k: k-major, swizzled by 32, 64 or
// 128 bytes (layout types 3, 2, 1). The swizzle is one of address bits.
inline uint16_t operand_element(uint64_t descriptor, int n, int k) {
  Machine& machine = Machine::get();
  const uint32_t start = (descriptor & 0x3fff) << 4;
  const uint32_t eight_rows = (descriptor >> 32 & 0x3fff) << 4;
  const int type = static_cast<int>(descriptor >> 62);
  if (type == 0 || (descriptor >> 49 & 7) != 0) machine.fail("a descriptor that is not emulated");
  const uint32_t row_bytes = 256u >> type;
  uint32_t address = start + n % 8 * row_bytes + n / 8 * eight_rows + k * 2;
  address ^= (address >> 7 & (row_bytes / 16 - 1)) << 4;
  const auto* base = reinterpret_cast<const char*>(machine.shared.data());
  const int64_t offset = static_cast<int64_t>(address) - kWindow;
  const int64_t size = machine.shared.size() * sizeof(uint4) - Machine::kCanary;
  if (offset < 0 || offset + 2 > size) machine.fail("an operand outside of shared memory");
  uint16_t element;
  std::memcpy(&element, base + offset, 2);
  return element;
}

template <typename Element>
void multiply(const Product& product, float (*totals)[128]) {
  float left[16][16];
  for (int row = 0; row < 16 && !product.in_registers; ++row) {
    for (int k = 0; k < 16; ++k) {
      left[row][k] = decode<Element>(operand_element(product.shared_a, product.first_row + row, k));
    }
  }
  for (int lane = 0; lane < 32 && product.in_registers; ++lane) {
    for (int i = 0; i < 8; ++i) {
      const int row = lane / 4 + i / 2 % 2 * 8;
      const int k = lane % 4 * 2 + i % 2 + i / 4 * 8;
      left[row][k] = decode<Element>(half_of(product.a_values[lane][i / 2], i % 2));
    }
  }
  for (int n = 0; n < product.columns; ++n) {
    float right[16];
    for (int k = 0; k < 16; ++k) right[k] = decode<Element>(operand_element(product.b, n, k));
    for (int row = 0; row < 16; ++row) {
      float total = product.add ? totals[row][n] : 0.0f;
      for (int k = 0; k < 16; ++k) total += left[row][k] * right[k];
      totals[row][n] = total;
    }
  }
}

// Where a lane's register `i` of a sum lies: row, column.
inline float& sum_at(float (*totals)[128], int lane, int i) {
  return totals[lane / 4 + i / 2 % 2 * 8][i / 4 * 8 + lane % 4 * 2 + i % 2];
}

inline float (*totals_of(Warp& warp, float* sum))[128] {
  return reinterpret_cast<float (*)[128]>(warp.sums[sum].data());
}

inline void perform(Warp& warp, const Product& product) {
  for (int lane = 0; lane < 32; ++lane) {
    if (product.in_registers && std::memcmp(product.a[lane], product.a_values[lane], 16)) {
      Machine::get().fail("registers of a product were written before it ended");
    }
  }
  product.multiply(product, totals_of(warp, product.sum[0]));
}

// Hand a sum that no product adds to any more back to the lanes.
inline void release(Warp& warp, const Product& last) {
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < last.columns / 2; ++i) {
      if (as_bits(last.sum[lane][i]) != kPoison) {
        Machine::get().fail("a sum was written before its products ended");
      }
      last.sum[lane][i] = sum_at(totals_of(warp, last.sum[0]), lane, i);
    }
  }
  warp.sums.erase(last.sum[0]);
}

inline void wait_products(Warp& warp, size_t pending) {
  auto& groups = warp.products;
  while (groups.size() > pending + 1) {  // the open group is not waited for
    const std::vector<Product> group = groups.front();
    groups.erase(groups.begin());
    for (size_t i = 0; i < group.size(); ++i) {
      if (!Machine::get().early_copies) perform(warp, group[i]);
      const auto adds = [&](const Product& later) { return later.sum[0] == group[i].sum[0]; };
      bool last = std::none_of(group.begin() + i + 1, group.end(), adds);
      for (const auto& other : groups)
        last = last && std::none_of(other.begin(), other.end(), adds);
      if (last) release(warp, group[i]);
    }
  }
  if (groups.size() <= 1) warp.fenced = false;
}

template <typename T>
T* pointer_of(const uint32_t* words) {
  return reinterpret_cast<T*>(words[0] | static_cast<uintptr_t>(words[1]) << 32);
}

// `a` is a fragment of registers, or null and `shared_a` a descriptor.
template <typename Element, int kCount>
void product(float (&sum)[kCount], const uint32_t* a, uint64_t shared_a, uint64_t b, bool add) {
  const auto to = reinterpret_cast<uintptr_t>(sum);
  const auto from = reinterpret_cast<uintptr_t>(a);
  uint32_t in[13] = {static_cast<uint32_t>(to),
                     static_cast<uint32_t>(to >> 32),
                     static_cast<uint32_t>(from),
                     static_cast<uint32_t>(from >> 32),
                     static_cast<uint32_t>(shared_a),
                     static_cast<uint32_t>(shared_a >> 32),
                     static_cast<uint32_t>(b),
                     static_cast<uint32_t>(b >> 32),
                     add};
  if (a) std::copy(a, a + 4, in + 9);
  Machine::get().exchange("wgmma", in, 13, [](Warp& warp) {
    Machine& machine = Machine::get();
    if (!warp.fenced) machine.fail("a product without a fence");
    Product product;
    product.columns = 2 * kCount;
    product.multiply = multiply<Element>;
    product.in_registers = pointer_of<const uint32_t>(warp.in[0] + 2) != nullptr;
    product.shared_a = warp.in[0][4] | static_cast<uint64_t>(warp.in[0][5]) << 32;
    product.b = warp.in[0][6] | static_cast<uint64_t>(warp.in[0][7]) << 32;
    product.add = warp.in[0][8];
    const int index = static_cast<int>(&warp - machine.warps.data());
    product.first_row = index % 4 * 16;
    for (int other = index / 4 * 4; other < index / 4 * 4 + 4 && !product.in_registers; ++other) {
      if (!warp.known || machine.warps[other].times_known < warp.times_known) {
        machine.fail("an operand that products do not know yet");
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      const uint32_t* words = warp.in[lane];
      if (!std::equal(words + 4, words + 9, warp.in[0] + 4)) {
        machine.fail("lanes of a warp with different products");
      }
      product.sum[lane] = pointer_of<float>(words);
      product.a[lane] = pointer_of<const uint32_t>(words + 2);
      std::copy(words + 9, words + 13, product.a_values[lane]);
    }
    if (warp.sums.find(product.sum[0]) == warp.sums.end()) {
      warp.sums[product.sum[0]].resize(16 * 128);
      for (int lane = 0; lane < 32; ++lane) {
        for (int i = 0; i < kCount; ++i) {
          sum_at(totals_of(warp, product.sum[0]), lane, i) = product.sum[lane][i];
          product.sum[lane][i] = as_float(kPoison);
        }
      }
    }
    warp.operands.push_back(product.b);
    if (warp.products.empty()) warp.products.emplace_back();
    warp.products.back().push_back(product);
    if (machine.early_copies) perform(warp, product);
  });
}

}  // namespace emulation

inline void warp_sync() {
  emulation::Machine::get().exchange("syncwarp", nullptr, 0, [](emulation::Warp&) {});
}

inline int uniform(int value) { return value; }

inline bool warp_any(bool value) {
  const uint32_t in[1] = {value};
  return emulation::Machine::get().exchange("vote", in, 1, [](emulation::Warp& warp) {
    uint32_t any = 0;
    for (int i = 0; i < 32; ++i) any |= warp.in[i][0];
    for (int i = 0; i < 32; ++i) warp.out[i][0] = any;
  })[0];
}

template <int kCount>
inline void shrink_registers() {
  emulation::Machine::get().own_registers(kCount);
}
template <int kCount>
inline void grow_registers() {
  emulation::Machine::get().own_registers(kCount);
}

inline void barrier_init(uint64_t* barrier, int arrivals) {
  auto& machine = emulation::Machine::get();
  if (reinterpret_cast<uintptr_t>(barrier) % 8) machine.fail("barrier_init: a misaligned barrier");
  machine.shared_barriers[barrier].phase.threads = arrivals;
  *barrier = emulation::kBarrierMark;
}

inline void barrier_init_done() {}

inline void barrier_arrive(uint64_t* barrier) { emulation::arrive(barrier, 0); }
inline void barrier_expect(uint64_t* barrier, int bytes) { emulation::arrive(barrier, bytes); }

inline void barrier_wait(uint64_t* at, int parity) {
  auto& machine = emulation::Machine::get();
  emulation::SharedBarrier& barrier = emulation::barrier_at(at);
  machine.warps[machine.current / 32].known = false;
  if (barrier.phase.generation % 2 != parity) return;
  auto& lane = machine.lanes[machine.current];
  lane.blocked = &barrier.phase;
  lane.blocked_generation = barrier.phase.generation;
  machine.yield();
  lane.blocked = nullptr;
}

inline void copy_arrive(uint64_t* barrier) {
  auto& machine = emulation::Machine::get();
  std::vector<emulation::Copy> copies;
  for (auto& group : machine.lanes[machine.current].copies) {
    copies.insert(copies.end(), group.begin(), group.end());
    group.clear();
  }
  machine.hand_over([&machine, copies, barrier]() {
    for (const auto& copy : copies) machine.perform(copy);
    emulation::arrive(barrier, 0);
  });
}

inline void copy_bulk(void* to, const void* from, int bytes, uint64_t* barrier) {
  auto& machine = emulation::Machine::get();
  machine.check_shared(to);
  machine.check_shared(static_cast<char*>(to) + bytes - 16);
  if (bytes % 16 || reinterpret_cast<uintptr_t>(from) % 16) {
    machine.fail("copy_bulk: a misaligned copy");
  }
  machine.hand_over([to, from, bytes, barrier]() {
    std::memcpy(to, from, static_cast<size_t>(bytes));
    emulation::SharedBarrier& done = emulation::barrier_at(barrier);
    done.bytes -= bytes;
    emulation::end_phase_if_complete(done);
  });
}

struct NarrowOperand {
  uint64_t descriptor;
  NarrowOperand at(int bytes) const { return {descriptor + bytes / 16}; }
};

inline NarrowOperand narrow_operand(const void* rows) {
  const uint64_t start = emulation::shared_offset(rows);
  if (start % 512) emulation::Machine::get().fail("a misaligned operand");
  return {2ull << 62 | (512ull >> 4) << 32 | 1ull << 16 | (start & 0x3ffff) >> 4};
}

inline NarrowOperand uniform(NarrowOperand operand) { return operand; }

// Until a warp's next wait for a barrier, after which it writes operands anew.
inline void shared_fence() {
  emulation::Machine::get().exchange("fence.proxy.async", nullptr, 0, [](emulation::Warp& warp) {
    warp.known = true;
    ++warp.times_known;
  });
}

struct SwizzledOperand {
  uint64_t descriptor;
  SwizzledOperand at(int bytes) const { return {descriptor + bytes / 16}; }
};

inline SwizzledOperand swizzled_operand(const void* rows) {
  const uint64_t start = emulation::shared_offset(rows);
  if (start % 1024) emulation::Machine::get().fail("a misaligned operand");
  return {1ull << 62 | (1024ull >> 4) << 32 | 1ull << 16 | (start & 0x3ffff) >> 4};
}

inline void product_fence() {
  auto& machine = emulation::Machine::get();
  machine.exchange("wgmma.fence", nullptr, 0, [](emulation::Warp& warp) { warp.fenced = true; });
}

inline void product_commit() {
  auto& machine = emulation::Machine::get();
  machine.exchange("wgmma.commit", nullptr, 0, [](emulation::Warp& warp) {
    if (warp.products.empty()) warp.products.emplace_back();
    warp.products.emplace_back();
  });
}

template <int kPending, int kCount>
inline void product_wait(float (&)[kCount]) {
  emulation::Machine::get().exchange("wgmma.wait", nullptr, 0, [](emulation::Warp& warp) {
    emulation::wait_products(warp, kPending);
  });
}

inline uint32_t add_pairs(uint32_t a, uint32_t b) {
  const float2 left = unpack<Float16>(a), right = unpack<Float16>(b);
  return pack<Float16>(left.x + right.x, left.y + right.y);
}

inline uint32_t multiply_pairs(uint32_t a, uint32_t b) {
  const float2 left = unpack<Float16>(a), right = unpack<Float16>(b);
  return pack<Float16>(left.x * right.x, left.y * right.y);
}

inline uint32_t multiply_add_pairs(uint32_t a, uint32_t b, uint32_t c) {
  const float2 left = unpack<Float16>(a), right = unpack<Float16>(b), more = unpack<Float16>(c);
  return pack<Float16>(std::fma(left.x, right.x, more.x), std::fma(left.y, right.y, more.y));
}

inline uint32_t pack_finite(float low, float high) {
  constexpr float kLargest = 65504.0f;
  const auto finite = [](float x) {
    return x > kLargest ? kLargest : x < -kLargest ? -kLargest : x;
  };
  return pack<Float16>(finite(low), finite(high));
}

inline void turn_pairs(uint32_t& x, uint32_t& y, uint32_t cos, uint32_t sin) {
  const uint32_t other = multiply_pairs(y, sin) ^ 0x80008000u;
  const uint32_t turned = multiply_add_pairs(x, cos, other);
  y = multiply_add_pairs(y, cos, multiply_pairs(x, sin));
  x = turned;
}

template <int kFirst>
inline uint32_t spread_bytes(uint32_t word) {
  return (word >> 8 * kFirst & 0xff) | (word >> 8 * (kFirst + 1) & 0xff) << 16;
}

inline uint32_t masked_or(uint32_t word, uint32_t mask, uint32_t bits) {
  return (word & mask) | bits;
}

template <int kFirst>
inline uint32_t bytes_below(uint32_t word, uint32_t high) {
  word >>= 8 * kFirst;
  return (word & 0xff) | (word >> 8 & 0xff) << 16 | high * 0x01000100u;
}

constexpr uint32_t kOneBits = 0x3c00;
inline uint32_t scale_of_byte(uint32_t byte) { return byte * 0x00800080u; }

#define RECALKV_EMULATED_PRODUCTS(ELEMENT)                                                         \
  template <int kCount>                                                                            \
  inline void product(ELEMENT, float (&sum)[kCount], const uint32_t (&a)[4], SwizzledOperand b,    \
                      bool add) {                                                                  \
    emulation::product<ELEMENT>(sum, a, 0, b.descriptor, add);                                     \
  }                                                                                                \
  template <int kCount>                                                                            \
  inline void product(ELEMENT, float (&sum)[kCount], NarrowOperand a, NarrowOperand b, bool add) { \
    emulation::product<ELEMENT>(sum, nullptr, a.descriptor, b.descriptor, add);                    \
  }

RECALKV_EMULATED_PRODUCTS(BFloat16)
RECALKV_EMULATED_PRODUCTS(Float16)

}  // namespace recalkv
