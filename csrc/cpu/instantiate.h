// All kernels of one instruction set, which the including file selects: its namespace RECALKV_ISA,
// RECALKV_AVX512, RECALKV_BF16_DOT, RECALKV_AMX, and #pragma GCC target. Own macros, because GCC 12
// does not define __AVX512F__ and the like for that pragma in C++.
#pragma once

#include "attend.h"
#include "dequantize.h"
#include "expansion.h"
#include "gather.h"
#include "kernels.h"
#include "prefetch.h"
#include "reconstruct.h"
#include "rows.h"
#include "value_up_tile.h"
#include "walk.h"

namespace recalkv::RECALKV_ISA {

template <class Format>
constexpr ElementKernels kElementKernels{
    attend_scratch_bytes<Format>,
    attend_task<Format>,
    value_up_scratch_bytes<Format>,
    {value_up<Format, Float32Source>, value_up<Format, Float16Source>,
     value_up<Format, BFloat16Source>},
};

#if RECALKV_BF16_DOT
constinit const Kernels kernels{kBFloat16, {{}, {}, kElementKernels<BFloat16Dot>}};
#else
constinit const Kernels kernels{
    kFloat32,
    {kElementKernels<Float32Dot<Float32Source> >, kElementKernels<Float32Dot<Float16Source> >,
     kElementKernels<Float32Dot<BFloat16Source> >},
};
#endif

}  // namespace recalkv::RECALKV_ISA
