// The Rademacher ops as plain data for the CPU and CUDA drivers.
#pragma once

#include "density_ratio_problem.h"
#include "rademacher.h"

namespace refine_ext {

// Over the columns of a draw's sums: the largest, the largest magnitude, or the Euclidean norm.
enum class Supremum : int { largest, magnitude, norm };
inline constexpr int kSuprema = 3;

// outputs [n, m], `stride` elements from row to row, columns contiguous. For a norm the squares are summed in
// 16 float64 lanes, column j in lane j % 16 in the order of j, and the lanes then in their order.
struct RademacherProblem {
  const void* outputs;
  Storage storage;
  int64_t n, m, stride;
  int64_t draws;
  uint64_t first_draw, seed;
  Supremum supremum;
  int digits;
  double* suprema;  // [draws], of sums divided by n
  int64_t*
      index;  // [draws], the first column that has it: j, or -1 - j where its sum is negative; -1 for a norm
  double* largest;  // [m], max |value| of each column; NaN if it holds one
};

// sums [draws, m] += sums of signs and outputs; row 0 is sample first_row, a multiple of kSignBlock.
struct RademacherSumsProblem {
  const void* outputs;
  Storage storage;
  int64_t n, m, stride;
  int64_t draws;
  uint64_t first_draw, seed;
  int64_t first_row;
  double* sums;
};

// out [n, m] = sum over the draws whose index is column j or -1 - j of +-grad[k] / n and their sign of row i.
struct RademacherBackwardProblem {
  const double* grad;    // [draws]
  const int64_t* index;  // [draws]
  int64_t n, m;
  int64_t draws;
  uint64_t first_draw, seed;
  void* out;
  Storage storage;
};

// out [draws, n]: signs, or standard normals: number e of sequence (seed, draw) as csrc/math/normal.h makes
// them, with Stream::multiplier for Stream::noise. first_row is a multiple of kSignBlock.
struct MultipliersProblem {
  int64_t n, draws;
  uint64_t first_draw, seed;
  int64_t first_row;
  bool normal;
  void* out;
  Storage storage;
};

}  // namespace refine_ext
