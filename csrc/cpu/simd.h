// The few vector operations that the kernels need, for the instruction set that instantiate.h was
// included for.
#pragma once

#if RECALKV_AVX512
#include "simd_avx512.h"
#else
#include "simd_avx2.h"
#endif

namespace recalkv::RECALKV_ISA {

// exp(x) for x <= 0 within 2 ulp (Cephes' expf: argument reduction by ln 2, degree-5 polynomial).
RECALKV_INLINE Vec exp(Vec x) {
  x = max(splat(-87.0f), x);  // this order keeps NaN
  const Vec n = round(mul(x, splat(1.44269504f)));
  Vec r = fnma(n, splat(0.693359375f), x);
  r = fnma(n, splat(-2.12194440e-4f), r);
  Vec p = splat(1.9875691500e-4f);
  p = fma(p, r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  p = add(fma(p, mul(r, r), r), splat(1.0f));
  return scale_by_power(p, n);
}

}  // namespace recalkv::RECALKV_ISA
