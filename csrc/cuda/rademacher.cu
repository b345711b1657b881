// Launchers of the Rademacher sums. Compiled without contraction into fused multiply-adds, so that every sum
// rounds as the CPU's does.
//
// Work goes in groups of draws, within these of columns, within these of blocks of rows, as large as the
// limits on memory below let them be. A group of columns is put into fixed point and its sums are made; where
// not all rows fit, sums wait in memory for the next ones. Most problems are one group, and then the sums of
// a supremum over columns never leave the registers.
//
// Work: a product of 16 draws x 8 columns x 32 rows, 4096 multiply-adds, for each byte of a value, 3 of them
// for float32's accuracy, 7 for float64. The signs' four registers take 8 instructions and serve 4 products,
// so that the loop has 3.5 instructions a product. Where bytes are multiplied at twice the rate of bfloat16,
// as on A100 and H100, a byte's pass costs half of a bfloat16 pass: three bytes 1.5 where splitting into
// three takes 3. Traffic: fixed_kernel reads the matrix once and writes a byte for each digit, 7 bytes a
// float32 value; each tile of 128 draws reads those bytes once from the L2 cache, 1/128 byte a multiply-add.
#include "hopper.h"
#include "rademacher.h"
#include "rademacher_hopper.cuh"
#include "rademacher_reduce.cuh"
#include "rademacher_signs.cuh"

namespace refine_ext::cuda {
namespace {

#if defined(REFINE_EXT_CUDA_ON_CPU)
// So little that small tests take several groups of everything.
constexpr int64_t kMostPlaneBytes = int64_t{400} << 10, kMostSums = int64_t{1} << 14, kMostDraws = 160;
#else
constexpr int64_t kMostPlaneBytes = int64_t{128} << 20, kMostSums = int64_t{1} << 23, kMostDraws = 8192;
#endif
constexpr int64_t kMostColumns = 8192;
constexpr int kSumsThreads = 128, kFewSumsThreads = 64;

template <class F>
void with_storage(Storage storage, F&& f) {
  switch (storage) {
    case Storage::float64:
      return f(double{});
    case Storage::float16:
      return f(Half{});
    case Storage::bfloat16:
      return f(BFloat16{});
    default:
      return f(float{});
  }
}

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t up_to_tiles(int64_t columns) { return ceil_div(columns, kTileColumns) * kTileColumns; }

// How large the groups are.
struct Groups {
  int digits;
  int64_t draws, columns, blocks;  // of a group; columns are whole tiles
  int64_t all_blocks;

  Groups(int64_t n, int64_t m, int64_t num_draws, Storage storage, int given_digits)
      : digits(storage == Storage::float64 ? kDigits64 : given_digits),
        draws(least(num_draws, kMostDraws)),
        columns(least(up_to_tiles(m), least(kMostColumns, kMostSums / draws / kTileColumns * kTileColumns))),
        all_blocks(ceil_div(n, kSignBlock)) {
    const int64_t fit = kMostPlaneBytes / (digits * kSignBlock * columns);
    blocks = least(all_blocks, fit > 1 ? fit : 1);
  }
  bool all_rows() const { return blocks == all_blocks; }
};

// Workspace arrays one after the other, each on a 16-byte boundary; without memory it only counts.
struct Workspace {
  FixedColumns fixed{};
  double* sums = nullptr;
  Best* best = nullptr;
  double* lanes = nullptr;
  int64_t used = 0;

  Workspace(const Groups& groups, bool own_sums, bool suprema, bool norm, void* memory) {
    const auto take = [&](auto*& array, int64_t count) {
      using T = std::remove_reference_t<decltype(*array)>;
      array = memory && count > 0 ? reinterpret_cast<T*>(static_cast<char*>(memory) + used) : nullptr;
      used += ceil_div(count * static_cast<int64_t>(sizeof(T)), 16) * 16;
    };
    const int64_t blocks = groups.blocks * groups.columns;
    take(fixed.planes, groups.digits * kSignBlock * blocks);
    take(fixed.columns, blocks);
    take(fixed.peaks, blocks);
    take(sums, own_sums ? groups.draws * groups.columns : 0);
    take(best, suprema ? groups.columns / kTileColumns * groups.draws : 0);
    take(lanes, norm ? kNormLanes * groups.draws : 0);
  }
};

Workspace suprema_workspace(const RademacherProblem& p, const Groups& groups, void* memory) {
  const bool norm = p.supremum == Supremum::norm;
  return {groups, norm || !groups.all_rows(), !norm, norm, memory};
}
Workspace sums_workspace(const Groups& groups, void* memory) { return {groups, false, false, false, memory}; }

template <bool kWide>
void launch_sums(const char* op, const SumsTask& task, void* stream) {
  if constexpr (kHopperIsBuilt && !kWide) {
    if (use_hopper())
      return launch_hopper_sums(op, task, ceil_div(task.draws, kHopperDraws) * task.matrix.tiles, stream);
  }
  const auto blocks_of = [&](int threads) {
    return ceil_div(task.draws, threads / kFewSumsThreads * WarpTiles<kFewSumsThreads, kWide>::kDraws) *
           task.matrix.tiles;
  };
  // Two blocks of threads share a multiprocessor; where they are too few for that, smaller ones.
  if (blocks_of(kSumsThreads) >= 2 * multiprocessors()) {
    launch(op, sums_kernel<kSumsThreads, kWide>, blocks_of(kSumsThreads), kSumsThreads, stream, task);
  } else {
    launch(op, sums_kernel<kFewSumsThreads, kWide>, blocks_of(kFewSumsThreads), kFewSumsThreads, stream,
           task);
  }
}

struct Matrix {
  const char* data;
  Storage storage;
  int64_t n, m, stride, size;  // bytes of a value
};

// Sums of a group of draws over a group of columns and all rows. The task says where they go; `own_sums`: to
// memory that holds none yet. f(blocks) is called when a part of the rows is in fixed point.
template <class F>
void add_rows(const char* op, const Matrix& matrix, const Groups& groups, const FixedColumns& workspace,
              SumsTask task, bool own_sums, void* stream, F&& f) {
  const uint64_t first_block = task.first_block;
  Best* const best = task.best;
  for (int64_t block = 0; block < groups.all_blocks; block += groups.blocks) {
    task.matrix = workspace;
    task.matrix.digits = groups.digits;
    task.matrix.tiles = ceil_div(task.columns, kTileColumns);
    task.matrix.blocks = least(groups.blocks, groups.all_blocks - block);
    const int64_t row = block * kSignBlock;
    const MatrixPart part{matrix.data + (row * matrix.stride + task.first_column) * matrix.size,
                          matrix.n - row, task.columns, matrix.stride};
    with_storage(matrix.storage, [&](auto tag) {
      using T = decltype(tag);
      launch(op, fixed_kernel<T>,
             task.matrix.tiles * (kTileColumns / FixedLayout<T>::kSlab) * task.matrix.blocks, kFixedThreads,
             stream, part, task.matrix);
    });
    f(task.matrix, block == 0);
    task.first_block = first_block + static_cast<uint64_t>(block * kGroups);
    task.resume = !own_sums || block > 0;
    task.best = block + groups.blocks >= groups.all_blocks ? best : nullptr;
    if (groups.digits == kDigits64) {
      launch_sums<true>(op, task, stream);
    } else {
      launch_sums<false>(op, task, stream);
    }
  }
}

}  // namespace

int64_t rademacher_suprema_workspace(const RademacherProblem& p) {
  return suprema_workspace(p, {p.n, p.m, p.draws, p.storage, p.digits}, nullptr).used;
}

void rademacher_suprema(const RademacherProblem& p, void* memory, void* stream) {
  const char* op = "rademacher";
  const Groups groups(p.n, p.m, p.draws, p.storage, p.digits);
  const Workspace work = suprema_workspace(p, groups, memory);
  const Matrix matrix{static_cast<const char*>(p.outputs), p.storage, p.n, p.m, p.stride, size_of(p.storage)};
  const double n = static_cast<double>(p.n);
  for (int64_t draw = 0; draw < p.draws; draw += groups.draws) {
    const int64_t draws = least(groups.draws, p.draws - draw);
    for (int64_t column = 0; column < p.m; column += groups.columns) {
      SumsTask task{};
      task.columns = static_cast<int>(least(groups.columns, p.m - column));
      task.first_column = column;
      task.seed = p.seed;
      task.first_draw = p.first_draw + static_cast<uint64_t>(draw);
      task.draws = static_cast<int>(draws);
      task.sums = work.sums;
      task.sums_stride = groups.columns;
      task.best = work.best;
      task.magnitude = p.supremum == Supremum::magnitude;
      add_rows(op, matrix, groups, work.fixed, task, true, stream,
               [&](const FixedColumns& fixed, bool first) {
                 if (draw > 0) return;
                 launch(op, column_peaks_kernel, ceil_div(task.columns, kReduceThreads), kReduceThreads,
                        stream, static_cast<const double*>(fixed.peaks), fixed.blocks, task.columns, first,
                        p.largest + column);
               });
      const bool first = column == 0, last = column + groups.columns >= p.m;
      if (p.supremum == Supremum::norm) {
        launch(op, norm_kernel, ceil_div(draws * kNormLanes, kReduceThreads), kReduceThreads, stream,
               static_cast<const double*>(work.sums), task.columns, task.sums_stride, draws, n, first, last,
               work.lanes, p.suprema + draw, p.index + draw);
      } else {
        launch(op, best_kernel, ceil_div(draws, kReduceThreads), kReduceThreads, stream,
               static_cast<const Best*>(work.best), ceil_div(task.columns, kTileColumns), draws, n, first,
               last, p.suprema + draw, p.index + draw);
      }
    }
  }
}

int64_t rademacher_sums_workspace(const RademacherSumsProblem& p) {
  return sums_workspace({p.n, p.m, p.draws, p.storage, 3}, nullptr).used;
}

void rademacher_sums(const RademacherSumsProblem& p, void* memory, void* stream) {
  const char* op = "rademacher_sums";
  const Groups groups(p.n, p.m, p.draws, p.storage, 3);
  const Workspace work = sums_workspace(groups, memory);
  const Matrix matrix{static_cast<const char*>(p.outputs), p.storage, p.n, p.m, p.stride, size_of(p.storage)};
  for (int64_t draw = 0; draw < p.draws; draw += groups.draws) {
    for (int64_t column = 0; column < p.m; column += groups.columns) {
      SumsTask task{};
      task.columns = static_cast<int>(least(groups.columns, p.m - column));
      task.first_column = column;
      task.seed = p.seed;
      task.first_draw = p.first_draw + static_cast<uint64_t>(draw);
      task.first_block = static_cast<uint64_t>(p.first_row / kSignsPerPhilox);
      task.draws = static_cast<int>(least(groups.draws, p.draws - draw));
      task.sums = p.sums + draw * p.m + column;
      task.sums_stride = p.m;
      add_rows(op, matrix, groups, work.fixed, task, false, stream, [](const FixedColumns&, bool) {});
    }
  }
}

void rademacher_backward(const RademacherBackwardProblem& p, void* stream) {
  if (p.n == 0 || p.m == 0) return;
  const int64_t column_tiles = ceil_div(p.m, kBackwardColumns);
  with_storage(p.storage, [&](auto tag) {
    launch("rademacher_backward", signs_backward_kernel<decltype(tag)>,
           ceil_div(p.n, kBackwardThreads) * column_tiles, kBackwardThreads, stream, p, column_tiles);
  });
}

}  // namespace refine_ext::cuda
