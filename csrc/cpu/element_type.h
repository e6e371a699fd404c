// Types of the elements of tensors.
#pragma once

namespace recalkv {

enum ElementType { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };
constexpr int kElementTypes = 3;

}  // namespace recalkv
