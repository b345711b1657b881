// Checks, allocation and dispatch of the resampling family, CPU.
#include "../cpu/resampling.h"

#include <algorithm>
#include <cmath>
#include <tuple>

#include "common.h"

namespace refine_ext::ops {
namespace {

Storage storage_of(const Tensor& tensor, const char* op, const char* argument) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Storage::float32;
    case ScalarType::Double:
      return Storage::float64;
    case ScalarType::Half:
      return Storage::float16;
    case ScalarType::BFloat16:
      return Storage::bfloat16;
    default:
      fail(op, ": ", argument, " must be float64, float32, float16 or bfloat16");
  }
}

// Allocates [..., last], or [...] for last < 0, where `like` is [..., n].
Tensor new_rows(const Tensor& like, int64_t last, ScalarType type) {
  int64_t sizes[16];
  const int64_t dims = like.dim();
  require(dims <= 16, "tensors of more than 16 dimensions are not supported, got ", dims);
  for (int64_t d = 0; d + 1 < dims; ++d) sizes[d] = like.size(d);
  if (last >= 0) sizes[dims - 1] = last;
  return allocate(sizes, last >= 0 ? dims : dims - 1, type, like);
}

struct Rows {
  int64_t rows, n;
};

Rows rows_of(const Tensor& x, const char* op, const char* argument) {
  const int64_t dims = x.dim();
  require(dims >= 1, op, ": ", argument, " must have at least one dimension, got a 0-dim tensor");
  int64_t rows = 1;
  for (int64_t d = 0; d + 1 < dims; ++d) rows *= x.size(d);
  return {rows, x.size(dims - 1)};
}

// How many consecutive rows each of the `values` serves.
int64_t rows_each(const Tensor& values, int64_t rows, const char* op, const char* argument) {
  const int64_t count = static_cast<int64_t>(values.numel());
  require(count > 0 ? rows % count == 0 : rows == 0, op, ": ", argument,
          " must hold one value, or one for each of the leading dimensions (", rows, " rows), got shape ",
          shape_of(values));
  return count > 0 ? std::max<int64_t>(1, rows / count) : 1;
}

DrawSeeds seeds_of(const Tensor& seed, int64_t rows, int64_t offset, const char* op) {
  require(seed.scalar_type() == ScalarType::Long, op, ": seed must be an int64 tensor");
  return {static_cast<const int64_t*>(seed.const_data_ptr()), rows_each(seed, rows, op, "seed"),
          static_cast<uint64_t>(offset)};
}

std::string row_text(const DrawReport& report, int64_t rows) {
  return rows > 1 ? " (row " + std::to_string(report.row) + ")" : std::string();
}

Tensor resample(const Tensor& weights_in, int64_t num, const Tensor& seed_in, int64_t offset, int64_t method,
                bool log) {
  const char* op = "resample";
  const char* argument = log ? "log-weights" : "weights";
  const Tensor weights = as_contiguous(weights_in), seed = as_contiguous(seed_in);
  const Rows rows = rows_of(weights, op, argument);
  require(num >= 0 && num <= kMostDraws, op, ": num must be between 0 and 2^40, got ", num);
  require(method >= 0 && method <= static_cast<int64_t>(ResampleMethod::residual), op,
          ": unknown method code ", method);
  require(rows.n > 0 || rows.rows == 0, op, ": ", argument, " must not be empty, got shape ",
          shape_of(weights));
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
  require(log_ratio.dim() == 1 && log_ratio.size(0) > 0, op,
          ": log_ratio must be 1-D and not empty, got shape ", shape_of(log_ratio));
  require(num >= 0 && num <= kMostDraws, op, ": num must be between 0 and 2^40, got ", num);
  require(chains >= 1, op, ": chains must be at least 1, got ", chains);
  require(burn_in >= 0 && burn_in <= kMostDraws, op, ": burn_in must be between 0 and 2^40, got ", burn_in);
  require(thin >= 1 && thin <= (int64_t{1} << 20), op, ": thin must be between 1 and 2^20, got ", thin);
  require(seed.scalar_type() == ScalarType::Long && seed.numel() == 1, op, ": seed must be one int64 value");
  const int64_t n = log_ratio.size(0), steps = metropolis_steps(num, burn_in, thin);
  require(!in_order || steps <= n / chains, op,
          ": order 'given' needs chains * (burn_in + (num - 1) * thin + 1) = ", chains, " * ", steps,
          " samples, got ", n);
  require(!initial || initial->numel() == 1 || static_cast<int64_t>(initial->numel()) == chains, op,
          ": initial must hold one value, or one per chain (", chains, "), got shape ",
          initial ? shape_of(*initial) : "");
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
