// Checks, allocation and dispatch of the density-ratio ops, CPU.
#include "../cpu/density_ratio.h"

#include "common.h"

namespace refine_ext::ops {
namespace {

Storage storage_of(const Tensor& tensor, const char* op, const char* argument) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Storage::float32;
    case ScalarType::Double: return Storage::float64;
    case ScalarType::Half: return Storage::float16;
    case ScalarType::BFloat16: return Storage::bfloat16;
    default: fail(op, ": ", argument, " must be float64, float32, float16 or bfloat16");
  }
}

Family family_of(int64_t divergence, double alpha, const char* op) {
  require(divergence >= 0 && divergence < kDivergences, op, ": unknown divergence code ", divergence);
  return make_family(static_cast<Divergence>(divergence), alpha);
}

struct Rows {
  int64_t rows, n;
};

Rows rows_of(const Tensor& h, const char* op, const char* argument) {
  const int64_t dims = h.dim();
  require(dims >= 1, op, ": ", argument, " must have at least one dimension");
  const int64_t n = h.size(dims - 1);
  require(n > 0, op, ": ", argument, " must not be empty, got shape ", shape_of(h));
  return {static_cast<int64_t>(h.numel()) / n, n};
}

// [..., kStats] for h of shape [..., n].
Tensor new_stats(const Tensor& h) {
  int64_t sizes[16];
  const int64_t dims = h.dim();
  require(dims <= 16, "tensors of more than 16 dimensions are not supported, got ", dims);
  for (int64_t d = 0; d + 1 < dims; ++d) sizes[d] = h.size(d);
  sizes[dims - 1] = kStats;
  return allocate(sizes, dims, ScalarType::Double, h);
}

// [...] for h of shape [..., n]; a loss in half precision would round away what it measures.
Tensor new_values(const Tensor& h) {
  int64_t sizes[16];
  for (int64_t d = 0; d + 1 < h.dim(); ++d) sizes[d] = h.size(d);
  return allocate(sizes, h.dim() - 1, h.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float, h);
}

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

RatioStats* stats_rows(const Tensor& stats) { return static_cast<RatioStats*>(stats.mutable_data_ptr()); }

void raise(const RatioReport& report, const char* op, const char* argument, int64_t rows) {
  if (report.error == RatioError::none) return;
  const std::string where = rows > 1 ? " (group " + std::to_string(report.row) + ")" : std::string();
  switch (report.error) {
    case RatioError::invalid_input:
      fail(op, ": ", argument, " must hold no NaN or +inf, at least one finite value, and base weights that are finite, ",
           "non-negative and not all zero", where);
    case RatioError::outside_domain:
      fail(op, ": shift puts ", argument, " outside the domain of f*", where,
           ": h - shift must stay below its supremum");
    default: fail(op, ": the shift search did not converge", where, "; this is a bug, please report it with the input");
  }
}

struct Inputs {
  Tensor h;
  std::optional<Tensor> weights, shift;
  DensityRatioProblem problem;
};

Inputs gather(const Tensor& h_in, const std::optional<Tensor>& weights, const std::optional<Tensor>& shift,
              int64_t divergence, double alpha, bool ratio) {
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
            op, ": base_weights must have shape ", shape_of(h), " or [", rows.n, "], got ", shape_of(*inputs.weights));
    problem.weights = inputs.weights->const_data_ptr();
    problem.weight_stride = shared ? 0 : rows.n;
  }
  if (shift) {
    inputs.shift = as_contiguous(*shift);
    require(inputs.shift->scalar_type() == ScalarType::Double, op, ": shift must be float64");
    const int64_t count = static_cast<int64_t>(inputs.shift->numel());
    require(count == 1 || count == rows.rows, op, ": shift must hold one value, or one for each of the ", rows.rows,
            " groups, got shape ", shape_of(*shift));
    problem.shift = static_cast<const double*>(inputs.shift->const_data_ptr());
    problem.shift_stride = count == 1 ? 0 : 1;
  }
  return inputs;
}

Tensor density_ratio_into(Inputs& inputs, const Tensor& out, bool check) {
  inputs.problem.out = out.mutable_data_ptr();
  Tensor stats = new_stats(inputs.h);
  const RatioReport report = density_ratio_cpu(inputs.problem, stats_rows(stats));
  if (check) raise(report, "density_ratio", "h", inputs.problem.rows);
  return stats;
}

std::tuple<Tensor, Tensor> density_ratio(const Tensor& h, std::optional<Tensor> base_weights,
                                         std::optional<Tensor> shift, int64_t divergence, double alpha, bool ratio,
                                         bool check) {
  Inputs inputs = gather(h, base_weights, shift, divergence, alpha, ratio);
  Tensor out = allocate_like(inputs.h);
  Tensor stats = density_ratio_into(inputs, out, check);
  return {out, stats};
}

Tensor density_ratio_out(const Tensor& h, std::optional<Tensor> base_weights, std::optional<Tensor> shift,
                         int64_t divergence, double alpha, bool ratio, bool check, Tensor out) {
  Inputs inputs = gather(h, base_weights, shift, divergence, alpha, ratio);
  require(out.scalar_type() == h.scalar_type() && out.numel() == h.numel(),
          "density_ratio: out must have the dtype and number of elements of h, got shape ", shape_of(out));
  require(out.is_contiguous(), "density_ratio: out must be contiguous");
  return density_ratio_into(inputs, out, check);
}

Tensor density_ratio_backward(const Tensor& grad, const Tensor& grad_stats, const Tensor& log_ratio,
                              const Tensor& stats, std::optional<Tensor> base_weights, bool solved, int64_t divergence,
                              double alpha) {
  const Tensor x = as_contiguous(log_ratio), g = as_contiguous(grad), gs = as_contiguous(grad_stats), st = as_contiguous(stats);
  Inputs inputs = gather(x, base_weights, std::nullopt, divergence, alpha, false);
  require(g.scalar_type() == x.scalar_type() && g.numel() == x.numel(),
          "density_ratio_backward: grad must have the shape and dtype of log_ratio");
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
  const Rows rows = rows_of(real, op, "h_real");
  require(real.scalar_type() == inputs.h.scalar_type(), op, ": h_real and h_fake must have the same dtype");
  require(rows.rows == problem.rows, op, ": h_real and h_fake must have the same number of groups, got ",
          shape_of(h_real), " and ", shape_of(h_fake));
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
  require(static_cast<int64_t>(g.numel()) == problem.rows, "variational_bound_backward: grad must hold one value per group");
  Tensor out = allocate_like(inputs.h);
  const int64_t row_bytes = problem.n * static_cast<int64_t>(out.element_size());
  char* data = static_cast<char*>(out.mutable_data_ptr());
  const char* h = static_cast<const char*>(problem.h);
  const int64_t rows = problem.rows;
  problem.rows = 1;
  for (int64_t row = 0; row < rows; ++row) {
    problem.out = data + row * row_bytes;
    problem.h = h + row * row_bytes;
    scaled_ratio_cpu(problem, stats_rows(st) + row, tight, -value_at(g, row) / static_cast<double>(problem.n));
  }
  return out;
}

// E f'(e^l) over real logits minus E f*(f'(e^l)) over generated ones.
Tensor dual_bound(const Tensor& logit_real, const Tensor& logit_fake, int64_t divergence, double alpha) {
  const char* op = "dual_bound";
  const Tensor real = as_contiguous(logit_real), fake = as_contiguous(logit_fake);
  const Family family = family_of(divergence, alpha, op);
  const Storage storage = storage_of(fake, op, "logit_fake");
  const Rows real_rows = rows_of(real, op, "logit_real"), fake_rows = rows_of(fake, op, "logit_fake");
  require(real.scalar_type() == fake.scalar_type(), op, ": logit_real and logit_fake must have the same dtype");
  require(real_rows.rows == fake_rows.rows, op, ": logit_real and logit_fake must have the same number of groups");
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

// grad times d f'(e^l)/dl, or d f*(f'(e^l))/dl; grad has the shape of logit, or one value per group in float32 or float64.
Tensor dual_slope(const Tensor& grad, const Tensor& logit, bool conjugate, int64_t divergence, double alpha) {
  const char* op = "dual_slope";
  const Tensor x = as_contiguous(logit), g = as_contiguous(grad);
  const Family family = family_of(divergence, alpha, op);
  const Storage storage = storage_of(x, op, "logit");
  Tensor out = allocate_like(x);
  char* data = static_cast<char*>(out.mutable_data_ptr());
  const char* input = static_cast<const char*>(x.const_data_ptr());
  if (g.dim() == x.dim()) {
    require(g.scalar_type() == x.scalar_type() && g.numel() == x.numel(), op,
            ": grad must have the shape and dtype of logit, got ", shape_of(grad), " and ", shape_of(logit));
    dual_slope_cpu(storage, input, g.const_data_ptr(), 1.0, data, static_cast<int64_t>(x.numel()), family, conjugate);
    return out;
  }
  const Rows rows = rows_of(x, op, "logit");
  require(static_cast<int64_t>(g.numel()) == rows.rows, op, ": grad must hold one value per group");
  const int64_t row_bytes = rows.n * static_cast<int64_t>(x.element_size());
  for (int64_t row = 0; row < rows.rows; ++row) {
    dual_slope_cpu(storage, input + row * row_bytes, nullptr, value_at(g, row), data + row * row_bytes, rows.n, family,
                   conjugate);
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
