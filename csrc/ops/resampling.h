// Checks and allocation that the resampling ops of every device share.
#pragma once

#include <algorithm>
#include <cmath>

#include "../math/resampling_problem.h"
#include "common.h"

namespace refine_ext::ops::draws {

inline Rows rows_of(const Tensor& x, const char* op, const char* argument) {
  const int64_t dims = x.dim();
  require(dims >= 1, op, ": ", argument, " must have at least one dimension, got a 0-dim tensor");
  int64_t rows = 1;
  for (int64_t d = 0; d + 1 < dims; ++d) rows *= x.size(d);
  return {rows, x.size(dims - 1)};
}

// How many consecutive rows each of the `values` serves.
inline int64_t rows_each(const Tensor& values, int64_t rows, const char* op, const char* argument) {
  const int64_t count = static_cast<int64_t>(values.numel());
  require(count > 0 ? rows % count == 0 : rows == 0, op, ": ", argument,
          " must hold one value, or one for each of the leading dimensions (", rows, " rows), got shape ",
          shape_of(values));
  return count > 0 ? std::max<int64_t>(1, rows / count) : 1;
}

inline DrawSeeds seeds_of(const Tensor& seed, int64_t rows, int64_t offset, const char* op) {
  require(seed.scalar_type() == ScalarType::Long, op, ": seed must be an int64 tensor");
  return {static_cast<const int64_t*>(seed.const_data_ptr()), rows_each(seed, rows, op, "seed"),
          static_cast<uint64_t>(offset)};
}

inline Rows check_resample(const Tensor& weights, int64_t num, int64_t method, const char* op,
                           const char* argument) {
  const Rows rows = rows_of(weights, op, argument);
  require(num >= 0 && num <= kMostDraws, op, ": num must be between 0 and 2^40, got ", num);
  require(method >= 0 && method <= static_cast<int64_t>(ResampleMethod::residual), op,
          ": unknown method code ", method);
  require(rows.n > 0 || rows.rows == 0, op, ": ", argument, " must not be empty, got shape ",
          shape_of(weights));
  return rows;
}

// The number of samples.
inline int64_t check_metropolis(const Tensor& log_ratio, int64_t num, int64_t chains, int64_t burn_in,
                                int64_t thin, bool in_order, const std::optional<Tensor>& initial,
                                const Tensor& seed, const char* op) {
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
  return n;
}

}  // namespace refine_ext::ops::draws
