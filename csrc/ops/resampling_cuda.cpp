// Checks, allocation and dispatch of the resampling family, CUDA. Nothing here waits for the device, so that
// what only the data can tell is no error: invalid rows draw index 0 and keep nothing, with NaN for a bound.
#include <tuple>

#include "../cuda/resampling.h"
#include "cuda.h"
#include "resampling.h"

namespace refine_ext::ops {
namespace {

using namespace draws;

Tensor resample(const Tensor& weights_in, int64_t num, const Tensor& seed_in, int64_t offset, int64_t method,
                bool log) {
  const char* op = "resample";
  const char* argument = log ? "log-weights" : "weights";
  const DeviceGuard guard = guard_for(weights_in, op, argument);
  const Tensor weights = as_contiguous(weights_in), seed = as_contiguous(seed_in);
  same_device(seed, weights, op, "seed");
  const Rows rows = check_resample(weights, num, method, op, argument);
  Tensor out = new_rows(weights, num, ScalarType::Long);
  const ResampleProblem problem{weights.const_data_ptr(),
                                storage_of(weights, op, argument),
                                log,
                                rows.rows,
                                rows.n,
                                num,
                                static_cast<ResampleMethod>(method),
                                seeds_of(seed, rows.rows, offset, op),
                                static_cast<int64_t*>(out.mutable_data_ptr())};
  const Scratch scratch(cuda::resample_workspace(problem), weights);
  cuda::resample(problem, scratch.data(), current_stream(weights));
  return out;
}

// A float64 tensor of one value for every so many rows.
struct RowValues {
  std::optional<Tensor> values;
  int64_t each = 1;

  RowValues(const std::optional<Tensor>& given, int64_t rows, const Tensor& like, const char* op,
            const char* argument) {
    if (!given) return;
    same_device(*given, like, op, argument);
    require(given->scalar_type() == ScalarType::Double, op, ": ", argument, " must be a float64 tensor");
    each = rows_each(*given, rows, op, argument);
    values = as_contiguous(*given);
  }
  const double* data() const {
    return values ? static_cast<const double*>(values->const_data_ptr()) : nullptr;
  }
};

std::tuple<Tensor, Tensor, Tensor> rejection(const Tensor& log_ratio_in,
                                             const std::optional<Tensor>& log_bound,
                                             const std::optional<Tensor>& gamma, double epsilon,
                                             const Tensor& seed_in, int64_t offset) {
  const char* op = "rejection";
  const DeviceGuard guard = guard_for(log_ratio_in, op, "log_ratio");
  const Tensor log_ratio = as_contiguous(log_ratio_in), seed = as_contiguous(seed_in);
  same_device(seed, log_ratio, op, "seed");
  const Rows rows = rows_of(log_ratio, op, "log_ratio");
  require(epsilon > 0.0 && epsilon < HUGE_VAL, op, ": epsilon must be positive, got ", epsilon);
  const RowValues bound(log_bound, rows.rows, log_ratio, op, "log_bound");
  const RowValues shift(gamma, rows.rows, log_ratio, op, "gamma");
  Tensor keep = new_rows(log_ratio, rows.n, ScalarType::Bool);
  Tensor new_bound = new_rows(log_ratio, -1, ScalarType::Double);
  Tensor accepted = new_rows(log_ratio, -1, ScalarType::Long);
  const RejectionProblem problem{log_ratio.const_data_ptr(),
                                 storage_of(log_ratio, op, "log_ratio"),
                                 rows.rows,
                                 rows.n,
                                 bound.data(),
                                 shift.data(),
                                 epsilon,
                                 seeds_of(seed, rows.rows, offset, op),
                                 static_cast<bool*>(keep.mutable_data_ptr()),
                                 static_cast<double*>(new_bound.mutable_data_ptr()),
                                 static_cast<int64_t*>(accepted.mutable_data_ptr())};
  const Scratch scratch(cuda::rejection_workspace(problem), log_ratio);
  cuda::rejection(problem, bound.each, shift.each, scratch.data(), current_stream(log_ratio));
  return {keep, new_bound, accepted};
}

std::tuple<Tensor, Tensor> metropolis(const Tensor& log_ratio_in, int64_t num, int64_t chains,
                                      int64_t burn_in, int64_t thin, bool in_order,
                                      const std::optional<Tensor>& initial, const Tensor& seed_in) {
  const char* op = "metropolis";
  const DeviceGuard guard = guard_for(log_ratio_in, op, "log_ratio");
  const Tensor log_ratio = as_contiguous(log_ratio_in), seed = as_contiguous(seed_in);
  same_device(seed, log_ratio, op, "seed");
  const int64_t n = check_metropolis(log_ratio, num, chains, burn_in, thin, in_order, initial, seed, op);
  const RowValues start(initial, chains, log_ratio, op, "initial");
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
                                  start.data(),
                                  in_order,
                                  0,
                                  static_cast<int64_t*>(out.mutable_data_ptr()),
                                  static_cast<int64_t*>(accepted.mutable_data_ptr())};
  const Scratch scratch(cuda::metropolis_workspace(problem), log_ratio);
  cuda::metropolis(problem, static_cast<const int64_t*>(seed.const_data_ptr()), start.each, scratch.data(),
                   current_stream(log_ratio));
  return {out, accepted};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(REFINE_EXT_LIBRARY, REFINE_EXT_CUDA_KEY, m) {
  m.impl("resample", TORCH_BOX(&resample));
  m.impl("rejection", TORCH_BOX(&rejection));
  m.impl("metropolis", TORCH_BOX(&metropolis));
}

}  // namespace refine_ext::ops
