// Which kernels this processor can run.
#pragma once

#include <string>

#include "attention.h"

namespace recalkv {

// The name of the fastest instruction set for an element type, or an empty string.
std::string best_isa(Element element);

// Kernels of an instruction set, or null when unknown or not supported by the processor.
const Kernels* find_isa(const std::string& name);

}  // namespace recalkv
