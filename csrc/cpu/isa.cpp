#include "isa.h"

namespace recalkv {
namespace {

bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }

struct Entry {
  const char* name;
  bool (*supported)();
  const Kernels* kernels;
};

constexpr Entry kFastestFirst[] = {
    {"avx512_bf16", has_avx512_bf16, &kernels_avx512_bf16},
    {"avx512", has_avx512, &kernels_avx512},
    {"avx2", has_avx2, &kernels_avx2},
};

}  // namespace

std::string best_isa(Element element) {
  for (const Entry& entry : kFastestFirst)
    if (entry.supported() && entry.kernels->run[element]) return entry.name;
  return "";
}

const Kernels* find_isa(const std::string& name) {
  for (const Entry& entry : kFastestFirst)
    if (name == entry.name) return entry.supported() ? entry.kernels : nullptr;
  return nullptr;
}

}  // namespace recalkv
