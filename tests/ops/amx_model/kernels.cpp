// The kernels for tile registers with the model of them, as instruction set MODEL_NAME.
#pragma GCC target("avx512bf16,avx512vbmi,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#define RECALKV_ISA amx_bf16_model
#define RECALKV_AVX512 1
#define RECALKV_BF16_DOT 1
#define RECALKV_AMX 1
#define RECALKV_AMX_MODEL 1
#include "instantiate.h"
#include "isa.h"

namespace recalkv {

static const bool added = [] {
  add_isa({MODEL_NAME, [] { return true; }, &amx_bf16_model::kernels});
  return true;
}();

}  // namespace recalkv
