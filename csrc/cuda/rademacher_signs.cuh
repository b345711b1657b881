// Kernels that need the multipliers themselves: written out, and scattered as a gradient.
#pragma once

#include "../math/normal.h"
#include "../math/rademacher_problem.h"
#include "reduce.cuh"

namespace refine_ext::cuda {

inline constexpr int kMultiplierThreads = 256;
inline constexpr int kBackwardThreads = 128;  // a row each: those of one Philox block
inline constexpr int kBackwardColumns = 32;
static_assert(kBackwardThreads == kSignsPerPhilox);

// A thread: a pack of 16 bytes of a draw, and four values at least.
template <class T>
inline constexpr int kMultiplierWidth = kLanes<T> < 4 ? 4 : kLanes<T>;

// budget: registers 32, occupancy 100%
template <class T, bool kNormal>
__global__ void __launch_bounds__(kMultiplierThreads)
    multipliers_kernel(const MultipliersProblem problem, int64_t packs_a_draw) {
  using C = typename ComputeOf<T>::type;
  constexpr int kWidth = kMultiplierWidth<T>;
  const int64_t pack = static_cast<int64_t>(blockIdx.x) * kMultiplierThreads + static_cast<int>(threadIdx.x);
  const int64_t draw = pack / packs_a_draw, first = (pack - draw * packs_a_draw) * kWidth;
  if (draw >= problem.draws) return;
  T values[kWidth];
  const uint64_t sample = static_cast<uint64_t>(problem.first_row + first);
  if constexpr (kNormal) {
    const PhiloxSequence sequence{problem.seed, problem.first_draw + draw, Stream::multiplier};
#pragma unroll
    for (int b = 0; b < kWidth / 4; ++b) {
      const PhiloxBlock<uint32_t> words = sequence.block(sample / 4 + b);
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) {
        const NormalPair<C> two = normal_pair<C, uint32_t>(words.word[2 * pair], words.word[2 * pair + 1]);
        narrow(two.cosine, values[4 * b + 2 * pair]);
        narrow(two.sine, values[4 * b + 2 * pair + 1]);
      }
    }
  } else {
    const PhiloxBlock<uint32_t> words =
        sign_sequence(problem.seed, problem.first_draw + draw).block(sample / kSignsPerPhilox);
    const int in_block = static_cast<int>(sample % kSignsPerPhilox), w = in_block / 32;
    const uint32_t word =
        w < 2 ? (w < 1 ? words.word[0] : words.word[1]) : (w < 3 ? words.word[2] : words.word[3]);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      narrow(word >> (in_block % 32 + i) & 1u ? C(1) : C(-1), values[i]);
    }
  }
  T* const out = static_cast<T*>(problem.out) + draw * problem.n + first;
  if (is_aligned(out) && first + kWidth <= problem.n) {
#pragma unroll
    for (int p = 0; p < kWidth / kLanes<T>; ++p) {
      T lanes[kLanes<T>];
#pragma unroll
      for (int i = 0; i < kLanes<T>; ++i) lanes[i] = values[p * kLanes<T> + i];
      store_pack(out + p * kLanes<T>, true, lanes);
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    if (first + i < problem.n) out[i] = values[i];
  }
}

// A block: 128 rows of 32 columns. Of 128 draws at a time those that chose one of its columns are put
// together in their order, with the signs of the block's rows; every thread then adds them to its row.
// budget: registers 48, shared 36672, occupancy 25%
template <class T>
__global__ void __launch_bounds__(kBackwardThreads)
    signs_backward_kernel(const RademacherBackwardProblem problem, int64_t column_tiles) {
  REFINE_EXT_SHARED(double,
                    sums, [kBackwardColumns][kBackwardThreads + 1]);  // + 1: other banks when read by rows
  REFINE_EXT_SHARED(uint32_t, words, [kBackwardThreads][4]);
  REFINE_EXT_SHARED(double, grads, [kBackwardThreads]);
  REFINE_EXT_SHARED(int, columns, [kBackwardThreads]);
  const Team team = my_team({kBackwardThreads, 1});
  const int own = team.rank;
  const int64_t row_tile = blockIdx.x / column_tiles, first_row = row_tile * kBackwardThreads;
  const int64_t first_column = (blockIdx.x - row_tile * column_tiles) * kBackwardColumns;
  const int64_t left = problem.m - first_column;
  const int width = static_cast<int>(left < kBackwardColumns ? left : kBackwardColumns);
  for (int j = 0; j < width; ++j) sums[j][own] = 0.0;
  for (int64_t first = 0; first < problem.draws; first += kBackwardThreads) {
    const int64_t k = first + own;
    const int64_t index = k < problem.draws ? problem.index[k] : int64_t{-1} - problem.m;
    const int64_t column = (index < 0 ? -1 - index : index) - first_column;
    const bool mine = column >= 0 && column < width;
    int count;
    const int place = running_sum(team, mine ? 1 : 0, count) - 1;
    if (mine) {
      const PhiloxBlock<uint32_t> block = sign_sequence(problem.seed, problem.first_draw + k).block(row_tile);
      const uint32_t flip = index < 0 ? ~0u : 0u;
#pragma unroll
      for (int w = 0; w < 4; ++w) words[place][w] = block.word[w] ^ flip;
      grads[place] = problem.grad[k] / static_cast<double>(problem.n);
      columns[place] = static_cast<int>(column);
    }
    __syncthreads();
    for (int i = 0; i < count; ++i) {
      const bool up = words[i][own / 32] >> (own % 32) & 1u;
      sums[columns[i]][own] += up ? grads[i] : -grads[i];
    }
    __syncthreads();
  }
  T* const out = static_cast<T*>(problem.out);
  for (int i = own; i < kBackwardThreads * kBackwardColumns; i += kBackwardThreads) {
    const int row = i / kBackwardColumns, j = i % kBackwardColumns;
    if (first_row + row < problem.n && j < width) {
      narrow(sums[j][row], out[(first_row + row) * problem.m + first_column + j]);
    }
  }
}

}  // namespace refine_ext::cuda
