// Rademacher sums on the CPU: the entry points that csrc/ops calls, and the table of per-ISA kernels behind
// them.
//
// Four Russians: of kGroup rows the sums under all 2^kGroup patterns of signs are tabulated for 64 bytes of
// columns, and every draw adds one entry of each of as many tables as L1 holds. The sums are of integers
// (csrc/math/rademacher.h), so that blocking, threads and instruction sets do not show.
//
// Memory beside inputs and results, per thread: for d = min(draws, kChunkDraws) draws
// 520 d bytes of signs and running sums, 64 d bytes for every 8 columns (at most 16 d times kPanelBlocks) of
// float64 sums, and 100 KB of tables: 1.7 MB at most, whatever n, m and draws are.
#pragma once

#include <cstdint>

#include "../math/rademacher_problem.h"

namespace refine_ext {

// Columns are taken 64 bytes of integers at a time: 16, or 8 of float64.
inline constexpr int64_t kRowBytes = 64;
inline int64_t row_columns(Storage storage) { return storage == Storage::float64 ? 8 : 16; }

// Draws whose tables are made once; the running sums of so many stay in L2.
inline constexpr int64_t kChunkDraws = 1024;

// Blocks of columns that share the signs of a block of rows.
inline constexpr int64_t kPanelBlocks = 8;

// Sums of a panel: `columns` columns from `outputs` on, under draws [first_draw, first_draw + draws).
struct RademacherPanel {
  const void* outputs;
  Storage storage;
  int64_t n, stride, columns;
  int64_t draws;
  uint64_t first_draw, seed;
  int64_t first_row;
  int digits;
  double* sums;     // [blocks of columns][draws][row_columns], added to
  double* largest;  // [columns], or null
  void* scratch;    // of kernels.scratch_bytes(n, draws), aligned to 64 bytes
};

// What a chunk of draws has seen so far: `best` starts at -inf and `lanes` at 0.
struct SupremumState {
  double* best;    // [draws]
  int64_t* index;  // [draws]
  double* lanes;   // [draws][16] of sums of squares, for a norm
};

inline constexpr int64_t kBackwardColumns = 256;

struct RademacherKernels {
  int64_t (*scratch_bytes)(int64_t n, int64_t draws);
  void (*add_sums)(const RademacherPanel&);
  // Takes a panel's sums, whose first column is `column`, in.
  void (*reduce)(const RademacherPanel&, int64_t column, Supremum, const SupremumState&);
  // Rows [begin, end), begin a multiple of kSignsPerPhilox. `order` has the draws by their columns; `tile` is
  // working memory for kBackwardColumns columns of kSignsPerPhilox rows.
  void (*backward)(const RademacherBackwardProblem&, const int64_t* order, double* tile, int64_t begin,
                   int64_t end);
  void (*multipliers)(const MultipliersProblem&, int64_t first, int64_t last);  // draws [first, last)
};

void rademacher_suprema_cpu(const RademacherProblem&);

void rademacher_sums_cpu(const RademacherSumsProblem&);

void rademacher_backward_cpu(const RademacherBackwardProblem&);

void multipliers_cpu(const MultipliersProblem&);

}  // namespace refine_ext
