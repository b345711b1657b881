// Checks, allocation and dispatch of the guidance ops, CPU.
#include "guidance.h"

#include "../cpu/guidance.h"

namespace refine_ext::ops {
namespace {

using namespace guidance;

Tensor guided_step(const Tensor& x, const std::vector<Tensor>& terms, std::optional<Tensor> coefficients,
                   const std::vector<double>& scalars, std::optional<Tensor> factor,
                   std::optional<Tensor> seeds, int64_t seed, int64_t step, bool noisy) {
  StepInputs inputs = gather_step(x, terms, coefficients, scalars, factor, seeds, seed, step, noisy);
  Tensor out = allocate_like(x);
  inputs.problem.out = out.mutable_data_ptr();
  guided_step_cpu(inputs.problem);
  return out;
}

void guided_step_out(const Tensor& x, const std::vector<Tensor>& terms, std::optional<Tensor> coefficients,
                     const std::vector<double>& scalars, std::optional<Tensor> factor,
                     std::optional<Tensor> seeds, int64_t seed, int64_t step, bool noisy, const Tensor& out) {
  StepInputs inputs = gather_step(x, terms, coefficients, scalars, factor, seeds, seed, step, noisy);
  check_step_out(inputs, out, x);
  inputs.problem.out = out.mutable_data_ptr();
  guided_step_cpu(inputs.problem);
}

Tensor guidance_factor(const Tensor& h, std::optional<Tensor> shift, std::optional<Tensor> weight,
                       std::optional<Tensor> sigma, std::optional<Tensor> alpha,
                       const std::vector<double>& constants, int64_t divergence, double alpha_divergence,
                       bool logit, bool flow, int64_t parametrization) {
  FactorInputs inputs = gather_factor(h, shift, weight, sigma, alpha, constants, divergence, alpha_divergence,
                                      logit, flow, parametrization);
  Tensor out = new_factor(h);
  inputs.problem.out = static_cast<double*>(out.mutable_data_ptr());
  guidance_factor_cpu(inputs.problem);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(refine_ext, CPU, m) {
  m.impl("guided_step", TORCH_BOX(&guided_step));
  m.impl("guided_step_out", TORCH_BOX(&guided_step_out));
  m.impl("guidance_factor", TORCH_BOX(&guidance_factor));
}

}  // namespace refine_ext::ops
