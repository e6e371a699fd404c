// Which kernels this processor can run.
#pragma once

#include <string>
#include <string_view>

#include "kernels.h"

namespace recalkv {

// The name of the fastest instruction set for an element type, or an empty string.
std::string best_isa(ElementType type);

// Kernels of an instruction set, or null when unknown or not supported by the processor.
const Kernels* find_isa(std::string_view name);

// The same; throws a ValueError instead of returning null.
const Kernels& checked_isa(std::string_view name);

}  // namespace recalkv
