// Sums over the centres of a Gaussian log-mixture: L(x) = log sum_j w_j exp(-sum_k (x_k - y_jk)^2 / (2
// s_jk^2)).
//
// Exponents are in base 2: t_j = log2(w_j) - log2(e) sum_k (x_k - y_jk)^2 / (2 s_jk^2). What is known after
// some of the centres is a MixtureState; states of disjoint sets of centres are merged in a fixed order, so
// that results do not depend on the number of threads.
#pragma once

#include <cstdint>
#include <limits>

#include "arithmetic.h"

namespace refine_ext {

inline constexpr double kLog2E = 1.44269504088896340736;
inline constexpr double kLn2 = 0.69314718055994530942;

struct MixtureState {
  double reference = -std::numeric_limits<double>::infinity();  // at least all t_j, or near their maximum
  double sum = 0.0;                                             // sum_j 2^(t_j - reference)
  double squares = 0.0;                                         // sum_j 4^(t_j - reference)
  double largest = -std::numeric_limits<double>::infinity();    // max_j t_j
  int64_t index = -1;                                           // the first j that has it
};

// 2^(a - b), 1 where both are infinite alike.
REFINE_EXT_INLINE double power_of_difference(double a, double b) { return a == b ? 1.0 : ::exp2(a - b); }

// The state of a's centres and b's, which come after them. NaN sums stay NaN.
REFINE_EXT_INLINE MixtureState merged(const MixtureState& a, const MixtureState& b) {
  MixtureState all;
  all.reference = b.reference > a.reference ? b.reference : a.reference;
  const double first = power_of_difference(a.reference, all.reference);
  const double second = power_of_difference(b.reference, all.reference);
  all.sum = a.sum * first + b.sum * second;
  all.squares = a.squares * first * first + b.squares * second * second;
  const bool later = b.largest > a.largest || a.index < 0;
  all.largest = later ? b.largest : a.largest;
  all.index = later ? b.index : a.index;
  return all;
}

REFINE_EXT_INLINE double mixture_value(const MixtureState& s) { return kLn2 * (s.reference + ::log2(s.sum)); }
// max_j p_j and (sum_j p_j^2)^-1; of a state without a centre neither is of use.
REFINE_EXT_INLINE double mixture_top_weight(const MixtureState& s) {
  return power_of_difference(s.largest, s.reference) / s.sum;
}
REFINE_EXT_INLINE double mixture_effective(const MixtureState& s) { return s.sum * s.sum / s.squares; }

}  // namespace refine_ext
