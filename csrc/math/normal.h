// Standard normal numbers of Philox words, two of two (Box and Muller 1958):
//
//   r cos(2 pi v), r sin(2 pi v),  r = sqrt(-2 log u),  u = (w0 + 1/2) / 2^32,  v = w1 / 2^32.
//
// u is never 0 or 1, so that nothing here is infinite or zero by rounding; |z| < 6.77.
#pragma once

#include "philox.h"

namespace refine_ext {

// What Box-Muller asks of words, beside Arithmetic<V>. Word is a uint32_t, or a SIMD vector with a word for
// each lane of V (csrc/cpu/normal_simd.h specialises WordArithmetic, and adds `split` for float32).
template <class V>
struct WordArithmetic {
  using Word = uint32_t;
  static REFINE_EXT_INLINE V unsigned_value(Word w) { return static_cast<V>(w); }
  static REFINE_EXT_INLINE V signed_value(Word w) { return static_cast<V>(static_cast<int32_t>(w)); }
  static REFINE_EXT_INLINE bool has_bits(Word w, uint32_t bits) { return (w & bits) != 0; }
  // -x where the word's highest bit is set.
  static REFINE_EXT_INLINE V negate_by(V x, Word w) {
    if constexpr (sizeof(V) == 4) {
      return std::bit_cast<V>(std::bit_cast<uint32_t>(x) ^ (w & 0x80000000u));
    } else {
      return std::bit_cast<V>(std::bit_cast<uint64_t>(x) ^ uint64_t{w & 0x80000000u} << 32);
    }
  }
};

// From the lowest degree up. Returned by functions: device code has no address of a constant of the host.
template <int N>
struct Polynomial {
  double coefficient[N];
};

// tools/fit_polynomials.py.
template <class Scalar>
struct NormalTables;

template <>
struct NormalTables<float> {
  // -2 (log(1 + f) - f) / f^2 for f in [-1/2, 0]; sin(2 pi f) / f and (cos(2 pi f) - 1) / f^2 in f^2 for
  // |f| <= 1/8.
  static REFINE_EXT_INLINE constexpr Polynomial<8> log1p() {
    return {{0.999999767805863148, -0.666725893215194125, 0.497558326690173239, -0.437682658698316874,
             0.054386250239955716, -1.36651796723183248, -1.91489002229282498, -2.11605903979757238}};
  }
  static REFINE_EXT_INLINE constexpr Polynomial<4> sine() {
    return {{6.28318528781294674, -41.3416625705479549, 81.5925428713015433, -75.4016127027474585}};
  }
  static REFINE_EXT_INLINE constexpr Polynomial<4> cosine() {
    return {{-19.7392087899875097, 64.9393690514197757, -85.4488200896510713, 59.4241059817564739}};
  }
};

template <>
struct NormalTables<double> {
  static REFINE_EXT_INLINE constexpr Polynomial<7> sine() {
    return {{6.28318530717958646, -41.3417022403996362, 81.6052492759480352, -76.7058597042745506,
             42.058685020160894, -15.0938042099871135, 3.78086895930229552}};
  }
  static REFINE_EXT_INLINE constexpr Polynomial<7> cosine() {
    return {{-19.7392088021787172, 64.9393940226682427, -85.4568172066438042, 60.2446413527020089,
             -26.4262532758547214, 7.90320691156967843, -1.69903439406606364}};
  }
};

template <class V, int N>
REFINE_EXT_INLINE V horner(V x, const Polynomial<N>& p) {
  using A = Arithmetic<V>;
  V sum = A::splat(p.coefficient[N - 1]);
#if defined(__CUDACC__)
#pragma unroll
#else
#pragma GCC unroll 16
#endif
  for (int i = N - 2; i >= 0; --i) sum = sum * x + A::splat(p.coefficient[i]);
  return sum;
}

// -2 log((w + 1/2) / 2^32), to a few roundings of itself near u = 1 too.
template <class V, class Word>
REFINE_EXT_INLINE V squared_radius(Word w) {
  using A = Arithmetic<V>;
  using W = WordArithmetic<V>;
  const V scale = A::splat(0x1p-32), half = A::splat(0x1p-33);
  if constexpr (sizeof(typename A::Scalar) == 8) {
    return A::splat(-2.0) * A::log(W::unsigned_value(w) * scale + half);  // u is exact
  } else {
    // As a signed number the word gives u below 1/2 and u - 1 from there on, where u itself would be rounded.
    // log u = k log 2 + log(1 + f) is a sum of two negative numbers.
    const V zero = A::splat(0.0), one = A::splat(1.0);
    const V t = W::signed_value(w) * scale + half;
    const auto upper = t < zero;
    V m, k;
    W::split(t, m, k);
    const V f = A::select(upper, t, m - one);
    const V minus_two_log1p = f * (f * horner(f, NormalTables<float>::log1p()) - A::splat(2.0));
    // One product is left that the sum may take up: which one it is must not depend on the compiler's order.
    return A::select(upper, zero, k * A::splat(-1.38629436111989062)) + minus_two_log1p;
  }
}

// A CUDA thread's: the special unit's logarithm, but next to one, where only its absolute error is small.
// There, -log(1 - t) = 2 s + s^3 R(s^2) with s = t / (2 - t), as in Arithmetic<float>::log1p.
template <>
REFINE_EXT_INLINE float squared_radius<float, uint32_t>(uint32_t w) {
  using A = Arithmetic<float>;
  using T = FloatLog;
  const bool near = w >= 0xB504F334u;
  const float t = static_cast<float>(near ? ~w : w) * 0x1p-32f + 0x1p-33f;
  const float s = A::quotient(t, 2.0f - t), z = s * s;
  const float series = s * (z * ((2.0f * T::r2 * z + 2.0f * T::r1) * z + 2.0f * T::r0) + 4.0f);
  return near ? series : -1.38629436f * A::log2_below_one(t);
}

template <class V>
struct NormalPair {
  V cosine, sine;
};

template <class V, class Word>
REFINE_EXT_INLINE NormalPair<V> normal_pair(Word radius_word, Word angle_word) {
  using A = Arithmetic<V>;
  using W = WordArithmetic<V>;
  using T = NormalTables<typename A::Scalar>;
  const V radius = A::sqrt(squared_radius<V>(radius_word));
  // v = q/4 + f with |f| <= 1/8: four times the word, taken as a signed number, is 2^34 f. In the word moved
  // by an eighth of a turn q is the two highest bits.
  const Word turned = angle_word + 0x20000000u;
  const V f = W::signed_value(angle_word << 2) * A::splat(0x1p-34);
  const V z = f * f;
  const V sine = f * horner(z, T::sine());
  const V cosine = z * horner(z, T::cosine()) + A::splat(1.0);
  const auto odd = W::has_bits(turned, 0x40000000u);
  return {W::negate_by(radius * A::select(odd, sine, cosine), turned + 0x40000000u),
          W::negate_by(radius * A::select(odd, cosine, sine), turned)};
}

// The words of the noise of a sampler. Element e of a sample is number e % 4 of block e / 4; counter =
// (block, step, row), so that neither other samples nor the number of threads matter. A sample has at most
// 2^34 elements. The normals of a draw (rademacher_problem.h) are those of row `draw` and step 0 of their own
// stream.
struct NoiseSequence {
  uint64_t seed;
  uint32_t step;
  uint64_t row;
  Stream stream = Stream::noise;

  REFINE_EXT_INLINE uint32_t third_word() const { return static_cast<uint32_t>(row); }
  REFINE_EXT_INLINE uint32_t fourth_word() const {
    return static_cast<uint32_t>(stream) | static_cast<uint32_t>(row >> 32) << 8;
  }
  REFINE_EXT_INLINE PhiloxBlock<uint32_t> block(uint32_t index) const {
    return philox4x32<uint32_t>({{index, step, third_word(), fourth_word()}}, static_cast<uint32_t>(seed),
                                static_cast<uint32_t>(seed >> 32));
  }
};
inline constexpr int64_t kMostElements = int64_t{1} << 34;

}  // namespace refine_ext
