// Checks, allocation and dispatch of the log-mixture ops, CUDA.
#include "../cuda/log_mixture.h"
#include "cuda.h"
#include "log_mixture.h"

namespace refine_ext::ops {
namespace {

using namespace mixture;

Inputs inputs_on_device(const Tensor& x, const Tensor& centers, const Tensor& scale,
                        const std::optional<Tensor>& log_weights, const std::optional<Tensor>& exclude,
                        const char* op) {
  same_device(centers, x, op, "centers");
  same_device(scale, x, op, "scale");
  same_device(log_weights, x, op, "log_weights");
  same_device(exclude, x, op, "exclude");
  return checked_inputs(x, centers, scale, log_weights, exclude, op);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> log_mixture(const Tensor& x, const Tensor& centers,
                                                       const Tensor& scale, std::optional<Tensor> log_weights,
                                                       std::optional<Tensor> exclude, bool mean, bool stats) {
  const char* op = "log_mixture";
  const DeviceGuard guard = guard_for(x, op, "x");
  const Inputs in = inputs_on_device(x, centers, scale, log_weights, exclude, op);
  const Results out = allocate_results(in, mean, stats);
  const Scratch scratch(cuda::log_mixture_workspace(out.problem), in.x);
  cuda::log_mixture(out.problem, scratch.data(), current_stream(in.x));
  return {out.value, out.mean, out.stats, out.top};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> log_mixture_backward(
    const Tensor& grad_in, const Tensor& value_in, const Tensor& x, const Tensor& centers,
    const Tensor& scale, std::optional<Tensor> log_weights, std::optional<Tensor> exclude, int64_t wanted) {
  const char* op = "log_mixture_backward";
  const DeviceGuard guard = guard_for(x, op, "x");
  same_device(grad_in, x, op, "grad");
  same_device(value_in, x, op, "value");
  const Inputs in = inputs_on_device(x, centers, scale, log_weights, exclude, op);
  const Tensor grad = as_contiguous(grad_in), value = as_contiguous(value_in);
  const Gradients out = allocate_gradients(in, grad, value, wanted, op);
  const Scratch scratch(cuda::log_mixture_backward_workspace(out.problem), in.x);
  cuda::log_mixture_backward(out.problem, scratch.data(), current_stream(in.x));
  return {out.x, out.centers, out.scale, out.log_weights};
}

// In two passes.
std::tuple<Tensor, Tensor> log_mixture_with_score(const Tensor& x, const Tensor& centers, const Tensor& scale,
                                                  std::optional<Tensor> log_weights,
                                                  std::optional<Tensor> exclude) {
  const Tensor value = std::get<0>(log_mixture(x, centers, scale, log_weights, exclude, false, false));
  Tensor ones = allocate_like(value);
  torch::stable::fill_(ones, 1.0);
  return {value,
          std::get<0>(log_mixture_backward(ones, value, x, centers, scale, log_weights, exclude, kWantX))};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(REFINE_EXT_LIBRARY, REFINE_EXT_CUDA_KEY, m) {
  m.impl("log_mixture", TORCH_BOX(&log_mixture));
  m.impl("log_mixture_with_score", TORCH_BOX(&log_mixture_with_score));
  m.impl("log_mixture_backward", TORCH_BOX(&log_mixture_backward));
}

}  // namespace refine_ext::ops
