// The f-divergences, each formula once.
//
// D_f(P||Q) = E_Q f(dP/dQ), f convex. The optimal discriminator output is h = f'(r) for the density ratio r =
// dP/dQ, and (f*)' is the inverse of f', so that (f*)'(h) = r. Everything here is a function of x = log r,
// which cannot overflow where r can.
//
// Nine names, three forms of t = f'(e^x):
//   power     t = tangent - expm1(-c x) / (c k)      (c = 0: tangent + x / k)   all alpha-divergences, up to
//   scale logistic  t = supremum - log(1 + e^-x)                                      jensen_shannon, gan
//   lambert   t = tangent + x - expm1(-x)                                       jeffreys
// with tangent = f'(1) and supremum = sup dom f*.
#pragma once

#include "arithmetic.h"

namespace refine_ext {

enum class Divergence : int {
  kl,
  reverse_kl,
  jensen_shannon,
  gan,
  pearson_chi2,
  neyman_chi2,
  squared_hellinger,
  jeffreys,
  alpha,
  logit,  // not a divergence: log r = logit - shift, what a classifier's output needs
};
inline constexpr int kDivergences = 10;

// How the ratio is evaluated. The powers that have a cheap closed form get their own, any other c takes
// `power`.
enum class Form : int {
  exponential,     // c = 0
  reciprocal,      // c = 1
  inverse_square,  // c = 1/2
  inverse_sqrt,    // c = 2
  linear,          // c = -1
  power,
  logistic,
  lambert,
};

struct Family {
  Form form;
  double c;                 // curvature: the score factor of a power form is k r^c
  double k;                 // scale of the discriminator output
  double tangent;           // f'(1): the output that means r = 1
  double supremum;          // sup dom f*, +inf if there is none
  double conjugate_offset;  // added to f* where f(1) or the tangent is not zero
};

REFINE_EXT_INLINE Form power_form(double c) {
  if (c == 0.0) return Form::exponential;
  if (c == 1.0) return Form::reciprocal;
  if (c == 0.5) return Form::inverse_square;
  if (c == 2.0) return Form::inverse_sqrt;
  if (c == -1.0) return Form::linear;
  return Form::power;
}

REFINE_EXT_INLINE Family power_family(double c, double k, double tangent, double conjugate_offset) {
  const double infinity = std::numeric_limits<double>::infinity();
  return {power_form(c), c, k, tangent, c > 0.0 ? tangent + 1.0 / (c * k) : infinity, conjugate_offset};
}

// alpha is read for Divergence::alpha only; it is neither 0 nor 1 (those are reverse_kl and kl).
REFINE_EXT_INLINE Family make_family(Divergence divergence, double alpha) {
  const double log2 = 0.6931471805599453094;
  const double infinity = std::numeric_limits<double>::infinity();
  switch (divergence) {
    case Divergence::kl:
      return power_family(0.0, 1.0, 1.0, 1.0);
    case Divergence::logit:
      return power_family(0.0, 1.0, 0.0, 0.0);
    case Divergence::reverse_kl:
      return power_family(1.0, 1.0, -1.0, -1.0);
    case Divergence::pearson_chi2:
      return power_family(-1.0, 0.5, 0.0, 0.0);
    case Divergence::neyman_chi2:
      return power_family(2.0, 0.5, 0.0, 0.0);
    case Divergence::squared_hellinger:
      return power_family(0.5, 2.0, 0.0, 0.0);
    case Divergence::jensen_shannon:
      return {Form::logistic, 1.0, 1.0, 0.0, log2, -log2};
    case Divergence::gan:
      return {Form::logistic, 1.0, 1.0, -log2, 0.0, 0.0};
    case Divergence::jeffreys:
      return {Form::lambert, 1.0, 1.0, 0.0, infinity, 0.0};
    case Divergence::alpha:
      break;
  }
  return power_family(1.0 - alpha, 1.0, 0.0, 0.0);
}

// log(1 + e^x) = linear + log(1 + excess) without overflow: max(x, 0) and e^-|x|.
template <class V>
struct SoftplusParts {
  V linear, excess;
};

template <class V>
REFINE_EXT_INLINE SoftplusParts<V> softplus_parts(V x) {
  using A = Arithmetic<V>;
  const V zero = A::splat(0.0);
  return {A::select(x < zero, zero, x), A::exp(A::select(x < zero, x, zero - x))};
}

template <class V>
REFINE_EXT_INLINE V softplus(V x) {
  const SoftplusParts<V> parts = softplus_parts(x);
  return parts.linear + Arithmetic<V>::log1p_unit(parts.excess);
}

// t = f'(e^x): the discriminator output whose density ratio is e^x.
template <class V>
REFINE_EXT_INLINE V dual_output(const Family& family, V x) {
  using A = Arithmetic<V>;
  const V zero = A::splat(0.0);
  switch (family.form) {
    case Form::logistic:
      return A::splat(family.supremum) - softplus(zero - x);
    case Form::lambert:
      return A::splat(family.tangent) + (x - A::expm1(zero - x));
    case Form::exponential:
      return A::splat(family.tangent) + x;
    // The supremum is zero: next to it, tangent - expm1 would leave nothing.
    case Form::reciprocal:
      return A::splat(family.supremum) -
             A::exp(A::splat(-family.c) * x) * A::splat(1.0 / (family.c * family.k));
    default:
      return A::splat(family.tangent) -
             A::expm1(A::splat(-family.c) * x) * A::splat(1.0 / (family.c * family.k));
  }
}

// d log r / dt = (f*)'' / (f*)' at r = e^x: what multiplies grad h in the refined model's score.
// From dt/dx of the three forms above: e^{-c x}/k, 1/(1 + e^x), 1 + e^{-x}.
template <class V>
REFINE_EXT_INLINE V score_factor(const Family& family, V x) {
  using A = Arithmetic<V>;
  const V one = A::splat(1.0);
  switch (family.form) {
    case Form::logistic:
      return one + A::exp(x);
    case Form::lambert:
      return A::reciprocal(one + A::exp(A::splat(0.0) - x));
    case Form::exponential:
      return one;
    default:
      return A::splat(family.k) * A::exp(A::splat(family.c) * x);
  }
}

// dt / d log r, the reciprocal, for the gradient of dual_output.
template <class V>
REFINE_EXT_INLINE V dual_slope(const Family& family, V x) {
  using A = Arithmetic<V>;
  const V one = A::splat(1.0), zero = A::splat(0.0);
  switch (family.form) {
    case Form::logistic:
      return A::reciprocal(one + A::exp(x));
    case Form::lambert:
      return one + A::exp(zero - x);
    case Form::exponential:
      return one;
    default:
      return A::splat(1.0 / family.k) * A::exp(A::splat(-family.c) * x);
  }
}

// f*(f'(e^x)) = r t - f(r). Power forms, with a = 1 - c: (r^a - 1)/(a k), and log r at a = 0, plus the
// offset.
template <class V>
REFINE_EXT_INLINE V conjugate(const Family& family, V x) {
  using A = Arithmetic<V>;
  const V offset = A::splat(family.conjugate_offset);
  switch (family.form) {
    case Form::logistic:
      return softplus(x) + offset;
    case Form::lambert:
      return A::expm1(x) + x;
    case Form::reciprocal:
      return x + offset;
    default: {
      const double a = 1.0 - family.c;
      return A::expm1(A::splat(a) * x) * A::splat(1.0 / (a * family.k)) + offset;
    }
  }
}

// d f*(f'(e^x)) / dx = e^x dt/dx, written so that it stays finite where e^x does not.
template <class V>
REFINE_EXT_INLINE V conjugate_slope(const Family& family, V x) {
  using A = Arithmetic<V>;
  const V one = A::splat(1.0);
  switch (family.form) {
    case Form::logistic:
      return A::reciprocal(one + A::exp(A::splat(0.0) - x));
    case Form::lambert:
      return A::exp(x) + one;
    default:
      return A::splat(1.0 / family.k) * A::exp(A::splat(1.0 - family.c) * x);
  }
}

}  // namespace refine_ext
