// Checks, allocation and dispatch of the log-mixture ops, CPU.
#include "log_mixture.h"

#include "../cpu/log_mixture.h"
#include "../cpu/log_mixture_backward.h"

namespace refine_ext::ops {
namespace {

using namespace mixture;

std::tuple<Tensor, Tensor, Tensor, Tensor> log_mixture(const Tensor& x, const Tensor& centers,
                                                       const Tensor& scale, std::optional<Tensor> log_weights,
                                                       std::optional<Tensor> exclude, bool mean, bool stats) {
  const Inputs in = checked_inputs(x, centers, scale, log_weights, exclude, "log_mixture");
  const Results out = allocate_results(in, mean, stats);
  log_mixture_cpu(out.problem);
  return {out.value, out.mean, out.stats, out.top};
}

std::tuple<Tensor, Tensor> log_mixture_with_score(const Tensor& x, const Tensor& centers, const Tensor& scale,
                                                  std::optional<Tensor> log_weights,
                                                  std::optional<Tensor> exclude) {
  const Inputs in = checked_inputs(x, centers, scale, log_weights, exclude, "log_mixture_with_score");
  Results out = allocate_results(in, false, false);
  const Tensor score = allocate_like(in.x);
  out.problem.score = score.mutable_data_ptr();
  log_mixture_cpu(out.problem);
  mend_far_scores_cpu(out.problem);
  return {out.value, score};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> log_mixture_backward(
    const Tensor& grad_in, const Tensor& value_in, const Tensor& x, const Tensor& centers,
    const Tensor& scale, std::optional<Tensor> log_weights, std::optional<Tensor> exclude, int64_t wanted) {
  const char* op = "log_mixture_backward";
  const Inputs in = checked_inputs(x, centers, scale, log_weights, exclude, op);
  const Tensor grad = as_contiguous(grad_in), value = as_contiguous(value_in);
  const Gradients out = allocate_gradients(in, grad, value, wanted, op);
  log_mixture_backward_cpu(out.problem);
  return {out.x, out.centers, out.scale, out.log_weights};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(refine_ext, CPU, m) {
  m.impl("log_mixture", TORCH_BOX(&log_mixture));
  m.impl("log_mixture_with_score", TORCH_BOX(&log_mixture_with_score));
  m.impl("log_mixture_backward", TORCH_BOX(&log_mixture_backward));
}

}  // namespace refine_ext::ops
