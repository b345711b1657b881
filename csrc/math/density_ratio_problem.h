// The density-ratio problem as plain data, and the decisions about its search that the CPU and CUDA drivers
// share.
#pragma once

#include <cstdint>

#include "density_ratio.h"

namespace refine_ext {

enum class Storage : int { float32, float64, float16, bfloat16 };

// What a pass over the samples leaves behind besides its sums.
enum class Output : int { none, log_ratio, ratio };

// rows x n, contiguous rows.
struct DensityRatioProblem {
  const void* h;
  const void* weights;  // [rows, n], [n] if weight_stride is 0, or nullptr
  void* out;
  Storage storage;
  int64_t rows, n, weight_stride;
  Family family;
  const double* shift;  // [rows], [1] if shift_stride is 0, or nullptr: solved
  int64_t shift_stride;
  Output output;
};

// One row of the `stats` result, in this order.
struct RatioStats {
  double shift;        // nu; the logit's normaliser for Divergence::logit
  double log_sum;      // log sum w r
  double log_square;   // log sum (w r)^2
  double log_largest;  // log max w r
  double log_weight;   // log sum w
  double log_max;      // log r at the anchor
  double anchor;       // h at the anchor, and its low part
  double anchor_low;
};
inline constexpr int kStats = 8;
static_assert(sizeof(RatioStats) == kStats * sizeof(double));

inline constexpr int kMaxSteps = 100;

REFINE_EXT_INLINE int64_t size_of(Storage storage) {
  switch (storage) {
    case Storage::float64:
      return 8;
    case Storage::float32:
      return 4;
    default:
      return 2;
  }
}

// |E r - 1| at which the search stops. Float32: a few roundings of a ratio, a third of the 1e-6 that is
// promised. Float64: rounding errors of the sums leave 1e-13 at most.
REFINE_EXT_INLINE double tolerance_of(Storage storage) { return storage == Storage::float64 ? 1e-12 : 3e-7; }

// L lies in [0, log n], give or take rounding; unequal weights bound it by the exponent range only. From
// above, where one ratio holds all the mass, Newton comes down monotonically for most forms.
REFINE_EXT_INLINE ShiftSearch begin_search(const Family& family, int64_t n, bool weighted) {
  const double cap = family.form == Form::power ? kLargestExponent / ::fabs(family.c) : kLargestExponent;
  const double log_n = ::log(static_cast<double>(n));
  return {-1e-6, weighted || log_n + 1e-6 > cap ? cap : log_n + 1e-6, log_n < cap ? log_n : cap};
}

}  // namespace refine_ext
