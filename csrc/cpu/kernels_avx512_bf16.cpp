#pragma GCC target("avx512bf16,avx512vbmi,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#define RECALKV_ISA avx512_bf16
#define RECALKV_AVX512 1
#define RECALKV_BF16_DOT 1
#define RECALKV_AMX 0
#include "instantiate.h"
