// Standard normal numbers of Philox words, two of two (Box and Muller 1958):
//
//   r cos(2 pi v), r sin(2 pi v),  r = sqrt(-2 log u),  u = (w0 + 1/2) / 2^32,  v = w1 / 2^32.
//
// u is never 0 or 1, so that nothing here is infinite or zero by rounding; |z| < 6.77.
#pragma once

#include "philox.h"

namespace refine_ext {

// What Box-Muller asks of words, beside Arithmetic<V>. Word is a uint32_t, or a SIMD vector with a word for
// each lane of V (csrc/cpu/normal_simd.h specialises WordArithmetic).
template <class V>
struct WordArithmetic {
  using Word = uint32_t;
  static REFINE_EXT_INLINE V unsigned_value(Word w) { return static_cast<V>(w); }
  static REFINE_EXT_INLINE V signed_value(Word w) { return static_cast<V>(static_cast<int32_t>(w)); }
  static REFINE_EXT_INLINE bool at_least(Word w, uint32_t bound) { return w >= bound; }
  static REFINE_EXT_INLINE bool has_bits(Word w, uint32_t bits) { return (w & bits) != 0; }
  static REFINE_EXT_INLINE Word complement_where(bool mask, Word w) { return mask ? ~w : w; }
  // -x where the word's highest bit is set.
  static REFINE_EXT_INLINE V negate_by(V x, Word w) {
    if constexpr (sizeof(V) == 4) {
      return std::bit_cast<V>(std::bit_cast<uint32_t>(x) ^ (w & 0x80000000u));
    } else {
      return std::bit_cast<V>(std::bit_cast<uint64_t>(x) ^ uint64_t{w & 0x80000000u} << 32);
    }
  }
  // x = m 2^k for a normal number x > 0, m in [sqrt(1/2), sqrt(2)), k integer-valued. For V = float.
  static REFINE_EXT_INLINE void split(V x, V& m, V& k) {
    const uint32_t bits = std::bit_cast<uint32_t>(x);
    // Subtracting sqrt(1/2)'s bits makes the exponent field change at sqrt(1/2) 2^k instead of at 2^k.
    const int32_t exponent = static_cast<int32_t>(bits - 0x3f3504f3u) >> 23;
    m = std::bit_cast<V>(bits - (static_cast<uint32_t>(exponent) << 23));
    k = static_cast<V>(exponent);
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
  // (log(1 + f) - f) / f^2 for 1 + f in [sqrt(1/2), sqrt(2)], sin(2 pi f) / f and (cos(2 pi f) - 1) / f^2 in
  // f^2 for |f| <= 1/8.
  static REFINE_EXT_INLINE constexpr Polynomial<8> log1p() {
    return {{-0.499999971326073935, 0.333336706165587653, -0.250011477122167791, 0.199720493534750232,
             -0.165884870734030865, 0.14834790062971021, -0.141596618559349758, 0.0878727485375789994}};
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

// log((w + 1/2) / 2^32), to a few roundings of itself near u = 1 too.
template <class V, class Word>
REFINE_EXT_INLINE V log_unit(Word w) {
  using A = Arithmetic<V>;
  using W = WordArithmetic<V>;
  const V scale = A::splat(0x1p-32), half = A::splat(0x1p-33);
  if constexpr (sizeof(typename A::Scalar) == 8) {
    return A::log(W::unsigned_value(w) * scale + half);  // u is exact
  } else {
    // From sqrt(1/2) on the logarithm is that of 1 - (~w + 1/2) / 2^32: u itself would round to 1.
    const auto near = W::at_least(w, 0xB504F334u);
    const V t = W::unsigned_value(W::complement_where(near, w)) * scale + half;
    const V zero = A::splat(0.0);
    V m, k;
    W::split(t, m, k);
    const V f = A::select(near, zero - t, m - A::splat(1.0));
    const V log1p = f * f * horner(f, NormalTables<float>::log1p()) + f;
    return A::select(near, zero, k) * A::splat(0.693147180559945309) + log1p;
  }
}

// A CUDA thread's: the special unit's logarithm, but next to one, where only its absolute error is small.
// There, -log(1 - t) = 2 s + s^3 R(s^2) with s = t / (2 - t), as in Arithmetic<float>::log1p.
template <>
REFINE_EXT_INLINE float log_unit<float, uint32_t>(uint32_t w) {
  using A = Arithmetic<float>;
  using T = FloatLog;
  const bool near = w >= 0xB504F334u;
  const float t = static_cast<float>(near ? ~w : w) * 0x1p-32f + 0x1p-33f;
  const float s = A::quotient(t, 2.0f - t), z = s * s;
  const float series = -2.0f * s - s * z * ((T::r2 * z + T::r1) * z + T::r0);
  return near ? series : A::log_below_one(t);
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
  const V radius = A::sqrt(A::splat(-2.0) * log_unit<V>(radius_word));
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
// 2^34 elements.
struct NoiseSequence {
  uint64_t seed;
  uint32_t step;
  uint64_t row;

  REFINE_EXT_INLINE uint32_t third_word() const { return static_cast<uint32_t>(row); }
  REFINE_EXT_INLINE uint32_t fourth_word() const {
    return static_cast<uint32_t>(Stream::noise) | static_cast<uint32_t>(row >> 32) << 8;
  }
  REFINE_EXT_INLINE PhiloxBlock<uint32_t> block(uint32_t index) const {
    return philox4x32<uint32_t>({{index, step, third_word(), fourth_word()}}, static_cast<uint32_t>(seed),
                                static_cast<uint32_t>(seed >> 32));
  }
};
inline constexpr int64_t kMostElements = int64_t{1} << 34;

}  // namespace refine_ext
