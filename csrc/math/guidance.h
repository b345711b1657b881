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
REFINE_EXT_INLINE double flow_factor(const Family& family, double log_ratio) {
  return dual_slope(family, -log_ratio);
}

// c(h - nu), or kappa; of a logit c is 1.
REFINE_EXT_INLINE double gradient_factor(const GuidanceFactorProblem& problem, double h, double shift) {
  if (problem.logit && !problem.flow) return h == h ? 1.0 : h;
  const double log_ratio = problem.logit ? h - shift : log_ratio_at(problem.family, h, shift);
  if (problem.flow) return flow_factor(problem.family, log_ratio);
  // Where r is clipped to zero it does not change with h.
  if (problem.family.c < 0.0 && log_ratio == -std::numeric_limits<double>::infinity()) return 0.0;
  return score_factor(problem.family, log_ratio);
}

// Exactly 0 without a weight and outside the range of noise levels, whatever h holds.
REFINE_EXT_INLINE double guidance_factor(const GuidanceFactorProblem& problem, int64_t row) {
  const double sigma = problem.sigma.at(row), alpha = problem.alpha.at(row);
  double scale = problem.weight.at(row);
  switch (problem.parametrization) {
    case Parametrization::score:
      break;
    case Parametrization::noise:
      scale *= -sigma;
      break;
    case Parametrization::denoised:
      scale *= sigma * sigma / alpha;
      break;
    case Parametrization::velocity:
      scale *= -sigma / alpha;
      break;
  }
  if (problem.has_sigma) {
    const double level = sigma / alpha;
    if (level < problem.sigma_min || level > problem.sigma_max) return 0.0;
  }
  if (scale == 0.0) return 0.0;
  return scale * gradient_factor(problem, problem.h.at(row), problem.shift.at(row));
}

}  // namespace refine_ext
