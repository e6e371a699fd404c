#pragma GCC target("avx512bf16,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#define RECALKV_ISA avx512_bf16
#define RECALKV_AVX512 1
#define RECALKV_BF16_DOT 1
#include "kernels.h"

namespace recalkv {

using avx512_bf16::BFloat16Dot;
using avx512_bf16::BFloat16Source;
using avx512_bf16::Float16Source;
using avx512_bf16::Float32Source;
using avx512_bf16::value_up;

extern const Kernels kernels_avx512_bf16{
    avx512_bf16::scratch_bytes<BFloat16Dot>,
    {nullptr, nullptr, avx512_bf16::run_task<BFloat16Dot>},
    avx512_bf16::value_up_scratch_bytes<BFloat16Dot>,
    {{},
     {},
     {value_up<BFloat16Dot, Float32Source>, value_up<BFloat16Dot, Float16Source>,
      value_up<BFloat16Dot, BFloat16Source>}},
};

}  // namespace recalkv
