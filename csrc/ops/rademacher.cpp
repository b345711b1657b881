// Checks, allocation and dispatch of the Rademacher ops, CPU.
#include "rademacher.h"

#include "../cpu/rademacher.h"

namespace refine_ext::ops {
namespace {

using namespace complexity;

std::tuple<Tensor, Tensor, Tensor> rademacher_suprema(const Tensor& outputs_in, int64_t draws,
                                                      int64_t first_draw, int64_t seed, int64_t supremum,
                                                      int64_t digits) {
  const char* op = "rademacher";
  const Tensor outputs = with_contiguous_columns(outputs_in, op);
  check_draws(draws, first_draw, op);
  const Suprema out = allocate_suprema(outputs, draws);
  rademacher_suprema_cpu(suprema_problem(outputs, draws, first_draw, seed, supremum, digits, out, op));
  return {out.suprema, out.index, out.largest};
}

void rademacher_sums(const Tensor& sums, const Tensor& outputs_in, int64_t first_row, int64_t first_draw,
                     int64_t seed) {
  const char* op = "rademacher_sums";
  const Tensor outputs = with_contiguous_columns(outputs_in, op);
  rademacher_sums_cpu(sums_problem(sums, outputs, first_row, first_draw, seed, op));
}

Tensor rademacher_backward(const Tensor& grad_in, const Tensor& index_in, const Tensor& outputs,
                           int64_t first_draw, int64_t seed) {
  const char* op = "rademacher_backward";
  const Tensor grad = as_contiguous(grad_in), index = as_contiguous(index_in);
  Tensor out = allocate_like(outputs);
  rademacher_backward_cpu(backward_problem(grad, index, first_draw, seed, out, op));
  return out;
}

Tensor multipliers(const Tensor& like, int64_t n, int64_t draws, int64_t first_row, int64_t first_draw,
                   int64_t seed, bool normal) {
  const char* op = "multipliers";
  Tensor out = allocate_multipliers(like, n, draws, op);
  multipliers_cpu(multipliers_problem(out, first_row, first_draw, seed, normal, op));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(refine_ext, CPU, m) {
  m.impl("rademacher_suprema", TORCH_BOX(&rademacher_suprema));
  m.impl("rademacher_sums", TORCH_BOX(&rademacher_sums));
  m.impl("rademacher_backward", TORCH_BOX(&rademacher_backward));
  m.impl("multipliers", TORCH_BOX(&multipliers));
}

}  // namespace refine_ext::ops
