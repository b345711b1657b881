// A register tile of a Gaussian log-mixture: rows of x, one in each lane of kVectors vectors, against
// kCenters centres. Squared distances, exponents and powers of two; what is summed is the caller's.
//
// Differences are taken before anything is scaled: x c - y c loses the digits where the data are far from
// the origin. Lanes do not meet, so that a row's bits do not depend on the other rows.
//
// Included by sources that are compiled once per instruction set.
#pragma once

#include "log_mixture_packing.h"

namespace refine_ext::REFINE_EXT_ISA {

// ---- Arithmetic

// a * b, rounded: not part of a multiply-add.
template <class S>
REFINE_EXT_INLINE Vec<S> rounded_product(Vec<S> a, Vec<S> b) {
  Vec<S> product = a * b;
#if defined(__AVX512F__)
  asm("" : "+v"(product.v));
#elif defined(__SSE2__)
  asm("" : "+x"(product.v));
#elif defined(__aarch64__)
  asm("" : "+w"(product.v));
#endif
  return product;
}

// a * b + c in one rounding, where there is an instruction for it. Which of two roundings would otherwise be
// the compiler's choice, in each place anew.
template <class S>
REFINE_EXT_INLINE Vec<S> multiply_add(Vec<S> a, Vec<S> b, Vec<S> c) {
  using Native = typename Vec<S>::Native;
#if defined(__AVX512F__)
  if constexpr (sizeof(S) == 4) {
    return {(Native)_mm512_fmadd_ps((__m512)a.v, (__m512)b.v, (__m512)c.v)};
  } else {
    return {(Native)_mm512_fmadd_pd((__m512d)a.v, (__m512d)b.v, (__m512d)c.v)};
  }
#elif defined(__FMA__)
  if constexpr (sizeof(S) == 4) {
    return {(Native)_mm256_fmadd_ps((__m256)a.v, (__m256)b.v, (__m256)c.v)};
  } else {
    return {(Native)_mm256_fmadd_pd((__m256d)a.v, (__m256d)b.v, (__m256d)c.v)};
  }
#else
  return {(Native)(a.v * b.v + c.v)};
#endif
}

// c - a * b, the same.
template <class S>
REFINE_EXT_INLINE Vec<S> minus_product(Vec<S> a, Vec<S> b, Vec<S> c) {
#if defined(__AVX512F__)
  using Native = typename Vec<S>::Native;
  if constexpr (sizeof(S) == 4) {
    return {(Native)_mm512_fnmadd_ps((__m512)a.v, (__m512)b.v, (__m512)c.v)};
  } else {
    return {(Native)_mm512_fnmadd_pd((__m512d)a.v, (__m512d)b.v, (__m512d)c.v)};
  }
#else
  return multiply_add({-a.v}, b, c);
#endif
}

// x - *y in all lanes. A compiler loads what two subtractions share into a register, which takes a slot that
// the arithmetic wants: as a part of both instructions the loads are free.
template <class S>
REFINE_EXT_INLINE Vec<S> minus_broadcast(Vec<S> x, const S* y) {
#if defined(__AVX512F__)
  Vec<S> difference;
  if constexpr (sizeof(S) == 4) {
    asm("vsubps %2%{1to16%}, %1, %0" : "=v"(difference.v) : "v"(x.v), "m"(*y));
  } else {
    asm("vsubpd %2%{1to8%}, %1, %0" : "=v"(difference.v) : "v"(x.v), "m"(*y));
  }
  return difference;
#else
  return x - Vec<S>::splat(*y);
#endif
}

// a * *b + c in one rounding, the same.
template <class S>
REFINE_EXT_INLINE Vec<S> multiply_broadcast_add(Vec<S> a, const S* b, Vec<S> c) {
#if defined(__AVX512F__)
  if constexpr (sizeof(S) == 4) {
    asm("vfmadd231ps %2%{1to16%}, %1, %0" : "+v"(c.v) : "v"(a.v), "m"(*b));
  } else {
    asm("vfmadd231pd %2%{1to8%}, %1, %0" : "+v"(c.v) : "v"(a.v), "m"(*b));
  }
  return c;
#else
  return multiply_add(a, Vec<S>::splat(*b), c);
#endif
}

// ---- Squared distances, and exponents

// Rows as pack_rows leaves them.
template <bool kScaled, class S, int kVectors, int kCenters>
REFINE_EXT_INLINE void squared_distances(const S* rows, const S* centers, const S* inverse, int64_t d,
                                         Vec<S> (&sum)[kVectors][kCenters]) {
  using V = Vec<S>;
  const auto step = [&](int64_t k, auto&& take) {
    V x[kVectors];
#pragma GCC unroll 4
    for (int r = 0; r < kVectors; ++r) x[r] = V::load(rows + (k * kVectors + r) * V::kWidth);
#pragma GCC unroll 8
    for (int j = 0; j < kCenters; ++j) {
#pragma GCC unroll 4
      for (int r = 0; r < kVectors; ++r) {
        V difference = minus_broadcast(x[r], centers + k * kCenters + j);
        if constexpr (kScaled) difference = difference * V::splat(inverse[k * kCenters + j]);
        take(sum[r][j], difference);
      }
    }
  };
  step(0, [](V& all, V z) { all = z * z; });
  for (int64_t k = 1; k < d; ++k) step(k, [](V& all, V z) { all = multiply_add(z, z, all); });
}

// The same in kDims dimensions. Of two squares side by side a compiler may round either first: here
// it is the first, as in a loop.
template <int kDims, class S, int kVectors, int kCenters>
REFINE_EXT_INLINE void few_squares(const S* rows, const S* centers, Vec<S> (&sum)[kVectors][kCenters]) {
  using V = Vec<S>;
#pragma GCC unroll 8
  for (int j = 0; j < kCenters; ++j) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
#pragma GCC unroll 4
      for (int k = 0; k < kDims; ++k) {
        const V z =
            minus_broadcast(V::load(rows + (k * kVectors + v) * V::kWidth), centers + k * kCenters + j);
        sum[v][j] = k == 0 ? z * z : multiply_add(z, z, sum[v][j]);
      }
    }
  }
}

// kDims: d where it has a form of its own, or 0.
template <int kDims, bool kScaled, class S, int kVectors, int kCenters>
REFINE_EXT_INLINE void tile_distances(const S* rows, const CenterTile<S>& tile, int64_t d,
                                      Vec<S> (&sum)[kVectors][kCenters]) {
  if constexpr (kDims > 0) {
    few_squares<kDims>(rows, tile.values, sum);
  } else {
    squared_distances<kScaled>(rows, tile.values, tile.inverse, d, sum);
  }
}

// t_j - r for r = -opposite. With t_j rounded first it is 0 where t_j is r: of exponents beyond 2^24 the
// rounding alone is not small.
template <class S>
REFINE_EXT_INLINE Vec<S> exponent(Vec<S> slope, Vec<S> log2_weight, Vec<S> distance, Vec<S> opposite) {
  return minus_product(slope, distance, log2_weight) + opposite;
}
template <class S>
REFINE_EXT_INLINE Vec<S> exponent(const CenterTile<S>& tile, int j, Vec<S> distance, Vec<S> opposite) {
  return exponent(Vec<S>::splat(tile.slope[j]), Vec<S>::splat(tile.log2_weight[j]), distance, opposite);
}

// ---- Powers of two. Coefficients: tools/fit_polynomials.py.

template <class S>
struct Exp2Tail;
template <>
struct Exp2Tail<float> {
  static constexpr float kValues[] = {0.693147180559945309f, 0.240223490380203614f, 0.0555038101379645743f,
                                      0.00966636851538544831f, 0.00133813025373207962f};
};
template <>
struct Exp2Tail<double> {
  static constexpr double kValues[] = {
      0.693147180559945309,   0.240226506959100982,    0.0555041086648215943,    0.00961812910760688853,
      0.00133335581464169353, 0.000154035304417360502, 0.0000152527338298361184, 1.32154425879216897e-6,
      1.01780624458457735e-7, 7.0725859492692237e-9,   4.45496059818651839e-10};
};

// 2^e = power * factor, two parts so that the product goes into a sum's multiply-add. 2^0 is 1 to the bit;
// beyond the exponent range 0 and infinity, and below 2^-126 (float) or 2^-1022 zero or near it. NaN goes
// through; infinite e may become NaN.
template <class S>
struct PowerOfTwo {
  using V = Vec<S>;
  V power, factor;

  REFINE_EXT_INLINE explicit PowerOfTwo(V e) {
    using T = Tables<S>;
    // To the ends of the exponent field, which stand for 0 and infinity.
    e = min_or_second(V::splat(T::kBias + 1), max_or_second(V::splat(-T::kBias), e));
    const V shifted = e + V::splat(T::kRound), n = shifted - V::splat(T::kRound);
    const V f = e - n;
    factor = f * polynomial(f, Exp2Tail<S>::kValues) + V::splat(1);
    // shifted holds the integer n in its low mantissa bits.
    using Bits = typename V::Bits;
    power.v = (typename V::Native)(((Bits)shifted.v << T::kMantissa) + (Bits)V::splat(1).v);
  }
  REFINE_EXT_INLINE V value() const { return power * factor; }
};

#if defined(__AVX512F__)
// 2^(i/32)
alignas(64) inline constexpr float kPowers[32] = {
    1.0f,        1.0218972f,  1.04427373f, 1.06714046f, 1.09050775f, 1.1143868f,  1.13878858f, 1.1637249f,
    1.18920708f, 1.21524739f, 1.24185777f, 1.26905096f, 1.29683959f, 1.32523668f, 1.35425556f, 1.38390994f,
    1.41421354f, 1.44518077f, 1.47682619f, 1.50916445f, 1.54221082f, 1.5759809f,  1.61049032f, 1.64575553f,
    1.68179286f, 1.71861935f, 1.75625217f, 1.79470909f, 1.8340081f,  1.87416768f, 1.91520655f, 1.95714414f};

// Within 2e-7 of itself: 32 steps to an octave, picked from two registers.
template <>
struct PowerOfTwo<float> {
  using V = Vec<float>;
  V power, factor;

  REFINE_EXT_INLINE explicit PowerOfTwo(V e) {
    const V round = V::splat(Tables<float>::kRound / 32);
    const V shifted = e + round, n = shifted - round;
    const V f = e - n;
    factor = (V::splat(0.240228268096303907f) * f + V::splat(0.693157343710484263f)) * f + V::splat(1);
    const __m512 step =
        _mm512_permutex2var_ps(_mm512_load_ps(kPowers), (__m512i)shifted.v, _mm512_load_ps(kPowers + 16));
    power.v = (V::Native)_mm512_scalef_ps(step, (__m512)n.v);
  }
  REFINE_EXT_INLINE V value() const { return power * factor; }
};
#endif

}  // namespace refine_ext::REFINE_EXT_ISA
