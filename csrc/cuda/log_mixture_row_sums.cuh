// What is known of the rows of a Gaussian log-mixture after some of its centres: by a thread, after a chunk
// of centres and after all.
#pragma once

#include "log_mixture_tile.cuh"

namespace refine_ext::cuda {

// A row's sums over a chunk and after some chunks. `mean` is sum_j 2^(t_j - reference) y_j.
template <int kD>
struct RowSums {
  MixtureState state;
  double mean[kD > 0 ? kD : 1];

  __device__ __forceinline__ void add(const RowSums& next) {
    const MixtureState all = merged(state, next.state);
    if constexpr (kD > 0) {
      const double before = power_of_difference(state.reference, all.reference);
      const double after = power_of_difference(next.state.reference, all.reference);
#pragma unroll
      for (int k = 0; k < kD; ++k) mean[k] = mean[k] * before + next.mean[k] * after;
    }
    state = all;
  }
};

struct MixtureTask {
  LogMixtureProblem p;
  int64_t row_tiles, chunk, chunks;  // chunk: in centres
  void* parts;                       // RowSums [chunks][m], or nullptr: a block has all chunks
  const int* only;                   // [m], the rows to be done, or nullptr: all
};

template <int kD>
__device__ __forceinline__ void write_row(const LogMixtureProblem& p, int64_t row, const RowSums<kD>& sums) {
  const MixtureState& state = sums.state;
  const bool some = state.sum > 0.0;
  p.value[row] = mixture_value(state);
  if (p.stats) {
    const double nan = std::numeric_limits<double>::quiet_NaN();
    p.stats[2 * row] = some ? mixture_top_weight(state) : nan;
    p.stats[2 * row + 1] = some ? mixture_effective(state) : nan;
    p.top[row] = state.index;
  }
  if constexpr (kD > 0) {
    if (!p.mean) return;
#pragma unroll
    for (int k = 0; k < kD; ++k) static_cast<float*>(p.mean)[row * kD + k] = float(sums.mean[k] / state.sum);
  }
}

// What a thread knows of its rows after some of its columns of a chunk.
template <class C, int kD, bool kMean, bool kStats, int kRows = PairTile<C>::kOwn>
struct ThreadSums {
  static constexpr int kOwn = kRows, kValues = kMean ? kD : 1;
  static constexpr bool kHasMean = kMean, kHasStats = kStats;
  C reference[kOwn], sum[kOwn];
  C mean[kMean ? kOwn : 1][kValues];
  // Of the squares, and of the largest t - reference and its first column.
  C squares[kStats ? kOwn : 1], largest[kStats ? kOwn : 1];
  int index[kStats ? kOwn : 1];
  unsigned coarse;

  __device__ __forceinline__ void clear() {
    coarse = 0;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      reference[i] = kLowest<C>;
      sum[i] = C(0);
      if constexpr (kStats) {
        squares[i] = C(0);
        largest[i] = -kInfinity<C>;
        index[i] = -1;
      }
#pragma unroll
      for (int k = 0; kMean && k < kValues; ++k) mean[i][k] = C(0);
    }
  }

  // Row i's other reference, and what is there already in its units.
  __device__ __forceinline__ void refer_to(int i, C high) {
    const C back = power_of_two(reference[i] - high);
    sum[i] *= back;
    if constexpr (kStats) {
      squares[i] *= back * back;
      largest[i] += reference[i] - high;
    }
#pragma unroll
    for (int k = 0; kMean && k < kValues; ++k) mean[i][k] *= back;
    reference[i] = high;
  }

  // The sums of a row that `threads` neighbours share, in all of them alike.
  __device__ __forceinline__ void put_together(int threads = kMixtureAcross) {
    const int lane = static_cast<int>(threadIdx.x);
#pragma unroll 1
    for (int distance = 1; distance < threads; distance *= 2) {
      const bool second = lane & distance;
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        const auto other = [&](auto value) { return __shfl_xor_sync(kFullMask, value, distance); };
        const C theirs = other(reference[i]);
        refer_to(i, theirs > reference[i] ? theirs : reference[i]);
        // The first thread's before the second's, so that both have the same bits.
        const auto sum_of_both = [&](C& value) {
          const C from = other(value);
          value = second ? from + value : value + from;
        };
        sum_of_both(sum[i]);
        if constexpr (kStats) {
          sum_of_both(squares[i]);
          const C most = other(largest[i]);
          const int place = other(index[i]);
          const bool takes = most > largest[i] || (most == largest[i] && place >= 0 && place < index[i]);
          largest[i] = takes ? most : largest[i];
          index[i] = takes ? place : index[i];
        }
#pragma unroll
        for (int k = 0; kMean && k < kValues; ++k) sum_of_both(mean[i][k]);
      }
    }
  }

  // Of the row whose number is this thread's among its eight.
  __device__ __forceinline__ RowSums<kMean ? kD : 0> own_row(int64_t first_center) const {
    const int lane = static_cast<int>(threadIdx.x) % kMixtureAcross;
    RowSums<kMean ? kD : 0> own{};
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      if (lane != i) continue;
      const bool none = reference[i] == kLowest<C> && sum[i] == C(0);
      own.state.reference = none ? -kInfinity<double> : static_cast<double>(reference[i]);
      own.state.sum = static_cast<double>(sum[i]);
      double unit = 1.0;
      if constexpr (kStats) {
        if (index[i] >= 0) {
          // The largest weight is one, exactly, and so is its square.
          unit = static_cast<double>(power_of_two(largest[i]));
          own.state.reference += static_cast<double>(largest[i]);
          own.state.sum /= unit;
          const bool alone = static_cast<double>(sum[i]) == unit;
          own.state.squares = alone ? 1.0 : static_cast<double>(squares[i]) / unit / unit;
          own.state.largest = own.state.reference;
          own.state.index = first_center + index[i];
        }
      }
#pragma unroll
      for (int k = 0; kMean && k < kValues; ++k) own.mean[k] = static_cast<double>(mean[i][k]) / unit;
    }
    return own;
  }
};

// A thread a row: the chunks' sums in their order.
// budget: registers 48 (d=2 40, d=0 40, d=1 40), occupancy 62% (d=2 75%, d=0 75%, d=1 75%)
template <int kD>
__global__ void __launch_bounds__(kMixtureThreads) mixture_merge_kernel(const MixtureTask task) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kMixtureThreads + static_cast<int>(threadIdx.x);
  if (row >= task.p.in.m || (task.only && !task.only[row])) return;
  RowSums<kD> total{};
  for (int64_t chunk = 0; chunk < task.chunks; ++chunk)
    total.add(static_cast<const RowSums<kD>*>(task.parts)[chunk * task.p.in.m + row]);
  write_row(task.p, row, total);
}

}  // namespace refine_ext::cuda
