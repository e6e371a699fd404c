#pragma GCC target("avx2,fma,f16c")
#define RECALKV_ISA avx2
#define RECALKV_AVX512 0
#define RECALKV_BF16_DOT 0
#include "kernels.h"

namespace recalkv {
namespace {

using avx2::BFloat16Source;
using avx2::Float16Source;
using avx2::Float32Source;
using avx2::value_up;
using Float32 = avx2::Float32Dot<Float32Source>;
using Float16 = avx2::Float32Dot<Float16Source>;
using BFloat16 = avx2::Float32Dot<BFloat16Source>;

}  // namespace

extern const Kernels kernels_avx2{
    avx2::scratch_bytes<Float32>,
    {avx2::run_task<Float32>, avx2::run_task<Float16>, avx2::run_task<BFloat16>},
    avx2::value_up_scratch_bytes<Float32>,
    {{value_up<Float32, Float32Source>, value_up<Float32, Float16Source>,
      value_up<Float32, BFloat16Source>},
     {value_up<Float16, Float32Source>, value_up<Float16, Float16Source>,
      value_up<Float16, BFloat16Source>},
     {value_up<BFloat16, Float32Source>, value_up<BFloat16, Float16Source>,
      value_up<BFloat16, BFloat16Source>}},
};

}  // namespace recalkv
