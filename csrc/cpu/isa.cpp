// The instruction sets that there are kernels for, and what this processor has of them.
#include "isa.h"

#include <c10/util/Exception.h>

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

bool has_avx512_bf16() {
  return has_avx512() && __builtin_cpu_supports("avx512bf16") &&
         __builtin_cpu_supports("avx512vbmi");
}

struct Entry {
  const char* name;
  bool (*supported)();
  const Kernels* kernels;
};

constexpr Entry kFastestFirst[] = {
    {"avx512_bf16", has_avx512_bf16, &avx512_bf16::kernels},
    {"avx512", has_avx512, &avx512::kernels},
    {"avx2", has_avx2, &avx2::kernels},
};

}  // namespace

std::string best_isa(ElementType type) {
  for (const Entry& entry : kFastestFirst)
    if (entry.supported() && entry.kernels->of[type].attend) return entry.name;
  return "";
}

const Kernels* find_isa(std::string_view name) {
  for (const Entry& entry : kFastestFirst)
    if (name == entry.name) return entry.supported() ? entry.kernels : nullptr;
  return nullptr;
}

const Kernels& checked_isa(std::string_view name) {
  const Kernels* kernels = find_isa(name);
  TORCH_CHECK_VALUE(kernels, "isa: expected one that this processor supports, found ", name);
  return *kernels;
}

}  // namespace recalkv
