// Checks, allocation and dispatch of the density-ratio ops, CUDA. Nothing here waits for the device, so that
// what only the data can tell (NaN or +inf outputs, a shift outside the domain) is no error: that row is NaN,
// its statistics too.
#include "../cuda/density_ratio.h"
#include "cuda.h"
#include "density_ratio.h"

namespace refine_ext::ops {
namespace {

bool is_wide(const Tensor& values) { return values.scalar_type() == ScalarType::Double; }

Inputs gather_cuda(const Tensor& h, const std::optional<Tensor>& weights, const std::optional<Tensor>& shift,
                   int64_t divergence, double alpha, bool ratio, const char* op = "density_ratio") {
  same_device(weights, h, op, "base_weights");
  same_device(shift, h, op, "shift");
  return gather(h, weights, shift, divergence, alpha, ratio);
}

Tensor density_ratio_into(Inputs& inputs, const Tensor& out) {
  DensityRatioProblem& problem = inputs.problem;
  problem.out = out.mutable_data_ptr();
  Tensor stats = new_stats(inputs.h);
  const bool fixed = problem.shift != nullptr;
  const Scratch scratch(cuda::density_ratio_workspace(problem, fixed), inputs.h);
  cuda::density_ratio(problem, fixed, stats_rows(stats), scratch.data(), current_stream(inputs.h));
  return stats;
}

std::tuple<Tensor, Tensor> density_ratio(const Tensor& h, std::optional<Tensor> base_weights,
                                         std::optional<Tensor> shift, int64_t divergence, double alpha,
                                         bool ratio, bool) {
  const DeviceGuard guard = guard_for(h, "density_ratio", "h");
  Inputs inputs = gather_cuda(h, base_weights, shift, divergence, alpha, ratio);
  Tensor out = allocate_like(inputs.h);
  Tensor stats = density_ratio_into(inputs, out);
  return {out, stats};
}

Tensor density_ratio_out(const Tensor& h, std::optional<Tensor> base_weights, std::optional<Tensor> shift,
                         int64_t divergence, double alpha, bool ratio, bool, Tensor out) {
  const DeviceGuard guard = guard_for(h, "density_ratio", "h");
  Inputs inputs = gather_cuda(h, base_weights, shift, divergence, alpha, ratio);
  same_device(out, h, "density_ratio", "out");
  check_out(out, h);
  return density_ratio_into(inputs, out);
}

Tensor density_ratio_backward(const Tensor& grad, const Tensor& grad_stats, const Tensor& log_ratio,
                              const Tensor& stats, std::optional<Tensor> base_weights, bool solved,
                              int64_t divergence, double alpha) {
  const char* op = "density_ratio_backward";
  const DeviceGuard guard = guard_for(log_ratio, op, "log_ratio");
  const Tensor x = as_contiguous(log_ratio), g = as_contiguous(grad), gs = as_contiguous(grad_stats),
               st = as_contiguous(stats);
  Inputs inputs = gather_cuda(x, base_weights, std::nullopt, divergence, alpha, false, op);
  same_device(g, x, op, "grad");
  same_device(gs, x, op, "grad_stats");
  same_device(st, x, op, "stats");
  check_backward(g, x);
  Tensor out = allocate_like(x);
  inputs.problem.out = out.mutable_data_ptr();
  const Scratch scratch(cuda::density_ratio_backward_workspace(inputs.problem, solved), x);
  cuda::density_ratio_backward(inputs.problem, x.const_data_ptr(), g.const_data_ptr(), stats_rows(st),
                               static_cast<const double*>(gs.const_data_ptr()), solved, scratch.data(),
                               current_stream(x));
  return out;
}

std::tuple<Tensor, Tensor> variational_bound(const Tensor& h_real, const Tensor& h_fake, bool tight,
                                             int64_t divergence, double alpha) {
  const char* op = "variational_bound";
  const DeviceGuard guard = guard_for(h_fake, op, "h_fake");
  const Tensor real = as_contiguous(h_real);
  Inputs inputs = gather_cuda(h_fake, std::nullopt, std::nullopt, divergence, alpha, false, op);
  same_device(real, inputs.h, op, "h_real");
  const Rows rows = check_pair(real, inputs.h, op, "h_real", "h_fake");
  Tensor stats = new_stats(inputs.h);
  Tensor values = new_values(inputs.h);
  const cuda::RealOutputs outputs{real.const_data_ptr(), rows.n};
  const Scratch scratch(cuda::variational_bound_workspace(inputs.problem, outputs, tight), inputs.h);
  cuda::variational_bound(inputs.problem, outputs, tight, stats_rows(stats), values.mutable_data_ptr(),
                          is_wide(values), scratch.data(), current_stream(inputs.h));
  return {values, stats};
}

Tensor variational_bound_backward(const Tensor& grad, const Tensor& h_fake, const Tensor& stats, bool tight,
                                  int64_t divergence, double alpha) {
  const char* op = "variational_bound_backward";
  const DeviceGuard guard = guard_for(h_fake, op, "h_fake");
  Inputs inputs = gather_cuda(h_fake, std::nullopt, std::nullopt, divergence, alpha, true, op);
  const Tensor g = as_contiguous(grad), st = as_contiguous(stats);
  same_device(g, inputs.h, op, "grad");
  same_device(st, inputs.h, op, "stats");
  check_row_grad(g, inputs.problem.rows, op);
  Tensor out = allocate_like(inputs.h);
  inputs.problem.out = out.mutable_data_ptr();
  cuda::variational_bound_backward(inputs.problem, tight, stats_rows(st), g.const_data_ptr(), is_wide(g),
                                   current_stream(inputs.h));
  return out;
}

Tensor dual_bound(const Tensor& logit_real, const Tensor& logit_fake, int64_t divergence, double alpha) {
  const char* op = "dual_bound";
  const DeviceGuard guard = guard_for(logit_fake, op, "logit_fake");
  const Tensor real = as_contiguous(logit_real), fake = as_contiguous(logit_fake);
  same_device(real, fake, op, "logit_real");
  const Storage storage = storage_of(fake, op, "logit_fake");
  const Rows real_rows = check_pair(real, fake, op, "logit_real", "logit_fake");
  const Rows rows = rows_of(fake, op, "logit_fake");
  Tensor values = new_values(fake);
  const Scratch scratch(cuda::dual_bound_workspace(storage, rows.rows, real_rows.n, rows.n), fake);
  cuda::dual_bound(storage, real.const_data_ptr(), fake.const_data_ptr(), rows.rows, real_rows.n, rows.n,
                   family_of(divergence, alpha, op), values.mutable_data_ptr(), is_wide(values),
                   scratch.data(), current_stream(fake));
  return values;
}

Tensor dual_output(const Tensor& logit, int64_t divergence, double alpha) {
  const DeviceGuard guard = guard_for(logit, "dual_output", "logit");
  const Tensor x = as_contiguous(logit);
  const Family family = family_of(divergence, alpha, "dual_output");
  const Storage storage = storage_of(x, "dual_output", "logit");
  Tensor out = allocate_like(x);
  cuda::dual_output(storage, x.const_data_ptr(), out.mutable_data_ptr(), static_cast<int64_t>(x.numel()),
                    family, current_stream(x));
  return out;
}

Tensor dual_slope(const Tensor& grad, const Tensor& logit, bool conjugate, int64_t divergence, double alpha) {
  const char* op = "dual_slope";
  const DeviceGuard guard = guard_for(logit, op, "logit");
  const Tensor x = as_contiguous(logit), g = as_contiguous(grad);
  same_device(g, x, op, "grad");
  const Family family = family_of(divergence, alpha, op);
  const Storage storage = storage_of(x, op, "logit");
  Tensor out = allocate_like(x);
  if (g.dim() == x.dim()) {
    check_slope(g, x);
    cuda::dual_slope(storage, x.const_data_ptr(), g.const_data_ptr(), nullptr, false, out.mutable_data_ptr(),
                     1, static_cast<int64_t>(x.numel()), family, conjugate, current_stream(x));
    return out;
  }
  const Rows rows = rows_of(x, op, "logit");
  check_row_grad(g, rows.rows, op);
  cuda::dual_slope(storage, x.const_data_ptr(), nullptr, g.const_data_ptr(), is_wide(g),
                   out.mutable_data_ptr(), rows.rows, rows.n, family, conjugate, current_stream(x));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(REFINE_EXT_LIBRARY, REFINE_EXT_CUDA_KEY, m) {
  m.impl("density_ratio", TORCH_BOX(&density_ratio));
  m.impl("density_ratio_out", TORCH_BOX(&density_ratio_out));
  m.impl("density_ratio_backward", TORCH_BOX(&density_ratio_backward));
  m.impl("variational_bound", TORCH_BOX(&variational_bound));
  m.impl("variational_bound_backward", TORCH_BOX(&variational_bound_backward));
  m.impl("dual_bound", TORCH_BOX(&dual_bound));
  m.impl("dual_output", TORCH_BOX(&dual_output));
  m.impl("dual_slope", TORCH_BOX(&dual_slope));
}

}  // namespace refine_ext::ops
