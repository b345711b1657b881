// CPU density ratios: the entry points that csrc/ops calls, and the table of per-ISA range kernels behind
// them.
#pragma once

#include <cstdint>

#include "../math/density_ratio_problem.h"

namespace refine_ext {

inline constexpr int64_t kBlock = 4096;         // samples between two additions to the float64 sums
inline constexpr int64_t kChunk = 16 * kBlock;  // samples of one task; sums do not depend on the thread count

// First pass: extremes, and for the exponential form everything else too.
struct ScanSums {
  double maximum;      // over samples of positive weight; -inf if there are none
  double weight;       // sum of the base weights, or the count
  double exp_sum;      // sum of w e^{h - maximum}
  double exp_square;   // sum of (w e^{h - maximum})^2
  double exp_largest;  // largest w e^{h - maximum}
  bool invalid;        // a NaN or +inf output, a NaN, infinite or negative weight
};

// Later passes, at a given anchor.
struct RatioSums {
  double ratio;       // sum of w r
  double moment;      // sum of w times RatioPoint::moment
  double square;      // sum of (w r)^2
  double largest;     // largest w r
  double conjugate;   // sum of w f*, offset not included
  bool not_a_number;  // a ratio was NaN
};

struct RangeArguments {
  const void* h;
  const void* weights;  // nullptr: all one
  void* out;            // as long as h; may be h itself
  int64_t begin, end;
  double* block_maxima;  // scan only; nullptr, or one per kBlock of the range
  bool stream;           // write past the caches
  double scale;          // multiplies a ratio that is written
};

struct DensityRatioKernels {
  // exponential: also the sums of exponentials.
  ScanSums (*scan)(Storage, const RangeArguments&, bool exponential);
  // conjugate: also the sum of f*.
  RatioSums (*pass)(Storage, const RangeArguments&, const Family&, const Anchor&, Output, bool conjugate);
};

struct DualKernels {
  // grad_h of log r, see csrc/cpu/density_ratio.cpp: first its sums, then the result itself.
  void (*backward_sums)(Storage, const void* grad, const void* log_ratio, const void* weights, int64_t begin,
                        int64_t end, const Family&, double sums[2]);
  void (*backward)(Storage, const void* grad, const void* log_ratio, const void* weights, void* out,
                   int64_t begin, int64_t end, const Family&, double through_ratio);
  // f'(e^x); and scale * grad * its derivative, or that of f*(f'(e^x)); grad == nullptr: one.
  void (*dual_output)(Storage, const void* x, void* out, int64_t begin, int64_t end, const Family&);
  void (*dual_slope)(Storage, const void* x, const void* grad, double scale, void* out, int64_t begin,
                     int64_t end, const Family&, bool conjugate);
  // sum of f'(e^x), or of f*(f'(e^x)).
  double (*dual_sum)(Storage, const void* x, int64_t begin, int64_t end, const Family&, bool conjugate);
};

// ---- entry points

enum class RatioError : int { none, invalid_input, outside_domain, not_converged };

// The first row with an error names it; that row's outputs are NaN. Other rows are unaffected.
struct RatioReport {
  RatioError error = RatioError::none;
  int64_t row = -1;
};

RatioReport density_ratio_cpu(const DensityRatioProblem&, RatioStats* stats);

// The mean of f* at each row's shift goes to conjugate[rows]; nothing is written to out.
RatioReport conjugate_mean_cpu(const DensityRatioProblem&, RatioStats* stats, double* conjugate);

// scale * ratio at the shifts that stats holds (solved: found by the search; otherwise given).
void scaled_ratio_cpu(const DensityRatioProblem&, const RatioStats* stats, bool solved, double scale);

// The gradient with respect to h, into problem.out; problem.h is not read. grad_stats: one row of kStats per
// group, of which the shift (solved) or log_sum (given shift) counts.
void density_ratio_backward_cpu(const DensityRatioProblem&, const void* log_ratio, const void* grad,
                                const RatioStats* stats, const double* grad_stats, bool solved);

// Elementwise f'(e^x); its derivative, or that of f*(f'(e^x)), times grad and scale (grad may be nullptr);
// the sums.
void dual_output_cpu(Storage, const void* x, void* out, int64_t n, const Family&);
void dual_slope_cpu(Storage, const void* x, const void* grad, double scale, void* out, int64_t n,
                    const Family&, bool conjugate);
double dual_sum_cpu(Storage, const void* x, int64_t n, const Family&, bool conjugated);
double mean_cpu(Storage, const void* x, int64_t n);

}  // namespace refine_ext
