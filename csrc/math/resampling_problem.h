// What is drawn from, and where the draws go, as plain data for the CPU and CUDA drivers.
#pragma once

#include <cstdint>

#include "density_ratio_problem.h"
#include "resampling.h"

namespace refine_ext {

// A seed for every `rows_each` rows, which are sequences 0, 1, ... of it: a row gets the same numbers
// whatever it is batched with.
struct DrawSeeds {
  const int64_t* seeds;
  int64_t rows_each;
  uint64_t offset;

  REFINE_EXT_INLINE PhiloxSequence sequence(int64_t row, Stream stream) const {
    return {static_cast<uint64_t>(seeds[row / rows_each]), static_cast<uint64_t>(row % rows_each), stream};
  }
};

struct ResampleProblem {
  const void* weights;  // [rows, n]
  Storage storage;
  bool log;
  int64_t rows, n, num;
  ResampleMethod method;
  DrawSeeds seeds;
  int64_t* out;  // [rows, num]
};

struct RejectionProblem {
  const void* log_ratio;  // [rows, n]
  Storage storage;
  int64_t rows, n;
  const double* log_bound;  // [rows], or nullptr
  const double* gamma;      // [rows], or nullptr: plain
  double epsilon;
  DrawSeeds seeds;
  bool* keep;         // [rows, n]
  double* new_bound;  // [rows]
  int64_t* accepted;  // [rows]
};

struct MetropolisProblem {
  const void* log_ratio;  // [n]
  Storage storage;
  int64_t n, num, chains, burn_in, thin;
  const double* initial;  // [chains], or nullptr
  bool in_order;          // order "given"
  int64_t seed;
  int64_t* out;       // [chains, num]
  int64_t* accepted;  // [chains]
};

// Steps of a chain whose last draw is number num - 1.
REFINE_EXT_INLINE int64_t metropolis_steps(int64_t num, int64_t burn_in, int64_t thin) {
  return num > 0 ? burn_in + (num - 1) * thin + 1 : 0;
}

}  // namespace refine_ext
