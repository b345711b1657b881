// What a formula may ask of its arithmetic type. The formulas of csrc/math are templates over V, and V is a
// double or float on the host, a CUDA thread's float or double, or a SIMD vector (csrc/cpu/simd.h specialises
// Arithmetic).
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

#if defined(__CUDACC__)
#define REFINE_EXT_INLINE __host__ __device__ __forceinline__
#else
// always_inline: the same template is compiled for several instruction sets, and no out-of-line copy may be
// shared.
#define REFINE_EXT_INLINE inline __attribute__((always_inline))
#endif

namespace refine_ext {

// a / b, rounded up.
REFINE_EXT_INLINE constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

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
  // For x in [0, 1]; apart from log1p, since vector code has a shorter way.
  static REFINE_EXT_INLINE V log1p_unit(V x) { return ::log1p(x); }
  static REFINE_EXT_INLINE V sqrt(V x) { return ::sqrt(x); }
  // Apart from a division, since a GPU has instructions for them.
  static REFINE_EXT_INLINE V reciprocal(V x) { return V(1) / x; }
  static REFINE_EXT_INLINE V quotient(V x, V y) { return x / y; }
  static REFINE_EXT_INLINE V inverse_sqrt(V x) { return V(1) / ::sqrt(x); }
  static REFINE_EXT_INLINE V larger_or_nan(V a, V b) { return a > b || a != a ? a : b; }
  // e^x and e^x - 1 together, for vector code to share one polynomial; x below the overflow of e^x.
  static REFINE_EXT_INLINE void exp_and_expm1(V x, V& e, V& em1) {
    e = exp(x);
    em1 = expm1(x);
  }
};

// float32: x = n ln 2 + r with |r| <= ln(2)/2 and e^x = 2^n (1 + p), p = r + r^2 (q0 + q1 r + ...).
// Coefficients: tools/fit_polynomials.py. ln 2 comes in two parts, the first with enough trailing zeros that
// n * high is exact.
struct FloatExp {
  static constexpr float q0 = 0.5f, q1 = 0.166665770246102859f, q2 = 0.041666554660816678f;
  static constexpr float q3 = 0.00836317323900937241f, q4 = 0.00139261763254180529f;
  static constexpr float kLn2High = 0.693145751953125f, kLn2Low = 1.42860682030941723e-6f;
  static constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding and subtracting it rounds to an integer
};

// log(m) = 2 s + s^3 (r0 + r1 s^2 + ...) with s = (m - 1) / (m + 1), for m in [sqrt(1/2), sqrt(2)].
struct FloatLog {
  static constexpr float r0 = 0.666666850413835306f, r1 = 0.399887798261498202f, r2 = 0.295799829716420768f;
};

template <>
struct Arithmetic<float> {
  using Scalar = float;
  using Mask = bool;
  static REFINE_EXT_INLINE float splat(double value) { return static_cast<float>(value); }
  static REFINE_EXT_INLINE float select(Mask mask, float yes, float no) { return mask ? yes : no; }
  static REFINE_EXT_INLINE float exp(float x) { return ::expf(x); }
  static REFINE_EXT_INLINE float expm1(float x) { return ::expm1f(x); }
  // Each is an instruction or two on the GPU's special unit, which takes subnormals for zero. Errors:
  // reciprocal, sqrt and inverse_sqrt 1 ulp; log2_special 2^-22 for an argument between 1/2 and 2, elsewhere
  // 2 ulp.
  static REFINE_EXT_INLINE float sqrt(float x) {
#if defined(__CUDA_ARCH__)
    asm("sqrt.approx.ftz.f32 %0, %0;" : "+f"(x));
    return x;
#else
    return inexact(::sqrtf(x));
#endif
  }
  static REFINE_EXT_INLINE float reciprocal(float x) {
#if defined(__CUDA_ARCH__)
    asm("rcp.approx.ftz.f32 %0, %0;" : "+f"(x));
    return x;
#else
    return inexact(1.0f / x);
#endif
  }
  static REFINE_EXT_INLINE float inverse_sqrt(float x) {
#if defined(__CUDA_ARCH__)
    asm("rsqrt.approx.ftz.f32 %0, %0;" : "+f"(x));
    return x;
#else
    return inexact(1.0f / ::sqrtf(x));
#endif
  }
  // Within 4e-7 and an ulp, 2.5e-7 near one: the unit's logarithm, which is off by 2^-22 of itself, only
  // gives the exponent of a factor near one. Zero, infinities and NaN pass through it.
  static REFINE_EXT_INLINE float log(float x) {
    const bool subnormal = x < 1.17549435e-38f;
    x = subnormal ? 16777216.0f * x : x;
    const float shifted = log2_special(x) + FloatExp::kRound, n = shifted - FloatExp::kRound;
    const float m =
        std::bit_cast<float>(std::bit_cast<uint32_t>(x) - (std::bit_cast<uint32_t>(shifted) << 23));
    return 0.693147181f * (subnormal ? n - 24.0f : n) + 0.693147181f * log2_special(m);
  }
  // For a normal number below sqrt(1/2): within 5e-7 of itself, which is -1/2 at most.
  static REFINE_EXT_INLINE float log2_below_one(float x) { return log2_special(x); }
  static REFINE_EXT_INLINE float quotient(float x, float y) { return x * reciprocal(y); }
  // For x >= 0; within 10 ulp. With s = x / (2 + x) it is 2 s + s^3 R(s^2).
  static REFINE_EXT_INLINE float log1p(float x) {
    using T = FloatLog;
    const float s = quotient(x, 2.0f + x), z = s * s;
    const float near = 2.0f * s + s * z * ((T::r2 * z + T::r1) * z + T::r0);
    return x < 0.41f ? near : log(1.0f + x);
  }
  static REFINE_EXT_INLINE float log1p_unit(float x) { return log1p(x); }
  // Within 2 ulp, of em1 too; x up to 88. Below -87.7 e is 0.
  static REFINE_EXT_INLINE void exp_and_expm1(float x, float& e, float& em1) {
    using T = FloatExp;
    // At -88 the exponent of 2^n is that of zero.
    x = larger_or_nan(x, -88.0f);
    const float shifted = x * 1.44269504f + T::kRound, n = shifted - T::kRound;
    const float r = (x - n * T::kLn2High) - n * T::kLn2Low;
    const float q = (((T::q4 * r + T::q3) * r + T::q2) * r + T::q1) * r + T::q0;
    const float p = r + r * r * q;
    // The integer n stands in the low bits of `shifted`.
    const float power = std::bit_cast<float>((std::bit_cast<uint32_t>(shifted) << 23) + 0x3f800000u);
    e = power * p + power;
    em1 = power * p + (power - 1.0f);
  }
  static REFINE_EXT_INLINE float larger_or_nan(float a, float b) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm("max.NaN.f32 %0, %0, %1;" : "+f"(a) : "f"(b));
    return a;
#else
    return a > b || a != a ? a : b;
#endif
  }

 private:
  static REFINE_EXT_INLINE float log2_special(float x) {
#if defined(__CUDA_ARCH__)
    asm("lg2.approx.ftz.f32 %0, %0;" : "+f"(x));
    return x;
#else
    const float y = ::log2f(x);
    // Near one, rounded to a multiple of 2^-21.
    return inexact(inexact(y < 1.0f && y > -1.0f ? (y + 4.0f) - 4.0f : y));
#endif
  }
  // The host, which only runs this in tests of the kernels, takes the errors of the GPU's instructions to
  // their limit, one way or the other.
  static REFINE_EXT_INLINE float inexact(float y) {
    const uint32_t bits = std::bit_cast<uint32_t>(y);
    const uint32_t magnitude = bits & 0x7fffffffu;
    const bool ordinary = magnitude >= 0x00800000u && magnitude < 0x7f7fffffu;
    return ordinary ? std::bit_cast<float>((bits * 0x9e3779b9u) >> 31 ? bits + 1 : bits - 1) : y;
  }
};

}  // namespace refine_ext
