// The schemas of torch.ops.refine_ext. Implementations register themselves from their own files, for CPU in
// this library and for CUDA in librefine_ext_cuda.so.
//
// divergence and alpha are a Divergence and its parameter (csrc/math/divergence.h). A `stats` row holds, in
// float64: shift, log sum w r, log sum (w r)^2, log max w r, log sum w, log r at the anchor, the anchor and
// its low part.
#include "common.h"

STABLE_TORCH_LIBRARY(REFINE_EXT_LIBRARY, m) {
  m.def(
      "density_ratio(Tensor h, Tensor? base_weights, Tensor? shift, int divergence, float alpha, bool ratio, "
      "bool check)"
      " -> (Tensor, Tensor)");
  m.def(
      "density_ratio_out(Tensor h, Tensor? base_weights, Tensor? shift, int divergence, float alpha, bool "
      "ratio, "
      "bool check, *, Tensor(a!) out) -> Tensor");
  m.def(
      "density_ratio_backward(Tensor grad, Tensor grad_stats, Tensor log_ratio, Tensor stats, Tensor? "
      "base_weights, "
      "bool solved, int divergence, float alpha) -> Tensor");
  m.def(
      "variational_bound(Tensor h_real, Tensor h_fake, bool tight, int divergence, float alpha) -> (Tensor, "
      "Tensor)");
  m.def(
      "variational_bound_backward(Tensor grad, Tensor h_fake, Tensor stats, bool tight, int divergence, "
      "float alpha)"
      " -> Tensor");
  m.def("dual_bound(Tensor logit_real, Tensor logit_fake, int divergence, float alpha) -> Tensor");
  m.def("dual_output(Tensor logit, int divergence, float alpha) -> Tensor");
  m.def("dual_slope(Tensor grad, Tensor logit, bool conjugate, int divergence, float alpha) -> Tensor");
  // Drawing (csrc/math/resampling.h). seed: int64, one value, or one for each index of some leading
  // dimensions; method: a ResampleMethod.
  m.def("resample(Tensor weights, SymInt num, Tensor seed, int offset, int method, bool log) -> Tensor");
  m.def(
      "rejection(Tensor log_ratio, Tensor? log_bound, Tensor? gamma, float epsilon, Tensor seed, int offset)"
      " -> (Tensor, Tensor, Tensor)");
  m.def(
      "metropolis(Tensor log_ratio, int num, int chains, int burn_in, int thin, bool in_order, Tensor? "
      "initial, "
      "Tensor seed) -> (Tensor, Tensor)");
  // Guidance (csrc/math/guidance_problem.h). coefficients: float64 [K + 2] or [B, K + 2] (K + 1 without
  // noise), or None: `scalars`; factor: float64 [B]; seeds: int64, one or [B], or None: `seed`.
  m.def(
      "guided_step(Tensor x, Tensor[] terms, Tensor? coefficients, float[] scalars, Tensor? factor, Tensor? "
      "seeds, "
      "SymInt seed, SymInt step, bool noisy) -> Tensor");
  m.def(
      "guided_step_out(Tensor x, Tensor[] terms, Tensor? coefficients, float[] scalars, Tensor? factor, "
      "Tensor? "
      "seeds, SymInt seed, SymInt step, bool noisy, *, Tensor(a!) out) -> ()");
  // constants: shift, weight, sigma (NaN: none), alpha, sigma_min, sigma_max; a tensor, one value or [B],
  // comes before its number.
  m.def(
      "guidance_factor(Tensor h, Tensor? shift, Tensor? weight, Tensor? sigma, Tensor? alpha, float[] "
      "constants, "
      "int divergence, float alpha_divergence, bool logit, bool flow, int parametrization) -> Tensor");
  // Rademacher complexity (csrc/math/rademacher_problem.h). supremum: a Supremum; results: suprema [draws]
  // float64, index [draws] int64, largest [m] float64.
  m.def(
      "rademacher_suprema(Tensor outputs, SymInt draws, SymInt first_draw, SymInt seed, int supremum, int "
      "digits)"
      " -> (Tensor, Tensor, Tensor)");
  m.def(
      "rademacher_sums(Tensor(a!) sums, Tensor outputs, SymInt first_row, SymInt first_draw, SymInt seed) -> "
      "()");
  m.def(
      "rademacher_backward(Tensor grad, Tensor index, Tensor outputs, SymInt first_draw, SymInt seed) -> "
      "Tensor");
  // Random multipliers [draws, n] in like's dtype: signs, or standard normals.
  m.def(
      "multipliers(Tensor like, SymInt n, SymInt draws, SymInt first_row, SymInt first_draw, SymInt seed, "
      "bool "
      "normal) -> Tensor");
  // Gaussian log-mixtures (csrc/math/log_mixture_problem.h). scale: one value, [N] or [N, d]; scale and
  // log_weights [N] in float64 beside float64 x, else float32; exclude: int64 [M], -1 for none. Results:
  // value [M] float64, mean [M, d], stats [M, 2] float64 (largest weight, effective number of centres), top
  // [M] int64; empty unless asked.
  m.def(
      "log_mixture(Tensor x, Tensor centers, Tensor scale, Tensor? log_weights, Tensor? exclude, bool mean, "
      "bool stats)"
      " -> (Tensor, Tensor, Tensor, Tensor)");
  // value, and its gradient by x in x's dtype; on the CPU in one pass.
  m.def(
      "log_mixture_with_score(Tensor x, Tensor centers, Tensor scale, Tensor? log_weights, Tensor? exclude)"
      " -> (Tensor, Tensor)");
  // Of x, centers, scale, log_weights where `wanted` has bits 1, 2, 4, 8; else empty.
  m.def(
      "log_mixture_backward(Tensor grad, Tensor value, Tensor x, Tensor centers, Tensor scale, Tensor? "
      "log_weights, "
      "Tensor? exclude, int wanted) -> (Tensor, Tensor, Tensor, Tensor)");
  // Diagonal Gaussians (csrc/math/gaussian_kl.h). mean, log_variance and the prior's, None for zeros: [B, d]
  // of one dtype; result [B], float64 beside float64, else float32. wanted: bits 1, 2, 4, 8 in their order.
  m.def(
      "gaussian_kl(Tensor mean, Tensor log_variance, Tensor? prior_mean, Tensor? prior_log_variance) -> "
      "Tensor");
  m.def(
      "gaussian_kl_backward(Tensor grad, Tensor mean, Tensor log_variance, Tensor? prior_mean, Tensor? "
      "prior_log_variance, int wanted) -> (Tensor, Tensor, Tensor, Tensor)");
  // z: [K, B, d]; result [K, B]. wanted: bits 1, 2, 4 of z, mean, log_variance.
  m.def("importance_log_weights(Tensor z, Tensor mean, Tensor log_variance) -> Tensor");
  m.def(
      "importance_log_weights_backward(Tensor grad, Tensor z, Tensor mean, Tensor log_variance, int wanted)"
      " -> (Tensor, Tensor, Tensor)");
}
