// Density ratios from discriminator outputs, written around an anchor.
//
// The normalised ratio is r = (f*)'(h - nu) with nu the root of E_Q[(f*)'(h - nu)] = 1. Evaluated as written
// it loses everything near the edge of f*'s domain, where the largest ratios live: h - nu is a difference of
// large numbers and the result its reciprocal. Instead take the anchor a = max h, d = a - h >= 0 and L = log
// r(a) as the unknown:
//
//   exponential  log r = L - d
//   power        r = (g + c k d)^(-1/c),     g = e^{-c L};  equivalently  log r = L - log1p(c k d e^{c L}) /
//   c logistic     r = q / ((1 - q) + g),      q = e^{-d},  g = e^{-L} lambert      log r = L - y, y + g
//   expm1(y) = d,  g = e^{-L}
//
// Every term is a sum of non-negative numbers (for c > 0), so the relative error is a few roundings whatever
// the size of h, and L lies in [0, log n]: the largest of n equally weighted ratios of mean one is between 1
// and n. nu follows as a - f'(e^L). A given nu is the same evaluation at another anchor: the edge of the
// domain, where g = 0, or f'(1) + nu, where L = 0.
#pragma once

#include "divergence.h"

namespace refine_ext {

// What a kernel needs to evaluate one group's ratios; plain data in float64.
struct Anchor {
  double high;  // the anchor as high + low, high exact in the compute type
  double low;
  double log_max;  // L: log r at the anchor
  double base;     // g
  double slope;    // c k, scaled by e^{c L} for Form::power
  bool at_edge;    // Form::power: the anchor is the edge of the domain, log r = -log(c k d) / c
};

// The largest |c| L a power may take in the search, so that e^{c L} stays a double.
inline constexpr double kLargestExponent = 690.0;

REFINE_EXT_INLINE Anchor solved_anchor(const Family& family, double maximum, double log_max) {
  Anchor anchor{maximum, 0.0, log_max, 0.0, family.c * family.k, false};
  switch (family.form) {
    case Form::exponential:
      break;
    case Form::logistic:
    case Form::lambert:
      anchor.base = ::exp(-log_max);
      break;
    case Form::power:
      anchor.slope *= ::exp(family.c * log_max);
      break;
    default:
      anchor.base = ::exp(-family.c * log_max);
  }
  return anchor;
}

// The anchor for a given shift. C is the compute type: d = (high - h) + low keeps the digits of nu that C
// cannot hold.
template <class C>
REFINE_EXT_INLINE Anchor fixed_anchor(const Family& family, double shift) {
  Anchor anchor{0.0, 0.0, 0.0, 0.0, family.c * family.k, false};
  double position = family.tangent + shift;
  switch (family.form) {
    case Form::exponential:
      break;
    case Form::lambert:
    case Form::linear:
      anchor.base = 1.0;
      break;
    case Form::power:
      // Near the edge 1 + c k d cancels; far from it log(c k u) / c loses eps / c. From c = 1/4 on the latter
      // is small.
      anchor.at_edge = family.c >= 0.25;
      if (anchor.at_edge) position = family.supremum + shift;
      break;
    default:
      position = family.supremum + shift;
  }
  anchor.high = static_cast<double>(static_cast<C>(position));
  anchor.low = position - anchor.high;
  return anchor;
}

template <class V>
struct RatioPoint {
  V ratio;
  V log_ratio;
  V moment;     // the weight of this sample in the derivative of the mean ratio, see next_log_max
  V conjugate;  // f*(h - nu) without the family's offset
};

// Solves y + g expm1(y) = d for y. The left side is convex and increasing; a Halley step from a point right
// of the root stays right of it or lands within rounding. d >= 0 unless g = 1 (a given shift), where d may be
// negative.
template <class V>
REFINE_EXT_INLINE V lambert_root(V g, V d, int steps) {
  using A = Arithmetic<V>;
  const V one = A::splat(1.0), half = A::splat(0.5), zero = A::splat(0.0);
  const V chord = A::quotient(d, one + g);
  const V positive = A::log(one + A::quotient(A::select(d < zero, zero, d), g));
  const V far = A::select(d < zero, d + g, positive);
  V y = A::select(far < chord, far, chord);
  for (int step = 0; step < steps; ++step) {
    V e, em1;
    A::exp_and_expm1(y, e, em1);
    const V value = y + g * em1 - d;
    const V curvature = g * e;
    const V slope = one + curvature;
    y = y - A::quotient(value, slope - A::quotient(half * value * curvature, slope));
  }
  return y;
}

// Evaluates one family form on the arithmetic type V. Construct once per group, call per sample with d =
// anchor - h.
template <Form kForm, class V>
struct RatioEvaluator {
  using A = Arithmetic<V>;
  V log_max, base, slope, minus_inverse_c, one_plus_c, a_exponent, conjugate_scale, not_a_number;
  bool at_edge, clipped;
  static constexpr int kLambertSteps = sizeof(typename A::Scalar) == 8 ? 4 : 3;

  REFINE_EXT_INLINE RatioEvaluator(const Family& family, const Anchor& anchor)
      : log_max(A::splat(anchor.log_max)),
        base(A::splat(anchor.base)),
        slope(A::splat(anchor.slope)),
        minus_inverse_c(A::splat(family.c == 0.0 ? 0.0 : -1.0 / family.c)),
        one_plus_c(A::splat(1.0 + family.c)),
        a_exponent(A::splat(1.0 - family.c)),
        conjugate_scale(A::splat(family.c == 1.0 ? 0.0 : 1.0 / ((1.0 - family.c) * family.k))),
        not_a_number(A::splat(std::numeric_limits<double>::quiet_NaN())),
        at_edge(anchor.at_edge),
        clipped(family.c < 0.0) {}

  REFINE_EXT_INLINE RatioPoint<V> operator()(V d) const {
    const V zero = A::splat(0.0), one = A::splat(1.0);
    RatioPoint<V> point;
    if constexpr (kForm == Form::exponential) {
      point.log_ratio = log_max - d;
      point.ratio = A::exp(point.log_ratio);
      point.moment = point.ratio;
      point.conjugate = point.ratio - one;
    } else if constexpr (kForm == Form::reciprocal) {
      const V v = base + slope * d;
      point.ratio = A::select(v < zero, not_a_number, A::reciprocal(v));
      point.log_ratio = zero - A::log(v);
      point.moment = point.ratio * point.ratio;
      point.conjugate = point.log_ratio;
    } else if constexpr (kForm == Form::inverse_square) {
      const V v = base + slope * d;
      const V root = A::select(v < zero, not_a_number, A::reciprocal(v));
      point.ratio = root * root;
      point.log_ratio = A::splat(-2.0) * A::log(v);
      point.moment = point.ratio * root;
      point.conjugate = conjugate_scale * (root - one);
    } else if constexpr (kForm == Form::inverse_sqrt) {
      const V v = base + slope * d;
      point.ratio = A::inverse_sqrt(v);
      point.log_ratio = A::splat(-0.5) * A::log(v);
      point.moment = point.ratio * point.ratio * point.ratio;
      point.conjugate = conjugate_scale * (A::sqrt(v) - one);
    } else if constexpr (kForm == Form::linear) {
      const V v = base + slope * d;
      point.ratio = A::select(v < zero, zero, v);
      point.log_ratio = A::log(point.ratio);
      point.moment = A::select(v > zero, one, zero);
      point.conjugate = conjugate_scale * (point.ratio * point.ratio - one);
    } else if constexpr (kForm == Form::power) {
      V z = slope * d;
      if (clipped) z = A::select(z < A::splat(-1.0), A::splat(-1.0), z);
      point.log_ratio = log_max + minus_inverse_c * (at_edge ? A::log(z) : A::log1p(z));
      point.ratio = A::exp(point.log_ratio);
      point.moment = A::exp(one_plus_c * point.log_ratio);
      if (clipped) point.moment = A::select(z > A::splat(-1.0), point.moment, zero);
      point.conjugate = conjugate_scale * A::expm1(a_exponent * point.log_ratio);
    } else if constexpr (kForm == Form::logistic) {
      V q, minus_one_plus_q;
      A::exp_and_expm1(zero - d, q, minus_one_plus_q);
      const V denominator = base - minus_one_plus_q;
      const V inverse = A::select(denominator < zero, not_a_number, A::reciprocal(denominator));
      point.ratio = q * inverse;
      point.log_ratio = (zero - d) - A::log(denominator);
      point.moment = point.ratio * inverse;
      // log(1 + r): where r is large, 1 + r = (1 + g) / denominator would cancel nothing either, but costs
      // the same.
      point.conjugate = A::log1p(point.ratio);
    } else {
      static_assert(kForm == Form::lambert);
      // Past this y equals log(d) to rounding and d may be infinite: r = 1/d.
      const V far = A::splat(1e30);
      const V y = lambert_root(base, A::select(d > far, far, d), kLambertSteps);
      point.log_ratio = A::select(d > far, zero - A::log(d), log_max - y);
      point.ratio = A::exp(point.log_ratio);
      point.moment = A::quotient(point.ratio * point.ratio, one + point.ratio);
      point.conjugate = (point.ratio - one) + point.log_ratio;
    }
    return point;
  }
};

// log r = log (f*)'(h - shift) in float64: NaN beyond the domain of f*.
template <Form kForm, class V>
struct FixedLogRatio {
  RatioEvaluator<kForm, V> evaluate;
  V position;  // of the anchor for a shift of 0

  REFINE_EXT_INLINE explicit FixedLogRatio(const Family& family)
      : evaluate(family, fixed_anchor<double>(family, 0.0)),
        position(Arithmetic<V>::splat(fixed_anchor<double>(family, 0.0).high)) {}

  REFINE_EXT_INLINE V operator()(V h, V shift) const { return evaluate(position + shift - h).log_ratio; }
};

REFINE_EXT_INLINE double log_ratio_at(const Family& family, double h, double shift) {
  switch (family.form) {
#define REFINE_EXT_CASE(form) \
  case Form::form:            \
    return FixedLogRatio<Form::form, double>(family)(h, shift);
    REFINE_EXT_CASE(exponential)
    REFINE_EXT_CASE(reciprocal)
    REFINE_EXT_CASE(inverse_square)
    REFINE_EXT_CASE(inverse_sqrt)
    REFINE_EXT_CASE(linear)
    REFINE_EXT_CASE(power)
    REFINE_EXT_CASE(logistic)
    REFINE_EXT_CASE(lambert)
#undef REFINE_EXT_CASE
  }
  return std::numeric_limits<double>::quiet_NaN();
}

// One safeguarded Newton search for L: the mean ratio G increases with L from below 1 to above it.
//
// Newton acts on a transform that is nearly linear, exactly so when all samples are equal:
//   power     in g on G^{-c}: g + (G^{1+c} - G) / M with M = E r^{1+c}  (G^{-c} is a concave mean of affine
//   functions of g) logistic  the same with c = 1 and M = E r^2 / q lambert   in t = f'(e^L) on log G: t - G
//   log G / M with M = E r^2 / (1 + r)
struct ShiftSearch {
  double lower = 0.0;
  double upper;  // +inf when the weights do not bound the largest ratio
  double log_max;

  // One step from the mean ratio and mean moment at log_max. False when the bracket cannot shrink any
  // further.
  REFINE_EXT_INLINE bool step(const Family& family, double mean_ratio, double mean_moment) {
    if (mean_ratio > 1.0) {
      upper = log_max;
    } else {
      lower = log_max;
    }
    double next = newton(family, mean_ratio, mean_moment);
    if (!(next > lower && next < upper)) {
      next = upper < std::numeric_limits<double>::infinity() ? 0.5 * (lower + upper) : 2.0 * lower + 1.0;
      // A ratio of all-equal samples sits on the lower end itself.
      if (upper - lower <= 4e-16 * (1.0 + upper)) return false;
    }
    if (next == log_max) return false;
    log_max = next;
    return true;
  }

 private:
  REFINE_EXT_INLINE double newton(const Family& family, double mean, double moment) const {
    if (family.form == Form::exponential) return log_max - ::log(mean);
    if (family.form == Form::lambert) {
      const double target = log_max - ::expm1(-log_max) - ::log(mean) * mean / moment;  // next t - f'(1)
      // x - expm1(-x) = target is y + expm1(y) = -target for y = -x.
      return -lambert_root<double>(1.0, -target, 4);
    }
    const double c = family.form == Form::logistic ? 1.0 : family.c;
    const double g = ::exp(-c * log_max);
    return log_max - ::log1p(mean * ::expm1(c * ::log(mean)) / (moment * g)) / c;
  }
};

}  // namespace refine_ext
