// Values of large dimensions on the tensor cores of sm_80 and newer: |x - y|^2 = |x'|^2 + |y'|^2 - 2 x' y',
// with x' y' made of six products of bfloat16 parts (log_mixture_pieces.cuh): q is within kProductError
// (|x'|^2 + |y'|^2). Where that is too much for a row, log_mixture_rows.cuh does it again from differences: a
// row finds out by itself.
//
// A block has 128 rows and walks over tiles of 128 centres; eight warps have 64 x 32 pairs each. A slice of
// 32 dimensions takes 192 products of a warp, 36 loads of matrices and 64 additions a thread.
#pragma once

#include "log_mixture_pieces.cuh"
#include "log_mixture_rows.cuh"

namespace refine_ext::cuda {

inline constexpr double kProductError = 1.0 / 2097152.0;  // 2^-21
inline constexpr double kProductTolerance = 5e-6;         // of a value, or of one

struct ProductTask {
  MixtureTask mixture;
  ProductOperand rows, centers;
  const float* offset;  // [d]
  int64_t slices;
  int* direct;  // [m], whether a row is done again from differences
};

__device__ __forceinline__ void write_product_row(const ProductTask& task, int64_t row,
                                                  const RowSums<0>& sums) {
  // `largest` is the largest error of an exponent.
  const double value = mixture_value(sums.state), error = kLn2 * sums.state.largest;
  const double size = value < 0.0 ? -value : value;
  task.mixture.p.value[row] = value;
  task.direct[row] = !(error <= kProductTolerance * (size > 1.0 ? size : 1.0));
}

// Values alone. Products fill the registers: what a tile of centres needs once is in local memory.
// budget: registers 256, local 16, shared 8192, occupancy 12%
__global__ void __launch_bounds__(kProductThreads) mixture_product_kernel(const ProductTask task) {
  constexpr int kOwn = 8, kTile = kProductTile;
  REFINE_EXT_DYNAMIC_SHARED(uint4, pieces);
  REFINE_EXT_SHARED(float, norms, [kTile]);
  REFINE_EXT_SHARED(float, slopes, [kTile]);
  REFINE_EXT_SHARED(float, weights, [kTile]);
  REFINE_EXT_SHARED(float, row_norms, [kTile]);
  REFINE_EXT_SHARED(float, shares, [3][kTile / 32][kTile]);  // of a row: reference, sum and error
  const MixtureTask& mixture = task.mixture;
  const LogMixtureProblem& p = mixture.p;
  const MixtureInputs& in = p.in;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
  const ProductPlace place;
  const auto row_of = [&](int i) { return place.row(i); };
  const auto column_of = [&](int c) { return place.column(c); };
  const int64_t part = blockIdx.x / mixture.row_tiles;
  const int64_t row_tile = blockIdx.x - part * mixture.row_tiles, first_row = row_tile * kTile;
  const int64_t first_chunk = mixture.parts ? part : 0;
  const int64_t last_chunk = mixture.parts ? part + 1 : mixture.chunks;
  const float shared = shared_slope<float>(in);
  const int64_t own = first_row + thread;
  const bool writes = thread < kTile && own < in.m;
  if (thread < kTile) row_norms[thread] = task.rows.norms[first_row + thread];

  // Pieces arrive in the order in which they are multiplied: slices within tiles of centres.
  const int64_t first_tile = first_chunk * mixture.chunk / kTile;
  const int64_t end_center = last_chunk * mixture.chunk < in.n ? last_chunk * mixture.chunk : in.n;
  int64_t left = ((end_center + kTile - 1) / kTile - first_tile) * task.slices;
  const uint4* next_center = task.centers.pieces + first_tile * task.slices * kPiecePacks + thread;
  const uint4* const rows_begin = task.rows.pieces + row_tile * task.slices * kPiecePacks + thread;
  int64_t next_slice = 0;
  const auto fetch = [&](int slot) {
    if (left > 0) {
      uint4* const to = pieces + slot * 2 * kPiecePacks + thread;
#pragma unroll
      for (int i = 0; i < kPiecePacks; i += kProductThreads) {
        copy_async(to + i, rows_begin + next_slice * kPiecePacks + i);
        copy_async(to + kPiecePacks + i, next_center + i);
      }
    }
    commit_copies();
    --left;
    next_center += kPiecePacks;
    next_slice = next_slice + 1 == task.slices ? 0 : next_slice + 1;
  };
  fetch(0);
  fetch(1);
  int slot = 0;

  RowSums<0> total{};
#pragma unroll 1
  for (int64_t chunk = first_chunk; chunk < last_chunk; ++chunk) {
    const int64_t begin = chunk * mixture.chunk;
    const int64_t end = begin + mixture.chunk < in.n ? begin + mixture.chunk : in.n;
    ThreadSums<float, 0, false, false> sums;
    sums.clear();
    float steepest = 0.0f, widest = 0.0f;  // largest -slope, and largest -slope |y'|^2
#pragma unroll 1
    for (int64_t first = begin; first < end; first += kTile) {
      const int here = static_cast<int>(end - first < kTile ? end - first : kTile);
      __syncthreads();
      if (thread < kTile) {
        const int64_t j = first + thread;
        const bool exists = thread < here;
        norms[thread] = task.centers.norms[j];
        const bool each = in.scale_kind == MixtureScale::per_center;
        slopes[thread] = !exists ? 0.0f : each ? slope_of_scale(scale_of<float>(in, j)) : shared;
        weights[thread] = exists ? log2_weight_of<float>(in, j) : 0.0f;
      }
      float q[kOwn][kOwn];
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
#pragma unroll
        for (int c = 0; c < kOwn; ++c) q[i][c] = 0.0f;
      }
#pragma unroll 1
      for (int64_t slice = 0; slice < task.slices; ++slice) {
        wait_copies<1>();
        __syncthreads();
        fetch(slot == 0 ? kProductPieces - 1 : slot - 1);  // which everybody has read
        const uint4* const row_piece = pieces + slot * 2 * kPiecePacks;
        const uint4* const center_piece = row_piece + kPiecePacks;
        slot = slot == kProductPieces - 1 ? 0 : slot + 1;
        multiply_slice<false, false>(row_piece, center_piece, place, [&](int t, int u, const float (&d)[4]) {
#pragma unroll
          for (int e = 0; e < 4; ++e) q[2 * t + e / 2][2 * u + e % 2] += d[e];
        });
      }
      float slope[kOwn], weight[kOwn], norm[kOwn];
#pragma unroll
      for (int c = 0; c < kOwn; ++c) {
        slope[c] = slopes[column_of(c)];
        weight[c] = weights[column_of(c)];
        norm[c] = norms[column_of(c)];
        const float steep = -slope[c], wide = steep * norm[c];
        // NaN stays.
        steepest = steep <= steepest ? steepest : steep;
        widest = wide <= widest ? widest : wide;
      }
      unsigned special = here < kTile ? (1u << kOwn) - 1u : 0u;
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        const float row_norm = row_norms[row_of(i)];
#pragma unroll
        for (int c = 0; c < kOwn; ++c) {
          const float square = fused(-2.0f, q[i][c], row_norm + norm[c]);
          q[i][c] = square < 0.0f ? 0.0f : square;
        }
        if (!in.exclude) continue;
        const int64_t row = first_row + row_of(i);
        const int64_t place = (row < in.m ? in.exclude[row] : int64_t{-1}) - first;
        special |= place >= 0 && place < kTile ? 1u << i : 0u;
      }
      const auto out = [&](int i, int c) {
        const int64_t row = first_row + row_of(i);
        return column_of(c) >= here || (in.exclude && row < in.m && in.exclude[row] == first + column_of(c));
      };
      add_batch<true>(
          sums, slope, weight, special, 0, [&](int i, int c) { return q[i][c]; },
          [](int, int) { return 0.0f; }, out, [](int) {});
    }
    sums.put_together(4);
#pragma unroll
    for (int distance = 1; distance < 4; distance *= 2) {
      const float steep = __shfl_xor_sync(kFullMask, steepest, distance);
      const float wide = __shfl_xor_sync(kFullMask, widest, distance);
      steepest = steep <= steepest ? steepest : steep;
      widest = wide <= widest ? widest : wide;
    }
    __syncthreads();
    if (lane % 4 == 0) {
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        const int row = row_of(i);
        shares[0][warp / 2][row] = sums.reference[i];
        shares[1][warp / 2][row] = sums.sum[i];
        shares[2][warp / 2][row] =
            static_cast<float>(kProductError) * (fused(steepest, row_norms[row], widest));
      }
    }
    __syncthreads();
    if (thread < kTile) {
      RowSums<0> here{};
      here.state.largest = 0.0;
      here.state.index = 0;
#pragma unroll
      for (int w = 0; w < kTile / 32; ++w) {
        RowSums<0> share{};
        const float reference = shares[0][w][thread], sum = shares[1][w][thread];
        const bool none = reference == kLowest<float> && sum == 0.0f;
        share.state.reference = none ? -kInfinity<double> : static_cast<double>(reference);
        share.state.sum = static_cast<double>(sum);
        share.state.largest = static_cast<double>(shares[2][w][thread]);
        share.state.index = 0;
        here.add(share);
      }
      if (!mixture.parts) {
        total.add(here);
      } else if (writes) {
        static_cast<RowSums<0>*>(mixture.parts)[chunk * in.m + own] = here;
      }
    }
  }
  if (!mixture.parts && writes) write_product_row(task, own, total);
}

// A thread a row: the chunks' sums in their order.
// budget: registers 32, occupancy 100%
__global__ void __launch_bounds__(kMixtureThreads) mixture_product_merge_kernel(const ProductTask task) {
  const MixtureTask& mixture = task.mixture;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kMixtureThreads + static_cast<int>(threadIdx.x);
  if (row >= mixture.p.in.m) return;
  RowSums<0> total{};
  for (int64_t chunk = 0; chunk < mixture.chunks; ++chunk)
    total.add(static_cast<const RowSums<0>*>(mixture.parts)[chunk * mixture.p.in.m + row]);
  write_product_row(task, row, total);
}

}  // namespace refine_ext::cuda
