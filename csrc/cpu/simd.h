// SIMD vectors of float and double on GCC/Clang vector extensions, and exp, expm1, log, log1p, sqrt on them.
//
// A file that includes this is compiled once per instruction set with its own -march and
// -DREFINE_EXT_ISA=name. Everything lives in a namespace of that name and is always inlined, so that no
// function compiled for AVX-512 can be picked by the linker for a machine without it.
#pragma once

#include <cstdint>
#include <cstring>

#include "../math/arithmetic.h"

#if defined(__AVX512F__) || defined(__F16C__)
#include <immintrin.h>
#endif

#ifndef REFINE_EXT_ISA
#error "compile with -DREFINE_EXT_ISA=<name>"
#endif

namespace refine_ext::REFINE_EXT_ISA {

#if defined(__AVX512F__)
inline constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
inline constexpr int kVectorBytes = 32;
#else
inline constexpr int kVectorBytes = 16;
#endif

template <class S>
struct IntegerOf;
template <>
struct IntegerOf<float> {
  using type = int32_t;
};
template <>
struct IntegerOf<double> {
  using type = int64_t;
};

template <class S>
struct Vec {
  using Integer = typename IntegerOf<S>::type;
  typedef S Native __attribute__((vector_size(kVectorBytes)));
  typedef S Unaligned __attribute__((vector_size(kVectorBytes), aligned(sizeof(S)), may_alias));
  typedef Integer Bits __attribute__((vector_size(kVectorBytes)));
  static constexpr int kWidth = kVectorBytes / static_cast<int>(sizeof(S));

  Native v;

  // v - 0 rather than v + 0: the latter turns -0 into +0 and costs an addition.
  static REFINE_EXT_INLINE Vec splat(S value) { return {value - Native{}}; }
  static REFINE_EXT_INLINE Vec load(const S* p) { return {*reinterpret_cast<const Unaligned*>(p)}; }
  REFINE_EXT_INLINE void store(S* p) const { *reinterpret_cast<Unaligned*>(p) = v; }

  // Non-temporal, for outputs larger than the caches; p is aligned to kVectorBytes. Needs stream_fence() at
  // the end.
  REFINE_EXT_INLINE void stream(S* p) const {
#if defined(__AVX512F__)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(p), (__m512i)v);
#elif defined(__AVX2__)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)v);
#else
    store(p);
#endif
  }
};

REFINE_EXT_INLINE void stream_fence() {
#if defined(__AVX512F__) || defined(__AVX2__)
  _mm_sfence();
#endif
}

template <class S>
struct VecMask {
  typename Vec<S>::Bits bits;
};

#define REFINE_EXT_OPERATOR(op)                              \
  template <class S>                                         \
  REFINE_EXT_INLINE Vec<S> operator op(Vec<S> a, Vec<S> b) { \
    return {a.v op b.v};                                     \
  }
REFINE_EXT_OPERATOR(+)
REFINE_EXT_OPERATOR(-)
REFINE_EXT_OPERATOR(*)
REFINE_EXT_OPERATOR(/)
#undef REFINE_EXT_OPERATOR

#define REFINE_EXT_COMPARISON(op)                                \
  template <class S>                                             \
  REFINE_EXT_INLINE VecMask<S> operator op(Vec<S> a, Vec<S> b) { \
    return {a.v op b.v};                                         \
  }
REFINE_EXT_COMPARISON(<)
REFINE_EXT_COMPARISON(>)
REFINE_EXT_COMPARISON(==)
REFINE_EXT_COMPARISON(!=)
#undef REFINE_EXT_COMPARISON

template <class S>
REFINE_EXT_INLINE Vec<S> select(VecMask<S> mask, Vec<S> yes, Vec<S> no) {
  return {mask.bits ? yes.v : no.v};
}

// max(a, b) that returns b where either is NaN: a running maximum of b = so far skips NaN in a, and clamping
// x = b to a bound a lets NaN through. One instruction, which the compiler does not make of a comparison and
// a blend.
template <class S>
REFINE_EXT_INLINE Vec<S> max_or_second(Vec<S> a, Vec<S> b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(S) == 4) {
    return {(typename Vec<S>::Native)_mm512_max_ps((__m512)a.v, (__m512)b.v)};
  } else {
    return {(typename Vec<S>::Native)_mm512_max_pd((__m512d)a.v, (__m512d)b.v)};
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(S) == 4) {
    return {(typename Vec<S>::Native)_mm256_max_ps((__m256)a.v, (__m256)b.v)};
  } else {
    return {(typename Vec<S>::Native)_mm256_max_pd((__m256d)a.v, (__m256d)b.v)};
  }
#else
  return {a.v > b.v ? a.v : b.v};
#endif
}

template <class S>
REFINE_EXT_INLINE Vec<S> min_or_second(Vec<S> a, Vec<S> b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(S) == 4) {
    return {(typename Vec<S>::Native)_mm512_min_ps((__m512)a.v, (__m512)b.v)};
  } else {
    return {(typename Vec<S>::Native)_mm512_min_pd((__m512d)a.v, (__m512d)b.v)};
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(S) == 4) {
    return {(typename Vec<S>::Native)_mm256_min_ps((__m256)a.v, (__m256)b.v)};
  } else {
    return {(typename Vec<S>::Native)_mm256_min_pd((__m256d)a.v, (__m256d)b.v)};
  }
#else
  return {a.v < b.v ? a.v : b.v};
#endif
}

template <class S>
REFINE_EXT_INLINE double horizontal_sum(Vec<S> a) {
  double sum = 0.0;
  for (int lane = 0; lane < Vec<S>::kWidth; ++lane) sum += static_cast<double>(a.v[lane]);
  return sum;
}

// The lanes as float64. Of doubles, `low` alone.
struct WideLanes {
  Vec<double> low, high;
};

REFINE_EXT_INLINE WideLanes wide_lanes(Vec<float> x) {
  using D = Vec<double>::Native;
#if defined(__AVX512F__)
  const __m512 all = (__m512)x.v;
  const __m256 upper = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(all), 1));
  return {{(D)_mm512_cvtps_pd(_mm512_castps512_ps256(all))}, {(D)_mm512_cvtps_pd(upper)}};
#else
  typedef float HalfNative __attribute__((vector_size(kVectorBytes / 2)));
  HalfNative parts[2];
  std::memcpy(parts, &x.v, sizeof parts);
  return {{__builtin_convertvector(parts[0], D)}, {__builtin_convertvector(parts[1], D)}};
#endif
}

REFINE_EXT_INLINE WideLanes wide_lanes(Vec<double> x) { return {x, Vec<double>::splat(0.0)}; }

// Sums in float64. A sum of ratios is dominated by a few of them, and a float32 accumulator that holds a
// large one loses half a unit of its last place with every later addition.
template <class S>
struct WideSum {
  Vec<double> low = Vec<double>::splat(0.0), high = Vec<double>::splat(0.0);

  REFINE_EXT_INLINE void add(Vec<S> x) {
    if constexpr (sizeof(S) == 8) {
      low = low + x;
    } else {
      const WideLanes wide = wide_lanes(x);
      low = low + wide.low;
      high = high + wide.high;
    }
  }
  REFINE_EXT_INLINE double total() const { return horizontal_sum(low + high); }
};

template <class S>
REFINE_EXT_INLINE double horizontal_max(Vec<S> a) {
  S best = a.v[0];
  for (int lane = 1; lane < Vec<S>::kWidth; ++lane) best = a.v[lane] > best ? a.v[lane] : best;
  return static_cast<double>(best);
}

// Whether any lane is set.
template <class S>
REFINE_EXT_INLINE bool any(VecMask<S> mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)mask.bits, (__m512i)mask.bits) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_epi8((__m256i)mask.bits) != 0;
#else
  typename Vec<S>::Bits b = mask.bits;
  typename Vec<S>::Integer all = 0;
  for (int lane = 0; lane < Vec<S>::kWidth; ++lane) all |= b[lane];
  return all != 0;
#endif
}

// ---- elementary functions. Coefficients: tools/fit_polynomials.py.

template <class S>
struct Tables;

template <>
struct Tables<float> {
  static constexpr int kMantissa = 23, kBias = 127;
  static constexpr float kExpTail[] = {FloatExp::q0, FloatExp::q1, FloatExp::q2, FloatExp::q3, FloatExp::q4};
  static constexpr float kLogTail[] = {FloatLog::r0, FloatLog::r1, FloatLog::r2};
  static constexpr float kUnitLogTail[] = {0.666666673205274125f, 0.399997063319297174f,
                                           0.285923579943028377f, 0.217065758008803726f,
                                           0.232243292240233488f};
  static constexpr float kLn2High = FloatExp::kLn2High, kLn2Low = FloatExp::kLn2Low;
  static constexpr float kRound = FloatExp::kRound;
  static constexpr float kExpLow = -104.0f, kExpHigh = 89.0f;
};

template <>
struct Tables<double> {
  static constexpr int kMantissa = 52, kBias = 1023;
  static constexpr double kExpTail[] = {0.5,
                                        0.16666666666666671,
                                        0.0416666666666666698,
                                        0.00833333333332614073,
                                        0.00138888888888837523,
                                        0.000198412698748010459,
                                        0.0000248015873255337593,
                                        2.75572554250437468e-6,
                                        2.7557273660846841e-7,
                                        2.51052066664718393e-8,
                                        2.09146795854708306e-9};
  static constexpr double kLogTail[] = {0.666666666666666969, 0.399999999998994846, 0.285714286259844848,
                                        0.222222111333259714, 0.181828892322975639, 0.15331718042755715,
                                        0.146164936603116586};
  static constexpr double kUnitLogTail[] = {0.666666666666666586, 0.400000000000145827, 0.285714285671087572,
                                            0.22222222717427863,  0.181817894361328582, 0.153855700649586231,
                                            0.133141442096549362, 0.120010728095907125, 0.0880073848614467388,
                                            0.161640456119435322};
  static constexpr double kLn2High = 0.693147180369123816490, kLn2Low = 1.90821492927058770002e-10;
  static constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double kExpLow = -746.0, kExpHigh = 710.0;
};

template <class S, int N>
REFINE_EXT_INLINE Vec<S> polynomial(Vec<S> x, const S (&coefficients)[N]) {
  Vec<S> sum = Vec<S>::splat(coefficients[N - 1]);
#pragma GCC unroll 16
  for (int k = N - 2; k >= 0; --k) sum = sum * x + Vec<S>::splat(coefficients[k]);
  return sum;
}

// x = n ln 2 + r with |r| <= ln(2)/2: e^x = 2^n (1 + p), p = r + r^2 Q(r). NaN goes through.
template <class S>
struct ExpParts {
  Vec<S> n, p;
};

template <class S>
REFINE_EXT_INLINE ExpParts<S> exp_parts(Vec<S> x) {
  using V = Vec<S>;
  using T = Tables<S>;
  x = min_or_second(V::splat(T::kExpHigh), max_or_second(V::splat(T::kExpLow), x));
  const V n = (x * V::splat(S(1.44269504088896340736)) + V::splat(T::kRound)) - V::splat(T::kRound);
  const V r = (x - n * V::splat(T::kLn2High)) - n * V::splat(T::kLn2Low);
  return {n, r + r * r * polynomial(r, T::kExpTail)};
}

// value * 2^n for an integer-valued n, gradual underflow and overflow included.
template <class S>
REFINE_EXT_INLINE Vec<S> scale_by_power(Vec<S> value, Vec<S> n) {
#if defined(__AVX512F__)
  if constexpr (sizeof(S) == 4) {
    return {(typename Vec<S>::Native)_mm512_scalef_ps((__m512)value.v, (__m512)n.v)};
  } else {
    return {(typename Vec<S>::Native)_mm512_scalef_pd((__m512d)value.v, (__m512d)n.v)};
  }
#else
  // 2^n in two factors, each a normal number: n reaches beyond the exponent range at both ends.
  using Bits = typename Vec<S>::Bits;
  using T = Tables<S>;
  // n + kRound holds the integer n in its low mantissa bits.
  const Bits whole = (Bits)(n + Vec<S>::splat(T::kRound)).v - (Bits)Vec<S>::splat(T::kRound).v;
  const Bits half = whole >> 1;
  const Bits first = (half + T::kBias) << T::kMantissa;
  const Bits second = (whole - half + T::kBias) << T::kMantissa;
  return {value.v * (typename Vec<S>::Native)first * (typename Vec<S>::Native)second};
#endif
}

template <class S>
REFINE_EXT_INLINE Vec<S> vector_exp(Vec<S> x) {
  const ExpParts<S> parts = exp_parts(x);
  return scale_by_power(Vec<S>::splat(1) + parts.p, parts.n);
}

// em1 is NaN or infinite from the top of the exponent range on, where 2^n overflows before e^x does.
template <class S>
REFINE_EXT_INLINE void vector_exp_and_expm1(Vec<S> x, Vec<S>& e, Vec<S>& em1) {
  const ExpParts<S> parts = exp_parts(x);
  const Vec<S> one = Vec<S>::splat(1);
  const Vec<S> power = scale_by_power(one, parts.n);
  e = scale_by_power(one + parts.p, parts.n);
  em1 = power * parts.p + (power - one);
}

template <class S>
REFINE_EXT_INLINE Vec<S> vector_expm1(Vec<S> x) {
  Vec<S> e, em1;
  vector_exp_and_expm1(x, e, em1);
  // From e^64 on the one is below rounding; near zero keep the last bit and the sign.
  em1 = select(x > Vec<S>::splat(64), e, em1);
  return select(x == Vec<S>::splat(0), x, em1);
}

// m in [sqrt(1/2), sqrt(2)), k integer-valued with x = m 2^k; for finite x > 0.
template <class S>
REFINE_EXT_INLINE void split_exponent(Vec<S> x, Vec<S>& m, Vec<S>& k) {
  using V = Vec<S>;
  using Bits = typename V::Bits;
  using T = Tables<S>;
  const S lift = S(int64_t{1} << T::kMantissa);  // brings subnormals into the normal range
  const VecMask<S> tiny = x < V::splat(std::numeric_limits<S>::min());
  const V scaled = select(tiny, x * V::splat(lift), x);
  const Bits bits = (Bits)scaled.v;
  // Subtracting sqrt(1/2)'s bits makes the exponent field change at sqrt(1/2) 2^k instead of at 2^k.
  const Bits reference = (Bits)V::splat(S(0.70710678118654752440)).v;
  const Bits exponent = (bits - reference) >> T::kMantissa;
  m.v = (typename V::Native)(bits - (exponent << T::kMantissa));
  k.v = __builtin_convertvector(exponent, typename V::Native);
  k = select(tiny, k - V::splat(S(T::kMantissa)), k);
}

// log(1 + f) for m = 1 + f in [sqrt(1/2), sqrt(2)): f - f^2/2 + s (f^2/2 + s^2 R), s = f / (2 + f).
template <class S>
REFINE_EXT_INLINE Vec<S> vector_log(Vec<S> x) {
  using V = Vec<S>;
  using T = Tables<S>;
  V m, k;
  split_exponent(x, m, k);
  const V f = m - V::splat(1);
  const V s = f / (V::splat(2) + f);
  const V z = s * s;
  const V half_square = V::splat(S(0.5)) * f * f;
  // 2 s + s^3 P = f - f^2/2 + s f^2/2 + s^3 P, because f - s f = 2 s and s f = f^2/2 - s f^2/2.
  const V tail = s * (half_square + z * polynomial(z, T::kLogTail));
  const V small = (k * V::splat(T::kLn2Low) + tail) - half_square;
  V result = k * V::splat(T::kLn2High) + (f + small);
  const S infinity = std::numeric_limits<S>::infinity();
  result = select(x == V::splat(infinity), x, result);
  result = select(x == V::splat(0), V::splat(-infinity), result);
  result = select(x < V::splat(0), V::splat(std::numeric_limits<S>::quiet_NaN()), result);
  return select(x != x, x, result);
}

template <class S>
REFINE_EXT_INLINE Vec<S> vector_log1p(Vec<S> x) {
  using V = Vec<S>;
  const V one = V::splat(1);
  const V u = one + x;
  // The rounding of 1 + x, put back to first order; at x = -1 and x = inf it would be 0/0 and inf - inf.
  V correction = (x - (u - one)) / u;
  correction = select(u == V::splat(0), V::splat(0), correction);
  correction = select(x > V::splat(std::numeric_limits<S>::max()), V::splat(0), correction);
  return select(x == V::splat(0), x, vector_log(u) + correction);
}

// For x in [0, 1], with no exponent to split off: 2 s + s^3 P(s^2) again, s = x / (2 + x) up to 1/3. As 2 s
// is x - s x, a part of x is taken from it, and none where x is small.
template <class S>
REFINE_EXT_INLINE Vec<S> vector_log1p_unit(Vec<S> x) {
  using V = Vec<S>;
  const V s = x / (V::splat(2) + x);
  const V z = s * s;
  const V tail = z * polynomial(z, Tables<S>::kUnitLogTail);
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  return x - s * (x - tail);
#else
  // Each product is rounded: as in vector_log, where s, which has the most roundings, has a smaller share.
  const V half_square = V::splat(S(0.5)) * x * x;
  return x - (half_square - s * (half_square + tail));
#endif
}

template <class S>
REFINE_EXT_INLINE Vec<S> vector_sqrt(Vec<S> x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(S) == 4) {
    return {(typename Vec<S>::Native)_mm512_sqrt_ps((__m512)x.v)};
  } else {
    return {(typename Vec<S>::Native)_mm512_sqrt_pd((__m512d)x.v)};
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(S) == 4) {
    return {(typename Vec<S>::Native)_mm256_sqrt_ps((__m256)x.v)};
  } else {
    return {(typename Vec<S>::Native)_mm256_sqrt_pd((__m256d)x.v)};
  }
#else
  Vec<S> root;
  for (int lane = 0; lane < Vec<S>::kWidth; ++lane) root.v[lane] = S(__builtin_sqrt(x.v[lane]));
  return root;
#endif
}

}  // namespace refine_ext::REFINE_EXT_ISA

namespace refine_ext {

template <class S>
struct Arithmetic<REFINE_EXT_ISA::Vec<S>> {
  using Scalar = S;
  using V = REFINE_EXT_ISA::Vec<S>;
  using Mask = REFINE_EXT_ISA::VecMask<S>;
  static REFINE_EXT_INLINE V splat(double value) { return V::splat(static_cast<S>(value)); }
  static REFINE_EXT_INLINE V select(Mask mask, V yes, V no) { return REFINE_EXT_ISA::select(mask, yes, no); }
  static REFINE_EXT_INLINE V exp(V x) { return REFINE_EXT_ISA::vector_exp(x); }
  static REFINE_EXT_INLINE V log(V x) { return REFINE_EXT_ISA::vector_log(x); }
  static REFINE_EXT_INLINE V log1p(V x) { return REFINE_EXT_ISA::vector_log1p(x); }
  static REFINE_EXT_INLINE V log1p_unit(V x) { return REFINE_EXT_ISA::vector_log1p_unit(x); }
  static REFINE_EXT_INLINE V sqrt(V x) { return REFINE_EXT_ISA::vector_sqrt(x); }
  static REFINE_EXT_INLINE V reciprocal(V x) { return splat(1.0) / x; }
  static REFINE_EXT_INLINE V quotient(V x, V y) { return x / y; }
  static REFINE_EXT_INLINE V inverse_sqrt(V x) { return splat(1.0) / sqrt(x); }
  static REFINE_EXT_INLINE void exp_and_expm1(V x, V& e, V& em1) {
    REFINE_EXT_ISA::vector_exp_and_expm1(x, e, em1);
  }
  static REFINE_EXT_INLINE V expm1(V x) { return REFINE_EXT_ISA::vector_expm1(x); }
};

}  // namespace refine_ext
