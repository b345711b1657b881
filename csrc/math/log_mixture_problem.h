// The log-mixture ops as plain data for the CPU and CUDA drivers.
#pragma once

#include "density_ratio_problem.h"
#include "log_mixture.h"

namespace refine_ext {

enum class MixtureScale : int { shared, per_center, per_dimension };

// x [m, d] and centers [n, d] contiguous, in `storage`. scale: one value, [n] or [n, d]; it, log_weights and
// the results that are not float64 are in the compute type: double for float64 storage, else float.
struct MixtureInputs {
  const void* x;
  const void* centers;
  const void* scale;
  const void* log_weights;  // [n], natural logarithms, or nullptr: zeros
  const int64_t* exclude;   // [m], the centre that row i leaves out or -1, or nullptr: none
  Storage storage;
  MixtureScale scale_kind;
  int64_t m, n, d;
};

struct LogMixtureProblem {
  MixtureInputs in;
  double* value;  // [m]
  void* mean;     // [m, d] sum_j p_j y_j in the compute type, or nullptr
  double* stats;  // [m, 2] largest p_j and 1 / sum_j p_j^2, or nullptr
  int64_t* top;   // [m] the first j of the largest p_j, -1 where none has a weight; nullptr with stats
  // [m, d] the value's gradient by x, in `storage`, or nullptr. On the CPU alone, not with the mean.
  void* score = nullptr;
};

// Gradients of sum_i grad_i L_i; nullptr for what is not wanted.
struct LogMixtureBackwardProblem {
  MixtureInputs in;
  const double* grad;      // [m]
  const double* value;     // [m], of log_mixture
  void* grad_x;            // [m, d] in `storage`
  void* grad_centers;      // [n, d] in `storage`
  void* grad_scale;        // as scale, in the compute type
  void* grad_log_weights;  // [n] in the compute type
};

}  // namespace refine_ext
