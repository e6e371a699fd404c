#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#define RECALKV_ISA avx512
#define RECALKV_AVX512 1
#define RECALKV_BF16_DOT 0
#include "kernels.h"

namespace recalkv {
namespace {

using avx512::BFloat16Source;
using avx512::Float16Source;
using avx512::Float32Source;
using avx512::value_up;
using Float32 = avx512::Float32Dot<Float32Source>;
using Float16 = avx512::Float32Dot<Float16Source>;
using BFloat16 = avx512::Float32Dot<BFloat16Source>;

}  // namespace

extern const Kernels kernels_avx512{
    avx512::scratch_bytes<Float32>,
    {avx512::run_task<Float32>, avx512::run_task<Float16>, avx512::run_task<BFloat16>},
    avx512::value_up_scratch_bytes<Float32>,
    {{value_up<Float32, Float32Source>, value_up<Float32, Float16Source>,
      value_up<Float32, BFloat16Source>},
     {value_up<Float16, Float32Source>, value_up<Float16, Float16Source>,
      value_up<Float16, BFloat16Source>},
     {value_up<BFloat16, Float32Source>, value_up<BFloat16, Float16Source>,
      value_up<BFloat16, BFloat16Source>}},
};

}  // namespace recalkv
