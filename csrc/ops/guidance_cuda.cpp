// Checks, allocation and dispatch of the guidance ops, CUDA.
#include "../cuda/guidance.h"
#include "cuda.h"
#include "guidance.h"

namespace refine_ext::ops {
namespace {

using namespace guidance;

StepInputs gather_on_device(const Tensor& x, const std::vector<Tensor>& terms,
                            const std::optional<Tensor>& coefficients, const std::vector<double>& scalars,
                            const std::optional<Tensor>& factor, const std::optional<Tensor>& seeds,
                            int64_t seed, int64_t step, bool noisy) {
  const char* op = "guided_step";
  for (const Tensor& term : terms) same_device(term, x, op, "terms");
  same_device(coefficients, x, op, "coefficients");
  same_device(factor, x, op, "factor");
  same_device(seeds, x, op, "seed");
  return gather_step(x, terms, coefficients, scalars, factor, seeds, seed, step, noisy);
}

Tensor guided_step(const Tensor& x, const std::vector<Tensor>& terms, std::optional<Tensor> coefficients,
                   const std::vector<double>& scalars, std::optional<Tensor> factor,
                   std::optional<Tensor> seeds, int64_t seed, int64_t step, bool noisy) {
  const DeviceGuard guard = guard_for(x, "guided_step", "x");
  StepInputs inputs = gather_on_device(x, terms, coefficients, scalars, factor, seeds, seed, step, noisy);
  Tensor out = allocate_like(x);
  inputs.problem.out = out.mutable_data_ptr();
  cuda::guided_step(inputs.problem, current_stream(x));
  return out;
}

void guided_step_out(const Tensor& x, const std::vector<Tensor>& terms, std::optional<Tensor> coefficients,
                     const std::vector<double>& scalars, std::optional<Tensor> factor,
                     std::optional<Tensor> seeds, int64_t seed, int64_t step, bool noisy, const Tensor& out) {
  const DeviceGuard guard = guard_for(x, "guided_step", "x");
  same_device(out, x, "guided_step", "out");
  StepInputs inputs = gather_on_device(x, terms, coefficients, scalars, factor, seeds, seed, step, noisy);
  check_step_out(inputs, out, x);
  inputs.problem.out = out.mutable_data_ptr();
  cuda::guided_step(inputs.problem, current_stream(x));
}

Tensor guidance_factor(const Tensor& h, std::optional<Tensor> shift, std::optional<Tensor> weight,
                       std::optional<Tensor> sigma, std::optional<Tensor> alpha,
                       const std::vector<double>& constants, int64_t divergence, double alpha_divergence,
                       bool logit, bool flow, int64_t parametrization) {
  const char* op = "guidance_factor";
  const DeviceGuard guard = guard_for(h, op, "h");
  same_device(shift, h, op, "shift");
  same_device(weight, h, op, "weight");
  same_device(sigma, h, op, "sigma");
  same_device(alpha, h, op, "alpha");
  FactorInputs inputs = gather_factor(h, shift, weight, sigma, alpha, constants, divergence, alpha_divergence,
                                      logit, flow, parametrization);
  Tensor out = new_factor(h);
  inputs.problem.out = static_cast<double*>(out.mutable_data_ptr());
  cuda::guidance_factor(inputs.problem, current_stream(h));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(REFINE_EXT_LIBRARY, REFINE_EXT_CUDA_KEY, m) {
  m.impl("guided_step", TORCH_BOX(&guided_step));
  m.impl("guided_step_out", TORCH_BOX(&guided_step_out));
  m.impl("guidance_factor", TORCH_BOX(&guidance_factor));
}

}  // namespace refine_ext::ops
