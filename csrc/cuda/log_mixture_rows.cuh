// Sums over the centres for each row, in one pass.
//
// A block has a tile of rows and walks over the centres. A thread keeps for each of its rows a reference and
// the sum of 2^(t - reference) over its own columns; the reference is some earlier largest t, and is raised
// only when a few sums grow beyond kGrown, by whoever finds that: nobody's bits depend on another row. At the
// end of each chunk of centres, which depend on their number alone, the eight threads of a row put their sums
// together, and these are merged into float64 in the order of the chunks; where rows are too few for the
// GPU, chunks have blocks of their own and mixture_merge_kernel does the same with what they leave in memory.
//
// In the time of one ex2 of an H100 or A100, 16 a clock and multiprocessor, its schedulers issue 8
// instructions. A pair takes 2 d + 3 of them (1 more with weights), ex2 itself among these, and half of one
// for loading, comparing and counting: at d <= 2 the exponentials are the limit, at d = 4 instructions are, a
// third above it. Exponentials by polynomial would take 7 instructions instead of one and pay at d = 1 only,
// by a sixth at most.
#pragma once

#include "log_mixture_row_sums.cuh"

namespace refine_ext::cuda {

inline constexpr int kMixtureStage = 512;  // centres in shared memory where d is small
template <class C>
inline constexpr C kGrown = C(281474976710656.0);  // 2^48: 2^11 squares of it are finite in float32

// Adds a batch of pairs, a thread's rows and as many columns. q(i, c): a squared distance; y[k][c]: a centre,
// for the mean; out(i, c): whether the pair does not count, asked of rows in `special` only; again(i): row
// i's distances are computed a second time; first: the batch's first column as the chunk counts, column(c)
// further on.
template <bool kWeighted, class Sums, class C, int kColumns, class Q, class Y, class Out, class Again>
__device__ __forceinline__ void add_batch(Sums& sums, const C (&slope)[kColumns], const C (&weight)[kColumns],
                                          unsigned special, int first, Q&& q, Y&& y, Out&& out,
                                          Again&& again) {
  constexpr bool kMean = Sums::kHasMean, kStats = Sums::kHasStats;
  constexpr bool kPlain = !kMean && !kStats;
  constexpr int kRows = Sums::kOwn;
  const PairTile<C> mine;
  const auto exponent_of = [&](int i, int c) {
    return exponent<kWeighted>(q(i, c), slope[c], weight[c], sums.reference[i]);
  };

  const auto note_largest = [&](int i, const C(&e)[kColumns]) {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const bool later = e[c] > sums.largest[i];
      sums.largest[i] = later ? e[c] : sums.largest[i];
      sums.index[i] = later ? first + mine.column(c) : sums.index[i];
    }
  };
  const auto add_weights = [&](int i, const C(&w)[kColumns]) {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      if constexpr (kStats) sums.squares[i] = fused(w[c], w[c], sums.squares[i]);
      if constexpr (kMean) {
#pragma unroll
        for (int k = 0; k < Sums::kValues; ++k) sums.mean[i][k] = fused(w[c], y(k, c), sums.mean[i][k]);
      }
    }
  };
  // With a reference that is large enough, and without what does not count.
  const auto add_carefully = [&](int i) {
    C e[kColumns], w[kColumns], high = sums.reference[i], sum = C(0);
    bool counts[kColumns];
    again(i);
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      counts[c] = !(special >> i & 1u) || !out(i, c);
      e[c] = counts[c] ? fused(q(i, c), slope[c], kWeighted ? weight[c] : C(0)) : -kInfinity<C>;
      high = e[c] > high ? e[c] : high;
    }
    sums.refer_to(i, high);
    const bool coarse = !(high > -kCoarse<C> && high < kCoarse<C>) && high > kLowest<C>;
    sums.coarse |= coarse ? 1u << i : 0u;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      e[c] = coarse || !counts[c] ? e[c] - high : exponent_of(i, c);
      w[c] = power_of_two(e[c]);
      sum += w[c];
    }
    sums.sum[i] += sum;
    if constexpr (!kPlain) add_weights(i, w);
    if constexpr (kStats) note_largest(i, e);
  };

  const unsigned careful = special | sums.coarse;
  if constexpr (kPlain) {
    // One branch for all rows: what they would add is kept.
    C added[kRows];
    bool grown = careful != 0;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      added[i] = power_of_two(exponent_of(i, 0));
#pragma unroll
      for (int c = 1; c < kColumns; ++c) added[i] += power_of_two(exponent_of(i, c));
      grown = grown || added[i] >= kGrown<C>;
    }
    if (!grown) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) sums.sum[i] += added[i];
    } else {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        if (added[i] >= kGrown<C> || careful >> i & 1u) {
          add_carefully(i);
        } else {
          sums.sum[i] += added[i];
        }
      }
    }
  } else {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      C e[kColumns], w[kColumns], sum = C(0), most = -kInfinity<C>;
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        e[c] = exponent_of(i, c);
        w[c] = power_of_two(e[c]);
        sum += w[c];
        most = e[c] > most ? e[c] : most;
      }
      if (sum >= kGrown<C> || careful >> i & 1u) {
        add_carefully(i);
      } else {
        sums.sum[i] += sum;
        add_weights(i, w);
        if constexpr (kStats) {
          if (most > sums.largest[i]) note_largest(i, e);
        }
      }
    }
  }
}

// The rows of this thread that leave out one of kColumns centres from `first` on.
template <int kColumns, class C>
__device__ __forceinline__ unsigned rows_that_exclude(const LogMixtureProblem& p, int64_t first_row,
                                                      int64_t first) {
  const PairTile<C> mine;
  unsigned rows = 0;
  if (!p.in.exclude) return 0;
#pragma unroll
  for (int i = 0; i < PairTile<C>::kOwn; ++i) {
    const int64_t row = first_row + mine.row(i);
    const int64_t place = (row < p.in.m ? p.in.exclude[row] : int64_t{-1}) - first;
    rows |= place >= 0 && place < kColumns ? 1u << i : 0u;
  }
  return rows;
}

// Blocks of a multiprocessor, by the registers that a thread has a use for.
template <int kD, bool kWeighted>
inline constexpr int kMixtureBlocks = kD == 1 || (kD == 2 && !kWeighted) ? 3 : 2;

// One row tile, all chunks or one; kD: the dimension, or 0 for any. What a chunk needs is in local memory
// where registers are for the pairs.
// budget: registers 248 (C=float32 d=2 168, C=float32 d=1 168, C=float64 d=0 weighted 232, C=float32 d=0
//     weighted 224, C=float32 d=4 mean 224, C=float32 d=3 mean 184, C=float32 d=2 mean 152, C=float32 d=2
//     weighted 240, C=float32 d=1 mean 128, C=float64 d=0 weighted stats 184, C=float32 d=0 weighted stats
//     232, C=float32 d=4 weighted mean 232, C=float32 d=3 weighted mean 192, C=float32 d=2 weighted mean
//     160, C=float32 d=0 dims weighted stats 248, C=float32 d=4 weighted mean stats 248, C=float32 d=3
//     weighted mean stats 224, C=float32 d=2 weighted mean stats 200, C=float32 d=1 weighted mean stats
//     160), local 0 (C=float32 d=2 24, C=float32 d=2 mean 0, C=float32 d=2 weighted 0, C=float32 d=1
//     weighted 8, C=float32 d=1 weighted mean 0), shared 10752 (C=float32 d=3 8704, C=float32 d=2 6656,
//     C=float32 d=1 4608, C=float64 d=0 weighted 13840, C=float32 d=0 weighted 13840, C=float32 d=4
//     weighted 12800, C=float32 d=3 weighted 10752, C=float32 d=2 weighted 8704, C=float32 d=1 weighted
//     6656, C=float64 d=0 dims weighted 18176, C=float32 d=0 dims weighted 18176), occupancy 12% (C=float32
//     d=2 18%, C=float32 d=1 18%, C=float32 d=2 weighted 12%, C=float32 d=1 mean 25%, C=float32 d=2
//     weighted mean 18%, C=float32 d=2 weighted mean stats 12%, C=float32 d=1 weighted mean stats 18%)
template <class C, int kD, bool kDims, bool kWeighted, bool kMean, bool kStats>
__global__ void __launch_bounds__(kMixtureThreads, kMixtureBlocks<kD, kWeighted>)
    mixture_kernel(const MixtureTask task) {
  using Tile = PairTile<C>;
  using Sums = ThreadSums<C, kD, kMean, kStats>;
  constexpr int kOwn = Tile::kOwn, kColumns = Tile::kColumns, kStage = kD > 0 ? kMixtureStage : kColumns;
  constexpr int kRowValues = kMean ? kD : 0;
  static_assert(!kMean || kD > 0);
  REFINE_EXT_SHARED(C, slopes, [kStage]);
  REFINE_EXT_SHARED(C, weights, [kStage]);
  const LogMixtureProblem& p = task.p;
  const MixtureInputs& in = p.in;
  const Tile mine;
  const int64_t part = blockIdx.x / task.row_tiles;
  const int64_t first_row = (blockIdx.x - part * task.row_tiles) * Tile::kRows;
  const int64_t first_chunk = task.parts ? part : 0, last_chunk = task.parts ? part + 1 : task.chunks;
  const int64_t own = first_row + (mine.across < kOwn ? mine.row(mine.across) : 0);
  const bool writes = mine.across < kOwn && own < in.m && (!task.only || task.only[own]);
  if (task.only) {
    // The whole block or nobody.
    REFINE_EXT_SHARED(int, wanted, [kMixtureThreads]);
    wanted[threadIdx.x] = writes;
    __syncthreads();
    int any = 0;
    for (int t = 0; t < kMixtureThreads; ++t) any |= wanted[t];
    if (!any) return;
  }
  const C shared = kDims ? C(-1) : shared_slope<C>(in);

  C x[kD > 0 ? kD : 1][kOwn];
  if constexpr (kD > 0) {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int64_t row = first_row + mine.row(i);
#pragma unroll
      for (int k = 0; k < kD; ++k) x[k][i] = row < in.m ? element<C>(in.x, in.storage, row * kD + k) : C(0);
    }
  }

  RowSums<kRowValues> total{};
#pragma unroll 1
  for (int64_t chunk = first_chunk; chunk < last_chunk; ++chunk) {
    const int64_t begin = chunk * task.chunk;
    const int64_t end = begin + task.chunk < in.n ? begin + task.chunk : in.n;
    Sums sums;
    sums.clear();
#pragma unroll 1
    for (int64_t first = begin; first < end; first += kStage) {
      const int here = static_cast<int>(end - first < kStage ? end - first : kStage);
      const int offset = static_cast<int>(first - begin);
      __syncthreads();
      load_weights<C, kDims>(in, first, shared, slopes, weights);
      const unsigned near = rows_that_exclude<kStage, C>(p, first_row, first);
      const auto batch = [&](int step, auto&& q, auto&& y, auto&& again) {
        C slope[kOwn], weight[kOwn];
#pragma unroll
        for (int c = 0; c < kOwn; ++c) {
          slope[c] = slopes[step + mine.column(c)];
          weight[c] = kWeighted ? weights[step + mine.column(c)] : C(0);
        }
        const unsigned all = (1u << kOwn) - 1u;
        unsigned special = here - step < kColumns ? all : 0u;
        if (near) special |= rows_that_exclude<kColumns, C>(p, first_row, first + step);
        const auto out = [&](int i, int c) {
          const int place = step + mine.column(c);
          const int64_t row = first_row + mine.row(i);
          return place >= here || (in.exclude && row < in.m && in.exclude[row] == first + place);
        };
        add_batch<kWeighted>(sums, slope, weight, special, offset + step, q, y, out, again);
      };
      if constexpr (kD > 0) {
        REFINE_EXT_SHARED(C, centers, [kD > 0 ? kD : 1][kStage]);
#pragma unroll 1
        for (int o = static_cast<int>(threadIdx.x); o < kStage; o += kMixtureThreads) {
#pragma unroll
          for (int k = 0; k < kD; ++k)
            centers[k][o] = o < here
                                ? finite_or(element<C>(in.centers, in.storage, (first + o) * kD + k), kFar<C>)
                                : C(0);
        }
        __syncthreads();
#pragma unroll 1
        for (int step = 0; step < here; step += kColumns) {
          C y[kD > 0 ? kD : 1][kOwn];
#pragma unroll
          for (int k = 0; k < kD; ++k) {
#pragma unroll
            for (int c = 0; c < kOwn; ++c) y[k][c] = centers[k][step + mine.column(c)];
          }
          batch(
              step,
              [&](int i, int c) {
                C z = x[0][i] - y[0][c], q = z * z;
#pragma unroll
                for (int k = 1; k < kD; ++k) {
                  z = x[k][i] - y[k][c];
                  q = fused(z, z, q);
                }
                return q;
              },
              [&](int k, int c) { return y[k][c]; },
              [&](int i) {
#pragma unroll
                for (int k = 0; k < kD; ++k) forget(x[k][i]);
              });
        }
      } else {
        using Slice = PairSlice<C, kDims>;
        REFINE_EXT_SHARED(Slice, slice, [1]);
        C q[kOwn][kOwn];
        squared_distances<C, kDims>(in, first_row, first, slice[0], q);
        batch(0, [&](int i, int c) { return q[i][c]; }, [&](int, int) { return C(0); }, [](int) {});
      }
    }
    sums.put_together();
    const RowSums<kRowValues> here = sums.own_row(begin);
    if (!task.parts) {
      total.add(here);
    } else if (writes) {
      static_cast<RowSums<kRowValues>*>(task.parts)[chunk * in.m + own] = here;
    }
  }
  if (!task.parts && writes) write_row(p, own, total);
}

}  // namespace refine_ext::cuda
