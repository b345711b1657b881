// Checks, allocation and dispatch of the resampling family, CPU.
#include "../cpu/resampling.h"

#include <tuple>

#include "resampling.h"

namespace refine_ext::ops {
namespace {

using namespace draws;

std::string row_text(const DrawReport& report, int64_t rows) {
  return rows > 1 ? " (row " + std::to_string(report.row) + ")" : std::string();
}

Tensor resample(const Tensor& weights_in, int64_t num, const Tensor& seed_in, int64_t offset, int64_t method,
                bool log) {
  const char* op = "resample";
  const char* argument = log ? "log-weights" : "weights";
  const Tensor weights = as_contiguous(weights_in), seed = as_contiguous(seed_in);
  const Rows rows = check_resample(weights, num, method, op, argument);
  Tensor out = new_rows(weights, num, ScalarType::Long);
  int64_t* indices = static_cast<int64_t*>(out.mutable_data_ptr());
  advise_huge_pages(indices, rows.rows * num * static_cast<int64_t>(sizeof(int64_t)));
  const ResampleProblem problem{weights.const_data_ptr(),
                                storage_of(weights, op, argument),
                                log,
                                rows.rows,
                                rows.n,
                                num,
                                static_cast<ResampleMethod>(method),
                                seeds_of(seed, rows.rows, offset, op),
                                indices};
  const DrawReport report = resample_cpu(problem);
  require(report.error != DrawError::invalid, op, ": ", argument, " must hold no NaN or +inf",
          log ? "" : " and nothing negative", row_text(report, rows.rows));
  require(report.error != DrawError::no_mass, op, ": ", argument, " must not be all ", log ? "-inf" : "zero",
          row_text(report, rows.rows));
  return out;
}

// Values of a float64 tensor, one per row.
std::vector<double> per_row(const Tensor& values, int64_t rows, const char* op, const char* argument,
                            bool infinite) {
  require(values.scalar_type() == ScalarType::Double, op, ": ", argument, " must be a float64 tensor");
  const int64_t each = rows_each(values, rows, op, argument);
  const Tensor source = as_contiguous(values);
  const double* data = static_cast<const double*>(source.const_data_ptr());
  std::vector<double> result(rows);
  for (int64_t row = 0; row < rows; ++row) {
    result[row] = data[row / each];
    const bool allowed = result[row] < HUGE_VAL && (infinite || result[row] > -HUGE_VAL);
    require(allowed, op, ": ", argument, " must be finite", infinite ? " or -inf" : "", ", got ",
            result[row]);
  }
  return result;
}

std::tuple<Tensor, Tensor, Tensor> rejection(const Tensor& log_ratio_in,
                                             const std::optional<Tensor>& log_bound,
                                             const std::optional<Tensor>& gamma, double epsilon,
                                             const Tensor& seed_in, int64_t offset) {
  const char* op = "rejection";
  const Tensor log_ratio = as_contiguous(log_ratio_in), seed = as_contiguous(seed_in);
  const Rows rows = rows_of(log_ratio, op, "log_ratio");
  require(epsilon > 0.0 && epsilon < HUGE_VAL, op, ": epsilon must be positive, got ", epsilon);
  const std::vector<double> bound =
      log_bound ? per_row(*log_bound, rows.rows, op, "log_bound", true) : std::vector<double>();
  const std::vector<double> shift =
      gamma ? per_row(*gamma, rows.rows, op, "gamma", false) : std::vector<double>();
  Tensor keep = new_rows(log_ratio, rows.n, ScalarType::Bool);
  Tensor new_bound = new_rows(log_ratio, -1, ScalarType::Double);
  Tensor accepted = new_rows(log_ratio, -1, ScalarType::Long);
  const RejectionProblem problem{log_ratio.const_data_ptr(),
                                 storage_of(log_ratio, op, "log_ratio"),
                                 rows.rows,
                                 rows.n,
                                 log_bound ? bound.data() : nullptr,
                                 gamma ? shift.data() : nullptr,
                                 epsilon,
                                 seeds_of(seed, rows.rows, offset, op),
                                 static_cast<bool*>(keep.mutable_data_ptr()),
                                 static_cast<double*>(new_bound.mutable_data_ptr()),
                                 static_cast<int64_t*>(accepted.mutable_data_ptr())};
  const DrawReport report = rejection_cpu(problem);
  require(report.error == DrawError::none, op, ": log_ratio must hold no NaN or +inf",
          row_text(report, rows.rows));
  return {keep, new_bound, accepted};
}

std::tuple<Tensor, Tensor> metropolis(const Tensor& log_ratio_in, int64_t num, int64_t chains,
                                      int64_t burn_in, int64_t thin, bool in_order,
                                      const std::optional<Tensor>& initial, const Tensor& seed_in) {
  const char* op = "metropolis";
  const Tensor log_ratio = as_contiguous(log_ratio_in), seed = as_contiguous(seed_in);
  const int64_t n = check_metropolis(log_ratio, num, chains, burn_in, thin, in_order, initial, seed, op);
  const std::vector<double> start =
      initial ? per_row(*initial, chains, op, "initial", true) : std::vector<double>();
  const int64_t sizes[2] = {chains, num};
  Tensor out = allocate(sizes, 2, ScalarType::Long, log_ratio);
  Tensor accepted = allocate(sizes, 1, ScalarType::Long, log_ratio);
  const MetropolisProblem problem{log_ratio.const_data_ptr(),
                                  storage_of(log_ratio, op, "log_ratio"),
                                  n,
                                  num,
                                  chains,
                                  burn_in,
                                  thin,
                                  initial ? start.data() : nullptr,
                                  in_order,
                                  *static_cast<const int64_t*>(seed.const_data_ptr()),
                                  static_cast<int64_t*>(out.mutable_data_ptr()),
                                  static_cast<int64_t*>(accepted.mutable_data_ptr())};
  require(metropolis_cpu(problem).error == DrawError::none, op, ": log_ratio must hold no NaN or +inf");
  return {out, accepted};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(refine_ext, CPU, m) {
  m.impl("resample", TORCH_BOX(&resample));
  m.impl("rejection", TORCH_BOX(&rejection));
  m.impl("metropolis", TORCH_BOX(&metropolis));
}

}  // namespace refine_ext::ops
