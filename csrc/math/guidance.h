// What a discriminator adds to a diffusion's prediction: factor * grad h, with
//
//   factor = w c(h - nu) * {1, -sigma, sigma^2/alpha, -sigma/alpha} * [sigma_min <= sigma/alpha <= sigma_max]
//
// for the score, noise, denoised and velocity parametrisations of x = alpha x_0 + sigma eps, since
// noise = -sigma score, denoised = (x + sigma^2 score) / alpha and, for alpha^2 + sigma^2 = 1,
// velocity = alpha noise - sigma denoised (Kim et al. 2022, eq. 8; Husain, De Bortoli and Nock 2026).
#pragma once

#include "guidance_problem.h"

namespace refine_ext {

// kappa = u f''(u) at u = 1/r, what multiplies grad log r in the gradient flow of D_f(model || data)
// (Ansari, Ang and Soh 2021). c(r) = 1 / (r f''(r)), so that kappa = 1 / c(1/r).
template <class V>
REFINE_EXT_INLINE V flow_factor(const Family& family, V log_ratio) {
  return dual_slope(family, Arithmetic<V>::splat(0.0) - log_ratio);
}

// c(h - nu), or kappa; of a logit c is 1. log_ratio_of(h, shift) is log r of an output of the family's dual.
template <class V, class LogRatio>
REFINE_EXT_INLINE V gradient_factor(const GuidanceFactorProblem& problem, V h, V shift,
                                    const LogRatio& log_ratio_of) {
  using A = Arithmetic<V>;
  if (problem.logit && !problem.flow) return A::select(h == h, A::splat(1.0), h);
  const V log_ratio = problem.logit ? h - shift : log_ratio_of(h, shift);
  if (problem.flow) return flow_factor(problem.family, log_ratio);
  const V factor = score_factor(problem.family, log_ratio);
  // Where r is clipped to zero it does not change with h.
  const V lowest = A::splat(-std::numeric_limits<double>::infinity());
  return problem.family.c < 0.0 ? A::select(log_ratio == lowest, A::splat(0.0), factor) : factor;
}

template <class V>
struct SampleFactors {
  V h, shift, weight, sigma, alpha;
};

// Exactly 0 without a weight and outside the range of noise levels, whatever h holds.
template <class V, class LogRatio>
REFINE_EXT_INLINE V guidance_factor(const GuidanceFactorProblem& problem, const SampleFactors<V>& sample,
                                    const LogRatio& log_ratio_of) {
  using A = Arithmetic<V>;
  const V zero = A::splat(0.0), level = sample.sigma / sample.alpha;
  V scale = sample.weight;
  switch (problem.parametrization) {
    case Parametrization::score:
      break;
    case Parametrization::noise:
      scale = scale * (zero - sample.sigma);
      break;
    case Parametrization::denoised:
      scale = scale * (sample.sigma * sample.sigma / sample.alpha);
      break;
    case Parametrization::velocity:
      scale = scale * (zero - level);
      break;
  }
  if (problem.has_sigma) {
    scale = A::select(level < A::splat(problem.sigma_min), zero, scale);
    scale = A::select(level > A::splat(problem.sigma_max), zero, scale);
  }
  const V factor = scale * gradient_factor(problem, sample.h, sample.shift, log_ratio_of);
  return A::select(scale == zero, zero, factor);
}

REFINE_EXT_INLINE double guidance_factor(const GuidanceFactorProblem& problem, int64_t row) {
  const SampleFactors<double> sample{problem.h.at(row), problem.shift.at(row), problem.weight.at(row),
                                     problem.sigma.at(row), problem.alpha.at(row)};
  return guidance_factor(problem, sample,
                         [&](double h, double shift) { return log_ratio_at(problem.family, h, shift); });
}

}  // namespace refine_ext
