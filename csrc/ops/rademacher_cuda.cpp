// Checks, allocation and dispatch of the Rademacher ops, CUDA.
#include "../cuda/rademacher.h"
#include "cuda.h"
#include "rademacher.h"

namespace refine_ext::ops {
namespace {

using namespace complexity;

std::tuple<Tensor, Tensor, Tensor> rademacher_suprema(const Tensor& outputs_in, int64_t draws,
                                                      int64_t first_draw, int64_t seed, int64_t supremum,
                                                      int64_t digits) {
  const char* op = "rademacher";
  const DeviceGuard guard = guard_for(outputs_in, op, "outputs");
  const Tensor outputs = with_contiguous_columns(outputs_in, op);
  check_draws(draws, first_draw, op);
  const Suprema out = allocate_suprema(outputs, draws);
  const RademacherProblem problem =
      suprema_problem(outputs, draws, first_draw, seed, supremum, digits, out, op);
  const Scratch scratch(cuda::rademacher_suprema_workspace(problem), outputs);
  cuda::rademacher_suprema(problem, scratch.data(), current_stream(outputs));
  return {out.suprema, out.index, out.largest};
}

void rademacher_sums(const Tensor& sums, const Tensor& outputs_in, int64_t first_row, int64_t first_draw,
                     int64_t seed) {
  const char* op = "rademacher_sums";
  const DeviceGuard guard = guard_for(outputs_in, op, "outputs");
  same_device(sums, outputs_in, op, "sums");
  const Tensor outputs = with_contiguous_columns(outputs_in, op);
  const RademacherSumsProblem problem = sums_problem(sums, outputs, first_row, first_draw, seed, op);
  const Scratch scratch(cuda::rademacher_sums_workspace(problem), outputs);
  cuda::rademacher_sums(problem, scratch.data(), current_stream(outputs));
}

Tensor rademacher_backward(const Tensor& grad_in, const Tensor& index_in, const Tensor& outputs,
                           int64_t first_draw, int64_t seed) {
  const char* op = "rademacher_backward";
  const DeviceGuard guard = guard_for(outputs, op, "outputs");
  same_device(grad_in, outputs, op, "grad");
  same_device(index_in, outputs, op, "index");
  const Tensor grad = as_contiguous(grad_in), index = as_contiguous(index_in);
  Tensor out = allocate_like(outputs);
  cuda::rademacher_backward(backward_problem(grad, index, first_draw, seed, out, op), current_stream(out));
  return out;
}

Tensor multipliers(const Tensor& like, int64_t n, int64_t draws, int64_t first_row, int64_t first_draw,
                   int64_t seed, bool normal) {
  const char* op = "multipliers";
  const DeviceGuard guard = guard_for(like, op, "like");
  Tensor out = allocate_multipliers(like, n, draws, op);
  cuda::multipliers(multipliers_problem(out, first_row, first_draw, seed, normal, op), current_stream(out));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(REFINE_EXT_LIBRARY, REFINE_EXT_CUDA_KEY, m) {
  m.impl("rademacher_suprema", TORCH_BOX(&rademacher_suprema));
  m.impl("rademacher_sums", TORCH_BOX(&rademacher_sums));
  m.impl("rademacher_backward", TORCH_BOX(&rademacher_backward));
  m.impl("multipliers", TORCH_BOX(&multipliers));
}

}  // namespace refine_ext::ops
