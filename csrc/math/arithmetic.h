// What a formula may ask of its arithmetic type. The formulas of csrc/math are templates over V, and V is a
// double or float on the host, a CUDA thread's float or double, or a SIMD vector (csrc/cpu/simd.h specialises
// Arithmetic).
#pragma once

#include <cmath>
#include <limits>

#if defined(__CUDACC__)
#define REFINE_EXT_INLINE __host__ __device__ __forceinline__
#else
// always_inline: the same template is compiled for several instruction sets, and no out-of-line copy may be
// shared.
#define REFINE_EXT_INLINE inline __attribute__((always_inline))
#endif

namespace refine_ext {

template <class V>
struct Arithmetic {
  using Scalar = V;
  using Mask = bool;
  static REFINE_EXT_INLINE V splat(double value) { return static_cast<V>(value); }
  static REFINE_EXT_INLINE V select(Mask mask, V yes, V no) { return mask ? yes : no; }
  static REFINE_EXT_INLINE V exp(V x) { return ::exp(x); }
  static REFINE_EXT_INLINE V expm1(V x) { return ::expm1(x); }
  static REFINE_EXT_INLINE V log(V x) { return ::log(x); }
  static REFINE_EXT_INLINE V log1p(V x) { return ::log1p(x); }
  static REFINE_EXT_INLINE V sqrt(V x) { return ::sqrt(x); }
  // e^x and e^x - 1 together, for vector code to share one polynomial; x below the overflow of e^x.
  static REFINE_EXT_INLINE void exp_and_expm1(V x, V& e, V& em1) {
    e = exp(x);
    em1 = expm1(x);
  }
};

template <>
struct Arithmetic<float> {
  using Scalar = float;
  using Mask = bool;
  static REFINE_EXT_INLINE float splat(double value) { return static_cast<float>(value); }
  static REFINE_EXT_INLINE float select(Mask mask, float yes, float no) { return mask ? yes : no; }
  static REFINE_EXT_INLINE float exp(float x) { return ::expf(x); }
  static REFINE_EXT_INLINE float expm1(float x) { return ::expm1f(x); }
  static REFINE_EXT_INLINE float log(float x) { return ::logf(x); }
  static REFINE_EXT_INLINE float log1p(float x) { return ::log1pf(x); }
  static REFINE_EXT_INLINE float sqrt(float x) { return ::sqrtf(x); }
  static REFINE_EXT_INLINE void exp_and_expm1(float x, float& e, float& em1) {
    e = exp(x);
    em1 = expm1(x);
  }
};

}  // namespace refine_ext
