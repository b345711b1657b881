// What is made of the sums: suprema of tiles of columns put together, norms, the columns' largest values.
#pragma once

#include "rademacher_sums.cuh"

namespace refine_ext::cuda {

inline constexpr int kReduceThreads = 256;
inline constexpr int kNormLanes = 16;

// A thread a draw: its best of `tiles` tiles [tile][draw] and of those before, which suprema and index keep
// until the last ones are in.
// budget: registers 32, occupancy 100%
__global__ void __launch_bounds__(kReduceThreads)
    best_kernel(const Best* parts, int64_t tiles, int64_t draws, double n, bool first, bool last,
                double* suprema, int64_t* index) {
  const int64_t draw = static_cast<int64_t>(blockIdx.x) * kReduceThreads + static_cast<int>(threadIdx.x);
  if (draw >= draws) return;
  Best best =
      first ? Best{-std::numeric_limits<double>::infinity(), kNoColumn} : Best{suprema[draw], index[draw]};
  for (int64_t tile = 0; tile < tiles; ++tile) best = better(best, parts[tile * draws + draw]);
  suprema[draw] = last ? best.size / n : best.size;
  index[draw] = !last ? best.code : best.code % 2 ? -1 - best.code / 2 : best.code / 2;
}

// 16 threads a draw, each a lane of the squares (RademacherProblem); `lanes` [draws][16] holds those of the
// columns before.
// budget: registers 32, shared 2048, occupancy 100%
__global__ void __launch_bounds__(kReduceThreads)
    norm_kernel(const double* sums, int64_t columns, int64_t stride, int64_t draws, double n, bool first,
                bool last, double* lanes, double* suprema, int64_t* index) {
  REFINE_EXT_SHARED(double, squares, [kReduceThreads]);
  const int64_t own = static_cast<int64_t>(blockIdx.x) * kReduceThreads + static_cast<int>(threadIdx.x);
  const int64_t draw = own / kNormLanes;
  const int lane = static_cast<int>(threadIdx.x) % kNormLanes;
  if (draw < draws) {
    double square = first ? 0.0 : lanes[own];
    for (int64_t j = lane; j < columns; j += kNormLanes) {
      const double sum = sums[draw * stride + j];
      square += sum * sum;
    }
    squares[threadIdx.x] = square;
    if (!last) lanes[own] = square;
  }
  __syncthreads();
  if (!last || lane > 0 || draw >= draws) return;
  double square = 0.0;
  for (int l = 0; l < kNormLanes; ++l) square += squares[threadIdx.x + l];
  suprema[draw] = ::sqrt(square) / n;
  index[draw] = -1;
}

// A thread a column: the largest of its blocks of rows, and of those before.
// budget: registers 32, occupancy 100%
__global__ void __launch_bounds__(kReduceThreads)
    column_peaks_kernel(const double* peaks, int64_t blocks, int64_t columns, bool first, double* largest) {
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kReduceThreads + static_cast<int>(threadIdx.x);
  if (column >= columns) return;
  double peak = first ? 0.0 : largest[column];
  const double* const own = peaks + column / kTileColumns * blocks * kTileColumns + column % kTileColumns;
  for (int64_t block = 0; block < blocks; ++block) {
    peak = LargestOrNan::merge(peak, own[block * kTileColumns]);
  }
  largest[column] = peak;
}

}  // namespace refine_ext::cuda
