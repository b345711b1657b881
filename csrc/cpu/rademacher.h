// Rademacher sums on the CPU: the entry points that csrc/ops calls, and the table of per-ISA kernels behind
// them.
//
// Four Russians: of kGroup rows the sums under all 2^kGroup patterns of signs are tabulated for 64 bytes of
// columns, and every draw adds one entry of each of as many tables as L1 holds. The sums are of integers
// (csrc/math/rademacher.h), so that blocking, threads and instruction sets do not show.
//
// For a largest sum that precision is needed only where the largest may be. Sums of 16-bit integers, two
// columns in the place of one, come first, with a bound of their error; the columns whose sums may then reach
// a draw's supremum, a few of a thousand, are summed again exactly. The result is the same.
//
// Memory beside inputs and results, per thread: for d = min(draws, kChunkDraws) draws
// 400 d bytes of signs and running sums, 128 d for each of at most kPanelBlocks blocks of 16 columns of
// float64 sums, and 360 KB of columns and tables: 1.8 MB at most, whatever n, m and draws are; and where sums
// are screened, 200 bytes for each of at most kScreenedDraws draws, and 512 bytes for each in all.
#pragma once

#include <cstdint>

#include "../math/rademacher_problem.h"

namespace refine_ext {

// Columns are taken 64 bytes of integers at a time: 16, or 8 of float64.
inline constexpr int64_t kRowBytes = 64;
inline int64_t row_columns(Storage storage) { return storage == Storage::float64 ? 8 : 16; }

// Draws whose tables are made once; the running sums of so many stay in L2.
inline constexpr int64_t kChunkDraws = 1024;

// Draws that are screened at once: what is kept of each is 200 bytes for each thread.
inline constexpr int64_t kScreenedDraws = 8192;

// Blocks of columns that share the signs of a block of rows.
inline constexpr int64_t kPanelBlocks = 8;

// Sums of a panel: `columns` columns from `outputs` on, under draws [first_draw, first_draw + draws).
struct RademacherPanel {
  const void* outputs;
  Storage storage;
  int64_t n, stride, columns;
  int64_t draws;
  uint64_t first_draw, seed;
  const int64_t* chosen;  // the draws are first_draw + chosen[0], ...; null: consecutive
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

struct RademacherKernels {
  int64_t (*scratch_bytes)(int64_t n, int64_t draws);
  void (*add_sums)(const RademacherPanel&);
  // Takes a panel's sums, whose first column is `column`, in.
  void (*reduce)(const RademacherPanel&, int64_t column, Supremum, const SupremumState&);
};

// Columns that may hold the supremum of a draw, and the most that each may have.
struct Candidates {
  static constexpr int kMost = 14;
  int64_t column[kMost];
  float most[kMost];
  int count = 0;  // kMost + 1: too many, any column may

  REFINE_EXT_INLINE void add(int64_t j, float at_most, float floor) {
    if (count == kMost) keep(floor);
    if (count < kMost) {
      column[count] = j;
      most[count] = at_most;
    }
    if (count <= kMost) ++count;
  }

  // Those that may reach the floor.
  REFINE_EXT_INLINE void keep(float floor) {
    int kept = 0;
    for (int c = 0; c < count && count <= kMost; ++c) {
      if (!(most[c] >= floor)) continue;
      column[kept] = column[c];
      most[kept++] = most[c];
    }
    if (count <= kMost) count = kept;
  }
};

struct ScreenState {
  float* floor;            // [draws], what the supremum is at least; starts at -inf
  Candidates* candidates;  // [draws]
};

struct ScreenKernels {
  // Takes a panel in, of at most kPanelBlocks * 32 columns; panel.sums are float32 [blocks][draws][32].
  // False: values too large for float32 sums, or not finite.
  bool (*screen)(const RademacherPanel&, int64_t column, Supremum, const ScreenState&);
};

inline constexpr int64_t kBackwardColumns = 256;

struct SignKernels {
  // Rows [begin, end), begin a multiple of kSignsPerPhilox. `order` has the draws by their columns; `tile` is
  // working memory for kBackwardColumns columns of kSignsPerPhilox rows.
  void (*backward)(const RademacherBackwardProblem&, const int64_t* order, double* tile, int64_t begin,
                   int64_t end);
  void (*multipliers)(const MultipliersProblem&, int64_t first, int64_t last);  // draws [first, last)
};

void rademacher_suprema_cpu(const RademacherProblem&);

// The same for a largest sum, by screening; false: not worth it, and nothing is written but `largest`.
bool screened_suprema_cpu(const RademacherProblem&);

void rademacher_sums_cpu(const RademacherSumsProblem&);

void rademacher_backward_cpu(const RademacherBackwardProblem&);

void multipliers_cpu(const MultipliersProblem&);

}  // namespace refine_ext
