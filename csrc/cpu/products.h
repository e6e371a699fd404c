// How the kernels of this instruction set multiply matrices.
#pragma once

#if RECALKV_AMX
#include "amx_product.h"
#else
#include "product.h"
#endif

namespace recalkv::RECALKV_ISA {

#if RECALKV_AMX
using Products = TileProducts;
#else
using Products = RegisterProducts;
#endif

}  // namespace recalkv::RECALKV_ISA
