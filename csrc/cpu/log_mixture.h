// Gaussian log-mixtures on the CPU: the entry points that csrc/ops calls, and the table of per-ISA kernels
// behind them.
//
// A kernel sums the weights of a chunk of centres for a block of rows. Chunks depend on the centres alone and
// their sums are merged in order, rows do not meet: results depend neither on threads nor on the other rows.
// Memory beside inputs and results, per thread: a block of packed rows and of sums, below 1 MB until one
// group of rows takes more (8 KB for each row at d = 1024); with the mean 16 bytes for each value of a block.
#pragma once

#include "../math/log_mixture_problem.h"

namespace refine_ext {

struct MixturePlan {
  int64_t block_rows;     // at most, a multiple of the kernel's group of rows
  int64_t chunk_centers;  // a multiple of its tile of centres; of n and d only
  bool in_double;         // float64 arithmetic for a narrower storage
};

struct MixtureChunk {
  const MixtureInputs& in;
  const MixturePlan& plan;
  int64_t first_row, rows;
  int64_t first_center, centers;
  bool stats;            // squares, largest and index too
  MixtureState* states;  // [rows], results
  // [rows, d], sum_j 2^(t_j - reference) y_j, or nullptr. For the score of x - y_j instead, times log2(e) /
  // (2 s_j^2) unless all centres share one scale.
  double* mean;
  bool score;
  char* memory;  // of memory_bytes(in, plan, rows, mean) or more, aligned to 64 bytes
};

struct LogMixtureKernels {
  MixturePlan (*plan)(const MixtureInputs&, bool mean);
  // For blocks of as many rows or fewer.
  int64_t (*memory_bytes)(const MixtureInputs&, const MixturePlan&, int64_t rows, bool mean);
  void (*add)(const MixtureChunk&);
};

void log_mixture_cpu(const LogMixtureProblem& problem);

}  // namespace refine_ext
