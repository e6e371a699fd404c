// The few vector operations that the kernels need, for the instruction set that instantiate.h was
// included for.
#pragma once

#if RECALKV_AVX512
#include "simd_avx512.h"
#else
#include "simd_avx2.h"
#endif

namespace recalkv::RECALKV_ISA {

constexpr float kLog2E = 1.44269504f;

// 2^x for x <= 0 within 2 ulp: a polynomial of least relative error (9e-8) on [-0.5, 0.5], and a
// power of two. 2^-inf is 0.
RECALKV_INLINE Vec exp2(Vec x) {
  x = max(splat(kLeastPower), x);  // this order keeps NaN
  const Vec n = round(x);
  const Vec r = sub(x, n);
  Vec p = splat(0.001326472731f);
  p = fma(p, r, splat(0.009671512991f));
  p = fma(p, r, splat(0.05550733581f));
  p = fma(p, r, splat(0.2402224243f));
  p = fma(p, r, splat(0.6931470037f));
  return scale_by_power(fma(p, r, splat(1.0f)), n);
}

}  // namespace recalkv::RECALKV_ISA
