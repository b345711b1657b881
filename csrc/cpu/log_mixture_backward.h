// Gradients of sum_i g_i L_i of a Gaussian log-mixture on the CPU, with p_ij = exp(t_ij - L_i) made anew:
//   x_i: g_i sum_j p_ij (y_j - x_i) / s_j^2        centre j: sum_i g_i p_ij (x_i - y_j) / s_j^2
//   log-weight j: sum_i g_i p_ij                    scale j: sum_i g_i p_ij (x_i - y_j)^2 / s_j^3
// Sums are of differences: those of p y and p are large far from the origin, and cancel.
//
// Blocks of rows meet blocks of centres. A block of rows takes the blocks of centres in order, and a block of
// centres the blocks of rows: the sums' order, hence their bits, depends on the sizes only. Where sums over
// rows are wanted, a block of rows follows the one before it from one block of centres to the next, as many
// of them at work as there are threads; no thread has sums of its own to be merged.
//
// Memory beside inputs and results: for each thread four numbers for each value of a block of rows, one for
// each of a block of centres and half a kilobyte for each dimension, a few megabytes; for all, two float64
// numbers for each centre, and one [n, d] for the gradient of centres where their storage is of half
// precision.
#pragma once

#include "../math/log_mixture_problem.h"

namespace refine_ext {

void log_mixture_backward_cpu(const LogMixtureBackwardProblem& problem);
// Of a problem that is solved, the scores of the rows whose exponents float32, or float64, does not hold.
void mend_far_scores_cpu(const LogMixtureProblem& problem);

struct MixtureBackwardPlan {
  LogMixtureBackwardProblem problem;
  bool in_double;   // float64 arithmetic for a narrower storage
  int64_t rows;     // of a block
  int64_t centers;  // of a block
  // Sums over rows so far, or null where they are not wanted.
  double* weights;  // [n] sum_i g_i p_ij
  double* squares;  // [n] sum_i g_i p_ij |x_i - y_j|^2, where each centre has one scale
  void* slopes;     // [n, d] sum_i g_i p_ij (x_i - y_j), for per_center times slope_of its scale
  void* spreads;    // [n, d] sum_i g_i p_ij (x_i - y_j)^2, for per_dimension

  bool over_rows() const { return weights || squares || slopes || spreads; }
};

// One block of rows; `scratch` of scratch_bytes(plan), aligned to 64 bytes, is its own.
struct LogMixtureBackwardKernels {
  // Chooses the blocks.
  void (*choose)(MixtureBackwardPlan& plan);
  int64_t (*scratch_bytes)(const MixtureBackwardPlan& plan);
  void (*begin)(const MixtureBackwardPlan& plan, int64_t row_block, void* scratch);
  void (*block)(const MixtureBackwardPlan& plan, int64_t row_block, int64_t center_block, void* scratch);
  // Writes the gradient of x.
  void (*finish)(const MixtureBackwardPlan& plan, int64_t row_block, void* scratch);
};

}  // namespace refine_ext
