// Checks and allocation that the density-ratio ops of every device share.
#pragma once

#include "../math/density_ratio_problem.h"
#include "common.h"

namespace refine_ext::ops {

inline Family family_of(int64_t divergence, double alpha, const char* op) {
  require(divergence >= 0 && divergence < kDivergences, op, ": unknown divergence code ", divergence);
  return make_family(static_cast<Divergence>(divergence), alpha);
}

inline Rows rows_of(const Tensor& h, const char* op, const char* argument) {
  const int64_t dims = h.dim();
  require(dims >= 1, op, ": ", argument, " must have at least one dimension");
  const int64_t n = h.size(dims - 1);
  require(n > 0, op, ": ", argument, " must not be empty, got shape ", shape_of(h));
  return {static_cast<int64_t>(h.numel()) / n, n};
}

// [..., kStats] for h of shape [..., n].
inline Tensor new_stats(const Tensor& h) { return new_rows(h, kStats, ScalarType::Double); }

// [...] for h of shape [..., n]; a loss in half precision would round away what it measures.
inline Tensor new_values(const Tensor& h) {
  return new_rows(h, -1, h.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float);
}

inline RatioStats* stats_rows(const Tensor& stats) {
  return static_cast<RatioStats*>(stats.mutable_data_ptr());
}

struct Inputs {
  Tensor h;
  std::optional<Tensor> weights, shift;
  DensityRatioProblem problem;
};

inline Inputs gather(const Tensor& h_in, const std::optional<Tensor>& weights,
                     const std::optional<Tensor>& shift, int64_t divergence, double alpha, bool ratio) {
  const char* op = "density_ratio";
  Inputs inputs{as_contiguous(h_in), std::nullopt, std::nullopt, {}};
  const Tensor& h = inputs.h;
  const Rows rows = rows_of(h, op, "h");
  DensityRatioProblem& problem = inputs.problem;
  problem.storage = storage_of(h, op, "h");
  problem.h = h.const_data_ptr();
  problem.rows = rows.rows;
  problem.n = rows.n;
  problem.family = family_of(divergence, alpha, op);
  problem.output = ratio ? Output::ratio : Output::log_ratio;
  if (weights) {
    inputs.weights = as_contiguous(*weights);
    const bool shared = inputs.weights->dim() == 1;
    require(inputs.weights->scalar_type() == h.scalar_type(), op, ": base_weights must have the dtype of h");
    require(inputs.weights->size(inputs.weights->dim() - 1) == rows.n &&
                (shared || inputs.weights->numel() == h.numel()),
            op, ": base_weights must have shape ", shape_of(h), " or [", rows.n, "], got ",
            shape_of(*inputs.weights));
    problem.weights = inputs.weights->const_data_ptr();
    problem.weight_stride = shared ? 0 : rows.n;
  }
  if (shift) {
    inputs.shift = as_contiguous(*shift);
    require(inputs.shift->scalar_type() == ScalarType::Double, op, ": shift must be float64");
    const int64_t count = static_cast<int64_t>(inputs.shift->numel());
    require(count == 1 || count == rows.rows, op, ": shift must hold one value, or one for each of the ",
            rows.rows, " groups, got shape ", shape_of(*shift));
    problem.shift = static_cast<const double*>(inputs.shift->const_data_ptr());
    problem.shift_stride = count == 1 ? 0 : 1;
  }
  return inputs;
}

// out of density_ratio_out: written as it is, so it must match.
inline void check_out(const Tensor& out, const Tensor& h) {
  require(out.scalar_type() == h.scalar_type() && out.numel() == h.numel(),
          "density_ratio: out must have the dtype and number of elements of h, got shape ", shape_of(out));
  require(out.is_contiguous(), "density_ratio: out must be contiguous");
}

inline void check_backward(const Tensor& grad, const Tensor& log_ratio) {
  require(grad.scalar_type() == log_ratio.scalar_type() && grad.numel() == log_ratio.numel(),
          "density_ratio_backward: grad must have the shape and dtype of log_ratio");
}

// The rows of the real side of a bound, which must pair with those of the fake side.
inline Rows check_pair(const Tensor& real, const Tensor& fake, const char* op, const char* real_name,
                       const char* fake_name) {
  const Rows rows = rows_of(real, op, real_name), fake_rows = rows_of(fake, op, fake_name);
  require(real.scalar_type() == fake.scalar_type(), op, ": ", real_name, " and ", fake_name,
          " must have the same dtype");
  require(rows.rows == fake_rows.rows, op, ": ", real_name, " and ", fake_name,
          " must have the same number of groups, got ", shape_of(real), " and ", shape_of(fake));
  return rows;
}

inline void check_row_grad(const Tensor& grad, int64_t rows, const char* op) {
  require(static_cast<int64_t>(grad.numel()) == rows, op, ": grad must hold one value per group, got shape ",
          shape_of(grad));
  require(grad.scalar_type() == ScalarType::Double || grad.scalar_type() == ScalarType::Float, op,
          ": a grad of one value per group must be float32 or float64");
}

inline void check_slope(const Tensor& grad, const Tensor& logit) {
  require(grad.scalar_type() == logit.scalar_type() && grad.numel() == logit.numel(),
          "dual_slope: grad must have the shape and dtype of logit, got ", shape_of(grad), " and ",
          shape_of(logit));
}

}  // namespace refine_ext::ops
