// Sizes that the driver, the packed tables and the per-ISA kernels agree on.
#pragma once

#include <cstdint>

namespace recalkv {

// Cached tokens of one tile. Rotation tables and KV splits are aligned to it.
constexpr int kTile = 64;
// Query rows of one KV head that are scored against a tile at once.
constexpr int kRowBlock = 48;

// Low-frequency rotation pairs may be expanded: over a tile, and over a stretch of tiles for the
// lowest of them, their cosines and sines are combinations of few functions, so that their share of
// the scores needs no keys; see expansion.h. A stretch has kTerms functions, a tile a multiple.
constexpr int kTerms = 4;
constexpr int kStretch = 512;
// Expansions of a layer, of which a task takes the cheapest.
constexpr int kExpansions = 2;

// A dot-product operand is made of 32-bit units: one float, or two neighboring bf16.
using Unit = uint32_t;

}  // namespace recalkv
