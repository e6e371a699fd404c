// Which kernels this processor can run.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "kernels.h"

namespace recalkv {

struct InstructionSet {
  std::string name;
  bool (*supported)();
  const Kernels* kernels;
};

// Names of the instruction sets of this processor with kernels for an element type, fastest first.
std::vector<std::string> instruction_sets(ElementType type);

// Kernels of an instruction set; throws a ValueError where the processor does not support it.
const Kernels& checked_isa(std::string_view name);

// Adds one behind all others, such as a model of one that the processor lacks.
void add_isa(const InstructionSet& set);

}  // namespace recalkv
