// The few machine operations that the kernels are written in, as PTX (sm_80 and later).
//
// Kernels use nothing else of CUDA. A host compiler gets `emulated_primitives.h` instead, found on
// its include path, which must offer the same functions; that is how the kernels are tested where
// there is no GPU.
#pragma once

#ifndef __CUDACC__
#include "emulated_primitives.h"
#else

#include <cuda_runtime.h>

#include <cstdint>

#define RECALKV_DEVICE __device__ __forceinline__
#define RECALKV_KERNEL __global__
#define RECALKV_LAUNCH_BOUNDS(threads) __launch_bounds__(threads, 1)

namespace recalkv {

struct BFloat16 {};
struct Float16 {};

RECALKV_DEVICE int thread_index() { return threadIdx.x; }
RECALKV_DEVICE int thread_count() { return blockDim.x; }
RECALKV_DEVICE int block_x() { return blockIdx.x; }
RECALKV_DEVICE int block_y() { return blockIdx.y; }
// What is made of it is not what is held from before.
RECALKV_DEVICE int block_x_anew() {
  int x;
  asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(x));
  return x;
}

RECALKV_DEVICE unsigned char* shared_memory() {
  extern __shared__ __align__(1024) unsigned char recalkv_shared[];
  return recalkv_shared;
}

RECALKV_DEVICE uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

RECALKV_DEVICE void block_sync() { __syncthreads(); }

// Barrier of `threads` threads (whole warps); `id` is 1 to 15.
RECALKV_DEVICE void team_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

RECALKV_DEVICE int64_t shuffle(int64_t value, int lane) {
  return __shfl_sync(0xffffffffu, static_cast<long long>(value), lane);
}

RECALKV_DEVICE float shuffle_xor(float value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

// Asynchronous copy of 16 bytes to shared memory; zeros, and nothing read, if not `live`.
RECALKV_DEVICE void copy_async(void* to, const void* from, bool live) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)),
               "l"(__cvta_generic_to_global(from)), "r"(live ? 16 : 0)
               : "memory");
}

RECALKV_DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Wait until at most `kPending` of this thread's latest groups are under way.
template <int kPending>
RECALKV_DEVICE void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8x8 matrices of 16-bit elements; lane i gives the address of row i % 8 of matrix i / 8.
RECALKV_DEVICE void load_matrices(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}

// The same, each matrix transposed.
RECALKV_DEVICE void load_matrices_transposed(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}

// Transpose of an 8x8 matrix of 16-bit elements held by the warp, two per lane.
RECALKV_DEVICE uint32_t transpose_matrix(uint32_t value) {
  uint32_t result;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(value));
  return result;
}

// sum += a[16x16] b[16x8], float32 accumulation.
template <typename Element>
RECALKV_DEVICE void multiply_add(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <>
RECALKV_DEVICE void multiply_add<BFloat16>(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0,
                                           uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
RECALKV_DEVICE void multiply_add<Float16>(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0,
                                          uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Two floats rounded to 16 bits each, `low` in the lower half.
template <typename Element>
RECALKV_DEVICE uint32_t pack(float low, float high);

template <>
RECALKV_DEVICE uint32_t pack<BFloat16>(float low, float high) {
  uint32_t result;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  return result;
}

template <>
RECALKV_DEVICE uint32_t pack<Float16>(float low, float high) {
  uint32_t result;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  return result;
}

// The inverse of `pack`: x is the lower half.
template <typename Element>
RECALKV_DEVICE float2 unpack(uint32_t value);

template <>
RECALKV_DEVICE float2 unpack<BFloat16>(uint32_t value) {
  return {__uint_as_float(value << 16), __uint_as_float(value & 0xffff0000u)};
}

template <>
RECALKV_DEVICE float2 unpack<Float16>(uint32_t value) {
  float2 result;
  asm("{ .reg .f16 low, high; mov.b32 {low, high}, %2; cvt.f32.f16 %0, low; cvt.f32.f16 %1, high; }"
      : "=f"(result.x), "=f"(result.y)
      : "r"(value));
  return result;
}

RECALKV_DEVICE float exp2_fast(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

RECALKV_DEVICE float log2_fast(float x) { return __log2f(x); }
RECALKV_DEVICE float reciprocal_fast(float x) { return __frcp_rn(x); }

// Start a kernel; returns null, or what went wrong.
template <typename Params>
const char* launch(void (*kernel)(Params), int grid_x, int grid_y, int threads, int shared_bytes,
                   void* stream, const Params& params) {
  const void* function = reinterpret_cast<const void*>(kernel);
  cudaError_t error = cudaSuccess;
  if (shared_bytes > 48 * 1024) {
    error =
        cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  }
  if (error == cudaSuccess) {
    void* arguments[] = {const_cast<Params*>(&params)};
    error = cudaLaunchKernel(function, dim3(grid_x, grid_y), dim3(threads), arguments, shared_bytes,
                             static_cast<cudaStream_t>(stream));
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace recalkv

#endif  // __CUDACC__
