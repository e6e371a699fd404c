// Small kernels that use each of Hopper's operations, and ones that misuse them: what the emulation
// must compute, and what it must find.
#include <string>

#include "hopper_primitives.cuh"

namespace recalkv {
namespace {

struct Call {
  const uint16_t* a;  // [64, 32]
  const uint16_t* b;  // [64 columns n, 64]: rows of k, already swizzled
  float* sum;         // [64, 64]
  const char* mistake;
  bool makes(const char* name) const { return std::string(name) == mistake; }
};

// sum = a b^T over 32 columns, b brought by a bulk copy, by a warpgroup of 128 threads.
void product_kernel(const Call call) {
  unsigned char* memory = shared_memory();
  auto* barrier = reinterpret_cast<uint64_t*>(memory + 8192);
  const int thread = thread_index(), lane = thread % 32, warp = thread / 32;
  if (thread == 0) {
    if (!call.makes("no barrier")) barrier_init(barrier, 1);
    barrier_init_done();
  }
  if (call.makes("registers that are nobody's")) grow_registers<256>();
  block_sync();
  if (thread == 0) {
    barrier_expect(barrier, call.makes("bytes that never come") ? 8192 + 16 : 8192);
    if (call.makes("an arrival too many")) barrier_arrive(barrier);
    copy_bulk(memory + (call.makes("a misaligned copy") ? 8 : 0), call.b, 8192, barrier);
  }
  if (!call.makes("no wait for the copy"))
    barrier_wait(barrier, call.makes("a wrong parity") ? 1 : 0);
  uint32_t a[2][4];
  for (int k = 0; k < 2; ++k) {
    for (int i = 0; i < 4; ++i) {
      const int row = warp * 16 + lane / 4 + i % 2 * 8;
      const int column = k * 16 + lane % 4 * 2 + i / 2 * 8;
      a[k][i] = call.a[row * 32 + column] | static_cast<uint32_t>(call.a[row * 32 + column + 1])
                                                << 16;
    }
  }
  float sum[32];
  SwizzledOperand b = swizzled_operand(memory);
  if (call.makes("an operand outside")) b = b.at(1 << 16);
  if (call.makes("warps at odds") && warp == 3) b = b.at(64);
  if (!call.makes("no fence")) product_fence();
  for (int k = 0; k < 2; ++k) product(BFloat16{}, sum, a[k], b.at(k * 32), k > 0);
  if (!call.makes("no commit")) product_commit();
  if (call.makes("an operand overwritten")) a[1][0] ^= 1;
  if (call.makes("a sum overwritten")) sum[5] = 0.0f;
  if (!call.makes("no wait for the product")) product_wait<0>(sum);
  for (int i = 0; i < 32; ++i) {
    const int row = warp * 16 + lane / 4 + i / 2 % 2 * 8;
    call.sum[row * 64 + i / 4 * 8 + lane % 4 * 2 + i % 2] = sum[i];
  }
}

// The same with both operands in slots of shared memory, `b` as [64, 32], that its warps write.
void shared_product_kernel(const Call call) {
  unsigned char* memory = shared_memory();
  const int lane = thread_index() % 32, warp = thread_index() / 32;
  for (int i = lane; i < 16 * 32; i += 32) {
    const int row = warp * 16 + i / 32, column = i % 32;
    const int place = row * 32 + (column / 8 ^ row / 2 % 4) * 8 + column % 8;
    reinterpret_cast<uint16_t*>(memory)[place] = call.a[row * 32 + column];
    reinterpret_cast<uint16_t*>(memory + 4096)[place] = call.b[row * 32 + column];
  }
  if (!call.makes("no fence of shared memory")) shared_fence();
  if (!call.makes("no meeting")) team_sync(1, 128);
  const NarrowOperand a = narrow_operand(memory);
  const NarrowOperand b = narrow_operand(memory + (call.makes("a misaligned operand") ? 16 : 4096));
  float sum[32];
  product_fence();
  for (int k = 0; k < 2; ++k) product(BFloat16{}, sum, a.at(k * 32), b.at(k * 32), k > 0);
  product_commit();
  product_wait<0>(sum);
  for (int i = 0; i < 32; ++i) {
    const int row = warp * 16 + lane / 4 + i / 2 % 2 * 8;
    call.sum[row * 64 + i / 4 * 8 + lane % 4 * 2 + i % 2] = sum[i];
  }
}

}  // namespace
}  // namespace recalkv

// Null, or what the emulation found.
extern "C" const char* recalkv_product(const uint16_t* a, const uint16_t* b, float* sum,
                                       const char* mistake, int early) {
  recalkv::emulation::Machine::get().early_copies = early != 0;
  const recalkv::Call call = {a, b, sum, mistake};
  return recalkv::launch(recalkv::product_kernel, 1, 1, 128, 8192 + 16, nullptr, call);
}

extern "C" const char* recalkv_shared_product(const uint16_t* a, const uint16_t* b, float* sum,
                                              const char* mistake, int early) {
  recalkv::emulation::Machine::get().early_copies = early != 0;
  const recalkv::Call call = {a, b, sum, mistake};
  return recalkv::launch(recalkv::shared_product_kernel, 1, 1, 128, 8192, nullptr, call);
}
