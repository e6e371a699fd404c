// The instruction sets that there are kernels for, and what this processor has of them.
#include "isa.h"

#include <c10/util/Exception.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <vector>

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

// Linux gives tile registers to a process that asks for them, once.
bool may_use_tiles() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // arch_prctl(2)
  static const bool allowed = [] {
    if (syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0) return true;
    TORCH_WARN("The processor has AMX, but this process may not use it (arch_prctl: ",
               std::strerror(errno), "); kernels use the next best instruction set.");
    return false;
  }();
  return allowed;
}

bool has_amx_bf16() {
  return has_avx512_bf16() && __builtin_cpu_supports("amx-tile") &&
         __builtin_cpu_supports("amx-bf16") && may_use_tiles();
}

std::vector<InstructionSet>& fastest_first() {
  static std::vector<InstructionSet> sets{
      {"amx_bf16", has_amx_bf16, &amx_bf16::kernels},
      {"avx512_bf16", has_avx512_bf16, &avx512_bf16::kernels},
      {"avx512", has_avx512, &avx512::kernels},
      {"avx2", has_avx2, &avx2::kernels},
  };
  return sets;
}

}  // namespace

void add_isa(const InstructionSet& set) { fastest_first().push_back(set); }

std::vector<std::string> instruction_sets(ElementType type) {
  std::vector<std::string> names;
  for (const InstructionSet& set : fastest_first())
    if (set.supported() && set.kernels->of[type].attend) names.push_back(set.name);
  return names;
}

const Kernels& checked_isa(std::string_view name) {
  for (const InstructionSet& set : fastest_first())
    if (name == set.name && set.supported()) return *set.kernels;
  TORCH_CHECK_VALUE(false, "isa: expected one that this processor supports, found ", name);
}

}  // namespace recalkv
