// csrc/cuda/primitives.cuh on the host: every CUDA thread is a fiber, warp-wide instructions
// exchange registers between lanes with the fragment layouts of the PTX ISA (sections "Matrix
// Fragments for mma.m16n8k16", "ldmatrix" and "movmatrix").
//
// Made to catch mistakes: shared memory starts as NaN, writes past it, misaligned vector accesses,
// lanes that disagree on the next warp-wide instruction, deadlocks and copies nobody waited for are
// errors. Asynchronous copies happen as late or as early as they may, warps run in any order, each
// as far as it can before another one gets its turn.
#pragma once

#include <dlfcn.h>
#include <ucontext.h>
#include <algorithm>
#include <cmath>
#include <csetjmp>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#define RECALKV_DEVICE inline
#define RECALKV_KERNEL
#define RECALKV_LAUNCH_BOUNDS(threads)

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

namespace recalkv {

struct BFloat16 {};
struct Float16 {};

namespace emulation {

struct Copy {
  void* to;
  const void* from;
  bool live;
};

struct Barrier {
  int arrived = 0;
  int threads = 0;
  int generation = 0;
};

// Of `emulated_hopper.h`: a barrier in shared memory, and products of a warp's rows.
struct SharedBarrier {
  Barrier phase;  // `threads`: arrivals of a phase; `generation`: phases that have ended
  int64_t bytes = 0;
};

struct Product {
  float* sum[32];
  const uint32_t* a[32];
  uint32_t a_values[32][4];
  int columns;
  bool in_registers;  // the left-hand operand; else `shared_a` describes it
  uint64_t shared_a;
  int first_row;  // of the warp
  uint64_t b;
  bool add;
  void (*multiply)(const Product&, float (*totals)[128]);
};

struct Warp {
  const char* operation = nullptr;
  int arrived = 0;
  int generation = 0;
  uint32_t in[32][16];
  uint32_t out[32][4];
  std::vector<std::vector<Product>> products;  // groups; the last one is open
  std::map<float*, std::vector<float>> sums;   // by lane 0's registers: [16][128] in flight
  std::vector<uint64_t> operands;              // of all products so far
  bool fenced = false;
  bool known = false;  // to products: what the warp has written to shared memory
  int times_known = 0;
  int registers = 0;  // of a thread
};

// What another engine than the threads does: at once, or when nothing else can go on.
struct Delivery {
  int thread;
  std::function<void()> perform;
};

struct Lane {
  ucontext_t context;
  jmp_buf resume;
  bool started = false;
  bool done = false;
  const Barrier* blocked = nullptr;
  int blocked_generation = 0;
  std::vector<std::vector<Copy>> copies;  // groups; the last one is open
};

struct Machine {
  static constexpr size_t kStack = 256 * 1024;
  static constexpr size_t kCanary = 4096;
  static constexpr int kBarriers = 16;
  static constexpr int kRegisters = 65536;  // of a multiprocessor
  // Told of launches in place of running them: the kernel's symbol, grid, threads, bytes of shared
  // memory, and the parameters.
  using Observer = void (*)(const char*, int, int, int, int, const void*, int);
  Observer observer = nullptr;
  // How the next launches run.
  bool early_copies = false;
  uint32_t seed = 0;
  // The running block.
  std::vector<std::unique_ptr<char[]>> stacks;
  std::vector<Lane> lanes;
  std::vector<Warp> warps;
  Barrier barriers[kBarriers];
  std::vector<uint4> shared;
  std::map<const void*, SharedBarrier> shared_barriers;
  std::vector<Delivery> deliveries;
  int free_registers = 0;  // of a thread of each warp, that warps gave back
  Barrier freed;           // `generation`: times that one did
  int current = 0;
  int block_x = 0;
  int block_y = 0;
  void (*body)(const void*) = nullptr;
  const void* params = nullptr;
  ucontext_t scheduler_context;
  jmp_buf scheduler;
  std::string error;

  static Machine& get() {
    static Machine machine;
    return machine;
  }

  [[noreturn]] void leave() { _longjmp(scheduler, 1); }

  [[noreturn]] void fail(const std::string& what) {
    char where[96];
    std::snprintf(where, sizeof where, " (block %d, %d, thread %d)", block_x, block_y, current);
    error = what + where;
    leave();
  }

  // Let other lanes run; returns when this one is picked again.
  void yield() {
    if (_setjmp(lanes[current].resume) == 0) leave();
  }

  static void enter() {
    Machine& machine = get();
    machine.body(machine.params);
    Lane& lane = machine.lanes[machine.current];
    for (const auto& group : lane.copies) {
      if (!group.empty()) machine.fail("a thread ended with copies under way");
    }
    for (const auto& delivery : machine.deliveries) {
      if (delivery.thread == machine.current) machine.fail("a thread ended with copies under way");
    }
    for (const auto& group : machine.warps[machine.current / 32].products) {
      if (!group.empty()) machine.fail("a thread ended with products under way");
    }
    lane.done = true;
    machine.leave();
  }

  // Run `index` until it yields, blocks, ends or fails.
  void resume(int index) {
    current = index;
    if (_setjmp(scheduler) == 0) {
      Lane& lane = lanes[index];
      if (lane.started) _longjmp(lane.resume, 1);
      lane.started = true;
      swapcontext(&scheduler_context, &lane.context);
    }
  }

  bool runnable(const Lane& lane) const {
    return !lane.done && (!lane.blocked || lane.blocked->generation != lane.blocked_generation);
  }

  // Run a warp until all its lanes have ended or wait for another warp. Returns whether it moved.
  bool run_warp(int warp) {
    bool moved = false;
    for (bool any = true; any && error.empty();) {
      any = false;
      for (int i = 0; i < 32 && error.empty(); ++i) {
        if (runnable(lanes[warp * 32 + i])) {
          resume(warp * 32 + i);
          any = moved = true;
        }
      }
    }
    return moved;
  }

  void run_block(int threads, int shared_bytes) {
    while (stacks.size() < static_cast<size_t>(threads)) {
      stacks.emplace_back(new char[kStack]);
    }
    lanes = std::vector<Lane>(threads);
    warps = std::vector<Warp>(threads / 32);
    for (Warp& warp : warps) warp.registers = std::min(255, kRegisters / threads / 8 * 8);
    std::fill(std::begin(barriers), std::end(barriers), Barrier{});
    shared_barriers.clear();
    deliveries.clear();
    free_registers = 0;
    shared.resize((shared_bytes + kCanary) / sizeof(uint4));
    std::memset(shared.data(), 0xff, shared.size() * sizeof(uint4));
    for (int i = 0; i < threads; ++i) {
      getcontext(&lanes[i].context);
      lanes[i].context.uc_stack.ss_sp = stacks[i].get();
      lanes[i].context.uc_stack.ss_size = kStack;
      lanes[i].context.uc_link = nullptr;
      lanes[i].copies.resize(1);
      makecontext(&lanes[i].context, enter, 0);
    }
    std::vector<int> order(warps.size());
    for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int>(i);
    uint32_t state = seed * 2654435761u + 12345u;
    for (bool moved = true; moved && error.empty();) {
      for (size_t i = order.size(); i > 1; --i) {
        state = state * 1664525u + 1013904223u;
        std::swap(order[i - 1], order[(state >> 16) % i]);
      }
      moved = false;
      for (int warp : order) {
        moved = run_warp(warp) || moved;
        if (!error.empty()) return;
      }
      if (!moved && !deliveries.empty()) {
        state = state * 1664525u + 1013904223u;
        deliver((state >> 16) % deliveries.size());
        moved = true;
      }
    }
    if (!error.empty()) return;
    for (const Lane& lane : lanes) {
      if (!lane.done) error = "deadlock: a thread never ends";
    }
    for (size_t i = 0; i < warps.size(); ++i) {
      if (warps[i].operands != warps[i / 4 * 4].operands) {
        error = "warps of a warpgroup with different products";
      }
    }
    const auto* bytes = reinterpret_cast<const unsigned char*>(shared.data());
    for (size_t i = shared_bytes; i < shared_bytes + kCanary; ++i) {
      if (bytes[i] != 0xff) error = "a write past the end of shared memory";
    }
  }

  void wait(Barrier& barrier, int threads) {
    if (barrier.arrived == 0) barrier.threads = threads;
    if (barrier.threads != threads) fail("a barrier with two counts of threads");
    if (++barrier.arrived == threads) {
      barrier.arrived = 0;
      ++barrier.generation;
      return;
    }
    Lane& lane = lanes[current];
    lane.blocked = &barrier;
    lane.blocked_generation = barrier.generation;
    yield();
    lane.blocked = nullptr;
  }

  // Have the lane's warp own `count` registers a thread, of those that the block was started with.
  void own_registers(int count) {
    Warp& warp = warps[current / 32];
    while (count - warp.registers > free_registers) {
      Lane& lane = lanes[current];
      lane.blocked = &freed;
      lane.blocked_generation = freed.generation;
      yield();
      lane.blocked = nullptr;
    }
    if (warp.registers == count) return;  // another lane was first
    free_registers += warp.registers - count;
    warp.registers = count;
    ++freed.generation;
  }

  // Hand in this lane's registers; the last lane of the warp runs `complete`, which fills `out`.
  template <typename Complete>
  const uint32_t* exchange(const char* operation, const uint32_t* in, int count,
                           Complete complete) {
    Warp& warp = warps[current / 32];
    const int lane = current % 32;
    if (warp.arrived == 0) warp.operation = operation;
    if (warp.operation != operation) {
      fail(std::string("lanes of a warp at ") + warp.operation + " and " + operation);
    }
    std::copy(in, in + count, warp.in[lane]);
    const int generation = warp.generation;
    if (++warp.arrived == 32) {
      complete(warp);
      warp.arrived = 0;
      ++warp.generation;
    } else {
      while (warp.generation == generation) yield();
    }
    return warp.out[lane];
  }

  void deliver(size_t index) {
    const Delivery delivery = deliveries[index];
    deliveries.erase(deliveries.begin() + static_cast<std::ptrdiff_t>(index));
    delivery.perform();
  }

  // Has `perform` happen some time: now, or when the machine comes to rest.
  void hand_over(std::function<void()> perform) {
    deliveries.push_back({current, std::move(perform)});
    if (early_copies) deliver(deliveries.size() - 1);
  }

  void perform(const Copy& copy) {
    if (copy.live) {
      std::memcpy(copy.to, copy.from, 16);
    } else {
      std::memset(copy.to, 0, 16);
    }
  }

  void check_shared(const void* pointer) {
    const auto* start = reinterpret_cast<const char*>(shared.data());
    const auto* at = static_cast<const char*>(pointer);
    if (at < start || at + 16 > start + shared.size() * sizeof(uint4) - kCanary) {
      fail("an address outside of shared memory");
    }
    if (reinterpret_cast<uintptr_t>(pointer) % 16) fail("a misaligned address in shared memory");
  }
};

inline float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline uint32_t as_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

template <typename Element>
inline float decode(uint16_t bits);

template <>
inline float decode<BFloat16>(uint16_t bits) {
  return as_float(static_cast<uint32_t>(bits) << 16);
}

template <>
inline float decode<Float16>(uint16_t bits) {
  _Float16 value;
  std::memcpy(&value, &bits, 2);
  return static_cast<float>(value);
}

template <typename Element>
inline uint16_t encode(float value);

template <>
inline uint16_t encode<BFloat16>(float value) {
  const uint32_t bits = as_bits(value);
  if (value != value) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

template <>
inline uint16_t encode<Float16>(float value) {
  const _Float16 rounded = static_cast<_Float16>(value);
  uint16_t bits;
  std::memcpy(&bits, &rounded, 2);
  return bits;
}

inline uint16_t half_of(uint32_t word, int index) {
  return static_cast<uint16_t>(index ? word >> 16 : word);
}

// ldmatrix: thread i of every four has elements 2(i%4), 2(i%4) + 1 of row i/4, of each matrix.
inline void load_matrices(uint32_t (&to)[4], const void* row, bool transposed) {
  Machine& machine = Machine::get();
  machine.check_shared(row);
  machine.warps[machine.current / 32].fenced = false;  // it writes registers
  const auto address = reinterpret_cast<uintptr_t>(row);
  const uint32_t in[2] = {static_cast<uint32_t>(address), static_cast<uint32_t>(address >> 32)};
  const uint32_t* out =
      machine.exchange(transposed ? "ldmatrix.trans" : "ldmatrix", in, 2, [&](Warp& warp) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      uint16_t elements[8][8];
      for (int r = 0; r < 8; ++r) {
        const uint32_t* low = warp.in[matrix * 8 + r];
        const uintptr_t from = low[0] | static_cast<uintptr_t>(low[1]) << 32;
        std::memcpy(elements[r], reinterpret_cast<const void*>(from), 16);
      }
      for (int lane = 0; lane < 32; ++lane) {
        const int r = lane / 4;
        const int c = lane % 4 * 2;
        const uint32_t first = transposed ? elements[c][r] : elements[r][c];
        const uint32_t second = transposed ? elements[c + 1][r] : elements[r][c + 1];
        warp.out[lane][matrix] = first | second << 16;
      }
    }
  });
  std::copy(out, out + 4, to);
}

}  // namespace emulation

inline int thread_index() { return emulation::Machine::get().current; }
inline int thread_count() { return static_cast<int>(emulation::Machine::get().lanes.size()); }
inline int block_x() { return emulation::Machine::get().block_x; }
inline int block_x_anew() { return block_x(); }
inline int block_y() { return emulation::Machine::get().block_y; }

inline unsigned char* shared_memory() {
  return reinterpret_cast<unsigned char*>(emulation::Machine::get().shared.data());
}

inline void team_sync(int id, int threads) {
  auto& machine = emulation::Machine::get();
  if (id < 1 || id >= machine.kBarriers || threads % 32) machine.fail("team_sync: bad barrier");
  machine.wait(machine.barriers[id], threads);
}

inline void block_sync() {
  auto& machine = emulation::Machine::get();
  machine.wait(machine.barriers[0], thread_count());
}

inline int64_t shuffle(int64_t value, int lane) {
  const uint32_t in[3] = {static_cast<uint32_t>(value), static_cast<uint32_t>(value >> 32),
                          static_cast<uint32_t>(lane)};
  const uint32_t* out =
      emulation::Machine::get().exchange("shuffle", in, 3, [](emulation::Warp& warp) {
    for (int i = 0; i < 32; ++i) {
      std::copy(warp.in[warp.in[i][2] % 32], warp.in[warp.in[i][2] % 32] + 2, warp.out[i]);
    }
  });
  return static_cast<int64_t>(out[0] | static_cast<uint64_t>(out[1]) << 32);
}

inline float shuffle_xor(float value, int mask) {
  const uint32_t in[1] = {emulation::as_bits(value)};
  const uint32_t* out =
      emulation::Machine::get().exchange("shuffle_xor", in, 1, [mask](emulation::Warp& warp) {
    for (int i = 0; i < 32; ++i) warp.out[i][0] = warp.in[i ^ mask][0];
  });
  return emulation::as_float(out[0]);
}

inline void copy_async(void* to, const void* from, bool live) {
  auto& machine = emulation::Machine::get();
  machine.check_shared(to);
  if (reinterpret_cast<uintptr_t>(from) % 16) machine.fail("copy_async: a misaligned source");
  const emulation::Copy copy{to, from, live};
  if (machine.early_copies) {
    machine.perform(copy);
  } else {
    machine.lanes[machine.current].copies.back().push_back(copy);
  }
}

inline void copy_commit() {
  auto& machine = emulation::Machine::get();
  machine.lanes[machine.current].copies.emplace_back();
}

template <int kPending>
inline void copy_wait() {
  auto& machine = emulation::Machine::get();
  auto& copies = machine.lanes[machine.current].copies;
  while (copies.size() > kPending + 1) {  // the open group is not waited for
    for (const auto& copy : copies.front()) machine.perform(copy);
    copies.erase(copies.begin());
  }
  for (size_t i = machine.deliveries.size(); kPending == 0 && i-- > 0;) {
    if (machine.deliveries[i].thread == machine.current) machine.deliver(i);
  }
}

inline void load_matrices(uint32_t (&to)[4], const void* row) {
  emulation::load_matrices(to, row, false);
}

inline void load_matrices_transposed(uint32_t (&to)[4], const void* row) {
  emulation::load_matrices(to, row, true);
}

inline uint32_t transpose_matrix(uint32_t value) {
  const uint32_t* out =
      emulation::Machine::get().exchange("movmatrix", &value, 1, [](emulation::Warp& warp) {
    for (int lane = 0; lane < 32; ++lane) {
      const int row = lane / 4;
      uint32_t word = 0;
      for (int i = 0; i < 2; ++i) {
        const int column = lane % 4 * 2 + i;
        const uint32_t element = emulation::half_of(warp.in[column * 4 + row / 2][0], row % 2);
        word |= element << (16 * i);
      }
      warp.out[lane][0] = word;
    }
  });
  return *out;
}

template <typename Element>
inline void multiply_add(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  uint32_t in[10] = {a[0], a[1], a[2], a[3], b0, b1};
  for (int i = 0; i < 4; ++i) in[6 + i] = emulation::as_bits(sum[i]);
  const uint32_t* out =
      emulation::Machine::get().exchange("mma", in, 10, [](emulation::Warp& warp) {
    float left[16][16], right[8][16];
    for (int lane = 0; lane < 32; ++lane) {
      const int group = lane / 4;
      const int member = lane % 4;
      for (int i = 0; i < 8; ++i) {  // a0..a7
        const int row = group + (i / 2 % 2) * 8;
        const int k = member * 2 + i % 2 + i / 4 * 8;
        left[row][k] = emulation::decode<Element>(emulation::half_of(warp.in[lane][i / 2], i % 2));
      }
      for (int i = 0; i < 4; ++i) {  // b0..b3
        const int k = member * 2 + i % 2 + i / 2 * 8;
        right[group][k] =
            emulation::decode<Element>(emulation::half_of(warp.in[lane][4 + i / 2], i % 2));
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < 4; ++i) {  // c0..c3
        const float* row = left[lane / 4 + i / 2 * 8];
        const float* column = right[lane % 4 * 2 + i % 2];
        float total = emulation::as_float(warp.in[lane][6 + i]);
        for (int k = 0; k < 16; ++k) total += row[k] * column[k];
        warp.out[lane][i] = emulation::as_bits(total);
      }
    }
  });
  for (int i = 0; i < 4; ++i) sum[i] = emulation::as_float(out[i]);
}

template <typename Element>
inline uint32_t pack(float low, float high) {
  const uint32_t upper = emulation::encode<Element>(high);
  return emulation::encode<Element>(low) | upper << 16;
}

template <typename Element>
inline float2 unpack(uint32_t value) {
  return {emulation::decode<Element>(emulation::half_of(value, 0)),
          emulation::decode<Element>(emulation::half_of(value, 1))};
}

inline float exp2_fast(float x) { return std::exp2(x); }
inline float log2_fast(float x) { return std::log2(x); }
inline float reciprocal_fast(float x) { return 1.0f / x; }
using std::fmaxf;

template <typename Params>
const char* launch(void (*kernel)(Params), int grid_x, int grid_y, int threads, int shared_bytes,
                   void*, const Params& params) {
  auto& machine = emulation::Machine::get();
  if (machine.observer) {
    Dl_info symbol;
    if (!dladdr(reinterpret_cast<void*>(kernel), &symbol)) return "a kernel without a symbol";
    machine.observer(symbol.dli_sname, grid_x, grid_y, threads, shared_bytes, &params,
                     sizeof(params));
    return nullptr;
  }
  static void (*running)(Params);
  running = kernel;
  machine.body = [](const void* p) { running(*static_cast<const Params*>(p)); };
  machine.params = &params;
  machine.error.clear();
  for (int i = 0; i < grid_x * grid_y && machine.error.empty(); ++i) {
    const int block = machine.seed % 2 ? grid_x * grid_y - 1 - i : i;
    machine.block_x = block % grid_x;
    machine.block_y = block / grid_x;
    machine.run_block(threads, shared_bytes);
  }
  return machine.error.empty() ? nullptr : machine.error.c_str();
}

}  // namespace recalkv
