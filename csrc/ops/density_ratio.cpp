// Checks, allocation and dispatch of the density-ratio ops, CPU.
#include "../cpu/density_ratio.h"

#include "density_ratio.h"

namespace refine_ext::ops {
namespace {

void set_value(const Tensor& values, int64_t row, double value) {
  if (values.scalar_type() == ScalarType::Double) {
    static_cast<double*>(values.mutable_data_ptr())[row] = value;
  } else {
    static_cast<float*>(values.mutable_data_ptr())[row] = static_cast<float>(value);
  }
}

double value_at(const Tensor& values, int64_t row) {
  return values.scalar_type() == ScalarType::Double ? static_cast<const double*>(values.const_data_ptr())[row]
                                                    : static_cast<const float*>(values.const_data_ptr())[row];
}

void raise(const RatioReport& report, const char* op, const char* argument, int64_t rows) {
  if (report.error == RatioError::none) return;
  const std::string where = rows > 1 ? " (group " + std::to_string(report.row) + ")" : std::string();
  switch (report.error) {
    case RatioError::invalid_input:
      fail(op, ": ", argument,
           " must hold no NaN or +inf, at least one finite value, and base weights that are finite, ",
           "non-negative and not all zero", where);
    case RatioError::outside_domain:
      if (std::string(op) == "variational_bound") {
        fail(op, ": ", argument, " lies outside the domain of f*", where,
             "; tight=True and kind=\"logit\" take any values");
      }
      fail(op, ": shift puts ", argument, " outside the domain of f*", where,
           ": h - shift must stay below its supremum");
    default:
      fail(op, ": the shift search did not converge", where,
           "; this is a bug, please report it with the input");
  }
}

Tensor density_ratio_into(Inputs& inputs, const Tensor& out, bool check) {
  inputs.problem.out = out.mutable_data_ptr();
  Tensor stats = new_stats(inputs.h);
  const RatioReport report = density_ratio_cpu(inputs.problem, stats_rows(stats));
  if (check) {
    if (const DensityRatioProblem& problem = inputs.problem;
        report.error == RatioError::invalid_input && problem.shift) {
      const double shift = problem.shift[report.row * problem.shift_stride];
      require(shift - shift == 0.0, "density_ratio: shift must be finite, got ", shift);
    }
    raise(report, "density_ratio", "h", inputs.problem.rows);
  }
  return stats;
}

std::tuple<Tensor, Tensor> density_ratio(const Tensor& h, std::optional<Tensor> base_weights,
                                         std::optional<Tensor> shift, int64_t divergence, double alpha,
                                         bool ratio, bool check) {
  Inputs inputs = gather(h, base_weights, shift, divergence, alpha, ratio);
  Tensor out = allocate_like(inputs.h);
  Tensor stats = density_ratio_into(inputs, out, check);
  return {out, stats};
}

Tensor density_ratio_out(const Tensor& h, std::optional<Tensor> base_weights, std::optional<Tensor> shift,
                         int64_t divergence, double alpha, bool ratio, bool check, Tensor out) {
  Inputs inputs = gather(h, base_weights, shift, divergence, alpha, ratio);
  check_out(out, h);
  return density_ratio_into(inputs, out, check);
}

Tensor density_ratio_backward(const Tensor& grad, const Tensor& grad_stats, const Tensor& log_ratio,
                              const Tensor& stats, std::optional<Tensor> base_weights, bool solved,
                              int64_t divergence, double alpha) {
  const Tensor x = as_contiguous(log_ratio), g = as_contiguous(grad), gs = as_contiguous(grad_stats),
               st = as_contiguous(stats);
  Inputs inputs = gather(x, base_weights, std::nullopt, divergence, alpha, false);
  check_backward(g, x);
  Tensor out = allocate_like(x);
  inputs.problem.out = out.mutable_data_ptr();
  density_ratio_backward_cpu(inputs.problem, x.const_data_ptr(), g.const_data_ptr(), stats_rows(st),
                             static_cast<const double*>(gs.const_data_ptr()), solved);
  return out;
}

std::tuple<Tensor, Tensor> variational_bound(const Tensor& h_real, const Tensor& h_fake, bool tight,
                                             int64_t divergence, double alpha) {
  const char* op = "variational_bound";
  const Tensor real = as_contiguous(h_real);
  const double zero = 0.0;
  Inputs inputs = gather(h_fake, std::nullopt, std::nullopt, divergence, alpha, false);
  DensityRatioProblem& problem = inputs.problem;
  problem.output = Output::none;
  if (!tight) problem.shift = &zero, problem.shift_stride = 0;
  const Rows rows = check_pair(real, inputs.h, op, "h_real", "h_fake");
  Tensor stats = new_stats(inputs.h);
  Tensor values = new_values(inputs.h);
  std::vector<double> conjugate(problem.rows);
  raise(conjugate_mean_cpu(problem, stats_rows(stats), conjugate.data()), op, "h_fake", problem.rows);
  const int64_t row_bytes = rows.n * static_cast<int64_t>(real.element_size());
  for (int64_t row = 0; row < rows.rows; ++row) {
    const double mean =
        mean_cpu(problem.storage, static_cast<const char*>(real.const_data_ptr()) + row * row_bytes, rows.n);
    require(mean - mean == 0.0, op, ": h_real must be finite");
    set_value(values, row, mean - (tight ? stats_rows(stats)[row].shift : 0.0) - conjugate[row]);
  }
  return {values, stats};
}

// -grad * r / n: the envelope theorem, the shift's own movement does not count.
Tensor variational_bound_backward(const Tensor& grad, const Tensor& h_fake, const Tensor& stats, bool tight,
                                  int64_t divergence, double alpha) {
  Inputs inputs = gather(h_fake, std::nullopt, std::nullopt, divergence, alpha, true);
  const Tensor g = as_contiguous(grad), st = as_contiguous(stats);
  DensityRatioProblem& problem = inputs.problem;
  check_row_grad(g, problem.rows, "variational_bound_backward");
  Tensor out = allocate_like(inputs.h);
  const int64_t row_bytes = problem.n * static_cast<int64_t>(out.element_size());
  char* data = static_cast<char*>(out.mutable_data_ptr());
  const char* h = static_cast<const char*>(problem.h);
  const int64_t rows = problem.rows;
  problem.rows = 1;
  for (int64_t row = 0; row < rows; ++row) {
    problem.out = data + row * row_bytes;
    problem.h = h + row * row_bytes;
    scaled_ratio_cpu(problem, stats_rows(st) + row, tight,
                     -value_at(g, row) / static_cast<double>(problem.n));
  }
  return out;
}

// E f'(e^l) over real logits minus E f*(f'(e^l)) over generated ones.
Tensor dual_bound(const Tensor& logit_real, const Tensor& logit_fake, int64_t divergence, double alpha) {
  const char* op = "dual_bound";
  const Tensor real = as_contiguous(logit_real), fake = as_contiguous(logit_fake);
  const Family family = family_of(divergence, alpha, op);
  const Storage storage = storage_of(fake, op, "logit_fake");
  const Rows real_rows = check_pair(real, fake, op, "logit_real", "logit_fake");
  const Rows fake_rows = rows_of(fake, op, "logit_fake");
  Tensor values = new_values(fake);
  const int64_t size = static_cast<int64_t>(fake.element_size());
  for (int64_t row = 0; row < fake_rows.rows; ++row) {
    const void* r = static_cast<const char*>(real.const_data_ptr()) + row * real_rows.n * size;
    const void* f = static_cast<const char*>(fake.const_data_ptr()) + row * fake_rows.n * size;
    const double value =
        dual_sum_cpu(storage, r, real_rows.n, family, false) / static_cast<double>(real_rows.n) -
        dual_sum_cpu(storage, f, fake_rows.n, family, true) / static_cast<double>(fake_rows.n);
    set_value(values, row, value);
  }
  return values;
}

Tensor dual_output(const Tensor& logit, int64_t divergence, double alpha) {
  const Tensor x = as_contiguous(logit);
  Tensor out = allocate_like(x);
  dual_output_cpu(storage_of(x, "dual_output", "logit"), x.const_data_ptr(), out.mutable_data_ptr(),
                  static_cast<int64_t>(x.numel()), family_of(divergence, alpha, "dual_output"));
  return out;
}

// grad times d f'(e^l)/dl, or d f*(f'(e^l))/dl; grad has the shape of logit, or one value per group in
// float32 or float64.
Tensor dual_slope(const Tensor& grad, const Tensor& logit, bool conjugate, int64_t divergence, double alpha) {
  const char* op = "dual_slope";
  const Tensor x = as_contiguous(logit), g = as_contiguous(grad);
  const Family family = family_of(divergence, alpha, op);
  const Storage storage = storage_of(x, op, "logit");
  Tensor out = allocate_like(x);
  char* data = static_cast<char*>(out.mutable_data_ptr());
  const char* input = static_cast<const char*>(x.const_data_ptr());
  if (g.dim() == x.dim()) {
    check_slope(g, x);
    dual_slope_cpu(storage, input, g.const_data_ptr(), 1.0, data, static_cast<int64_t>(x.numel()), family,
                   conjugate);
    return out;
  }
  const Rows rows = rows_of(x, op, "logit");
  check_row_grad(g, rows.rows, op);
  const int64_t row_bytes = rows.n * static_cast<int64_t>(x.element_size());
  for (int64_t row = 0; row < rows.rows; ++row) {
    dual_slope_cpu(storage, input + row * row_bytes, nullptr, value_at(g, row), data + row * row_bytes,
                   rows.n, family, conjugate);
  }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(refine_ext, CPU, m) {
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
