// What only Hopper has (sm_90a), as PTX: barriers in shared memory that copies arrive on, bulk
// copies, and asynchronous matrix products of a warpgroup (four warps).
//
// As with `primitives.cuh`, a host compiler gets another implementation of the same functions.
#pragma once

#include "primitives.cuh"

#ifndef __CUDACC__
#include "emulated_hopper.h"
#else

// For other architectures, kernels for Hopper are empty, and the host never starts them.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define RECALKV_HOPPER 1
#else
#define RECALKV_HOPPER 0
#endif

namespace recalkv {

RECALKV_DEVICE void warp_sync() { __syncwarp(); }

// A value that all lanes have, told to the compiler: it may use the registers that a warp shares.
RECALKV_DEVICE int uniform(int value) { return __shfl_sync(0xffffffffu, value, 0); }

RECALKV_DEVICE bool warp_any(bool value) { return __any_sync(0xffffffffu, value); }

// Registers per thread from here on, of the calling warpgroup: fewer, or more than the kernel was
// started with.
template <int kCount>
RECALKV_DEVICE void shrink_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
RECALKV_DEVICE void grow_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}

// A barrier's phase ends when `arrivals` have arrived and all bytes that it expects are there.
RECALKV_DEVICE void barrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
}

// After the last `barrier_init` and before the `block_sync` that makes barriers known to all.
RECALKV_DEVICE void barrier_init_done() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

RECALKV_DEVICE void barrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}

// Arrive, and have the phase wait for `bytes` more of `copy_bulk`.
RECALKV_DEVICE void barrier_expect(uint64_t* barrier, int bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}

// Wait until the phase of this parity has ended; the first phase has parity 0.
RECALKV_DEVICE void barrier_wait(uint64_t* barrier, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred ended;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 ended, [%0], %1;\n"
      "@!ended bra again;\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// Arrive once all of this thread's `copy_async` so far are complete.
RECALKV_DEVICE void copy_arrive(uint64_t* barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(barrier))
               : "memory");
}

// One thread's copy of many bytes, a multiple of 16, to shared memory.
RECALKV_DEVICE void copy_bulk(void* to, const void* from, int bytes, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared_address(to)),
      "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
}

// Descriptor of a right-hand operand b[k][n] that lies in shared memory as rows n of 64 elements k,
// 128 bytes, with 128-byte swizzle: 16-byte word i of row n is at i ^ n % 8. Aligned to 1024 bytes.
// Its lower half: the address in units of 16 bytes, to which a number of bytes may be added.
struct SwizzledOperand {
  uint32_t low;
  RECALKV_DEVICE SwizzledOperand at(int bytes) const { return {low + bytes / 16}; }
};

RECALKV_DEVICE SwizzledOperand swizzled_operand(const void* rows) {
  return {(shared_address(rows) & 0x3ffff) >> 4 | 1u << 16};
}

// Its upper half: from 8 rows to the next 8 there are 1024 bytes; 128-byte swizzle.
#define RECALKV_OPERAND_HIGH "0x40000040"

// Before a warpgroup's first product, and after registers of a product have been written otherwise.
RECALKV_DEVICE void product_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
RECALKV_DEVICE void product_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Descriptor of an operand that lies in shared memory as rows of 32 elements, 64 bytes, with
// 64-byte swizzle: 16-byte word i of row n is at i ^ n / 2 % 4. Aligned to 512 bytes. Its lower
// half.
struct NarrowOperand {
  uint32_t low;
  RECALKV_DEVICE NarrowOperand at(int bytes) const { return {low + bytes / 16}; }
};

RECALKV_DEVICE NarrowOperand narrow_operand(const void* rows) {
  return {(shared_address(rows) & 0x3ffff) >> 4 | 1u << 16};
}

RECALKV_DEVICE NarrowOperand uniform(NarrowOperand operand) {
  return {static_cast<uint32_t>(uniform(static_cast<int>(operand.low)))};
}

// Its upper half: from 8 rows to the next 8 there are 512 bytes; 64-byte swizzle.
#define RECALKV_NARROW_HIGH "0x80000020"

// What this thread has written to shared memory is there for products of a barrier's other side.
RECALKV_DEVICE void shared_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

#define RECALKV_ACC4(i) "+f"(sum[i]), "+f"(sum[i + 1]), "+f"(sum[i + 2]), "+f"(sum[i + 3])
#define RECALKV_ACC16(i) \
  RECALKV_ACC4(i), RECALKV_ACC4(i + 4), RECALKV_ACC4(i + 8), RECALKV_ACC4(i + 12)
#define RECALKV_ACC32 RECALKV_ACC16(0), RECALKV_ACC16(16)
#define RECALKV_ACC48 RECALKV_ACC32, RECALKV_ACC16(32)
#define RECALKV_ACC64 RECALKV_ACC48, RECALKV_ACC16(48)
#define RECALKV_LIST32                                                                         \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, " \
  "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define RECALKV_LIST48 \
  RECALKV_LIST32       \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define RECALKV_LIST64 \
  RECALKV_LIST48       \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// Wait until at most `kPending` committed groups of products are under way. `sum` is what they add
// to: named so that the compiler reads it after the wait.
template <int kPending, int kCount>
RECALKV_DEVICE void product_wait(float (&sum)[kCount]) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(sum[i])::"memory");
}

// Sums and products of pairs in float16, rounded once.
#define RECALKV_PAIRS(NAME, INSTRUCTION)                             \
  RECALKV_DEVICE uint32_t NAME(uint32_t a, uint32_t b) {             \
    uint32_t result;                                                 \
    asm(INSTRUCTION " %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b)); \
    return result;                                                   \
  }

RECALKV_PAIRS(add_pairs, "add.rn.f16x2")
RECALKV_PAIRS(multiply_pairs, "mul.rn.f16x2")

RECALKV_DEVICE uint32_t multiply_add_pairs(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t result;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
  return result;
}

// Two floats rounded to float16; what is too large becomes the largest one.
RECALKV_DEVICE uint32_t pack_finite(float low, float high) {
  uint32_t result;
  asm("cvt.rn.satfinite.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  return result;
}

// x cos - y sin and x sin + y cos of two pairs, in float16.
RECALKV_DEVICE void turn_pairs(uint32_t& x, uint32_t& y, uint32_t cos, uint32_t sin) {
  uint32_t turned;
  asm("{\n.reg .b32 other;\nmul.rn.f16x2 other, %1, %3;\nneg.f16x2 other, other;\n"
      "fma.rn.f16x2 %0, %4, %2, other;\n}"
      : "=r"(turned)
      : "r"(y), "r"(cos), "r"(sin), "r"(x));
  y = multiply_add_pairs(y, cos, multiply_pairs(x, sin));
  x = turned;
}

// (word & mask) | bits, as one instruction.
RECALKV_DEVICE uint32_t masked_or(uint32_t word, uint32_t mask, uint32_t bits) {
  uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(result) : "r"(word), "r"(mask), "r"(bits));
  return result;
}

// Bytes `kFirst` and `kFirst + 1` of a word, as halves.
template <int kFirst>
RECALKV_DEVICE uint32_t spread_bytes(uint32_t word) {
  return __byte_perm(word, 0, 0x4040 | kFirst | (kFirst + 1) << 8);
}

// Bytes `kFirst` and `kFirst + 1` of a word as the lower ones of halves whose upper one is `high`.
template <int kFirst>
RECALKV_DEVICE uint32_t bytes_below(uint32_t word, uint32_t high) {
  return __byte_perm(word, high, 0x4040 | kFirst | (kFirst + 1) << 8);
}

// 1 in float16.
constexpr uint32_t kOneBits = 0x3c00;

// A scale of a band's block, the upper byte of a half without sign, as a pair.
RECALKV_DEVICE uint32_t scale_of_byte(uint32_t byte) { return byte * 0x00800080u; }

// sum[64 x kColumns] (+)= a[64 x 16] b[16 x kColumns], asynchronously, by a warpgroup. A warp has
// 16 of the rows, in the fragments of mma.m16n8k16; `sum` holds those of 8 columns after the other.
// `sum` and `a` must not be touched before the wait; without `add`, `sum` need not be initialized.
#define RECALKV_PRODUCT(ELEMENT, TYPE, COLUMNS, COUNT, A0, A1, A2, A3, B, ADD)         \
  RECALKV_DEVICE void product(ELEMENT, float (&sum)[COUNT], const uint32_t (&a)[4],    \
                              SwizzledOperand b, bool add) {                           \
    asm volatile("{\n.reg .pred add;\n.reg .b64 b;\nsetp.ne.b32 add, %" ADD            \
                 ", 0;\n"                                                              \
                 "mov.b64 b, {%" B ", " RECALKV_OPERAND_HIGH                           \
                 "};\n"                                                                \
                 "wgmma.mma_async.sync.aligned.m64n" #COLUMNS "k16.f32." TYPE "." TYPE \
                 " {" RECALKV_LIST##COUNT "}, {%" A0 ", %" A1 ", %" A2 ", %" A3        \
                                          "}, b"                                       \
                                          ", add, 1, 1, 0;\n}"                         \
                 : RECALKV_ACC##COUNT                                                  \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b.low),             \
                   "r"(static_cast<int>(add)));                                        \
  }

// The same with both operands in shared memory, `a` as 64 rows.
#define RECALKV_SHARED_PRODUCT(ELEMENT, TYPE, COLUMNS, COUNT, A, B, ADD)                      \
  RECALKV_DEVICE void product(ELEMENT, float (&sum)[COUNT], NarrowOperand a, NarrowOperand b, \
                              bool add) {                                                     \
    asm volatile("{\n.reg .pred add;\n.reg .b64 a, b;\nsetp.ne.b32 add, %" ADD                \
                 ", 0;\n"                                                                     \
                 "mov.b64 a, {%" A ", " RECALKV_NARROW_HIGH "};\nmov.b64 b, {%" B             \
                 ", " RECALKV_NARROW_HIGH                                                     \
                 "};\n"                                                                       \
                 "wgmma.mma_async.sync.aligned.m64n" #COLUMNS "k16.f32." TYPE "." TYPE        \
                 " {" RECALKV_LIST##COUNT "}, a, b, add, 1, 1, 0, 0;\n}"                      \
                 : RECALKV_ACC##COUNT                                                         \
                 : "r"(a.low), "r"(b.low), "r"(static_cast<int>(add)));                       \
  }

RECALKV_SHARED_PRODUCT(Float16, "f16", 64, 32, "32", "33", "34")
RECALKV_SHARED_PRODUCT(Float16, "f16", 96, 48, "48", "49", "50")
RECALKV_SHARED_PRODUCT(Float16, "f16", 128, 64, "64", "65", "66")

RECALKV_PRODUCT(BFloat16, "bf16", 64, 32, "32", "33", "34", "35", "36", "37")
RECALKV_PRODUCT(BFloat16, "bf16", 96, 48, "48", "49", "50", "51", "52", "53")
RECALKV_PRODUCT(BFloat16, "bf16", 128, 64, "64", "65", "66", "67", "68", "69")
RECALKV_PRODUCT(Float16, "f16", 64, 32, "32", "33", "34", "35", "36", "37")
RECALKV_PRODUCT(Float16, "f16", 96, 48, "48", "49", "50", "51", "52", "53")
RECALKV_PRODUCT(Float16, "f16", 128, 64, "64", "65", "66", "67", "68", "69")

}  // namespace recalkv

#endif  // __CUDACC__
