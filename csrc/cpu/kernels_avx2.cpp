#pragma GCC target("avx2,fma,f16c")
#define RECALKV_ISA avx2
#define RECALKV_AVX512 0
#define RECALKV_BF16_DOT 0
#define RECALKV_AMX 0
#include "instantiate.h"
