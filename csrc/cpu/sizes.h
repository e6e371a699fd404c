// Sizes that the driver, the packed tables and the per-ISA kernels agree on.
#pragma once

#include <cstdint>

namespace recalkv {

// Cached tokens of one tile. Rotation tables and KV splits are aligned to it.
constexpr int kTile = 64;
// Query rows of one KV head that are scored against a tile at once.
constexpr int kRowBlock = 48;

// Low-frequency rotation pairs may be expanded: over a stretch of kStretch positions, their cosines
// and sines are combinations of kTerms functions, so that their share of the scores needs no keys;
// see expansion.h.
constexpr int kTerms = 4;
constexpr int kStretch = 128;

// A dot-product operand is made of 32-bit units: one float, or two neighboring bf16.
using Unit = uint32_t;

}  // namespace recalkv
