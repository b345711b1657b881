// Sums over the centres for each row from products: what is the same whatever instructions make them.
//
// Rows and centres come in parts (log_mixture_pieces.cuh), in pieces of 32 dimensions of a tile of 128 rows,
// or centres, in the order in which a block multiplies them. What is added to q for each piece is a `Tile`'s;
// q is then as exact as the squared distances that log_mixture_rows.cuh has, and goes the same way.
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

template <class Tile>
struct ProductShared {
  float norms[Tile::kBuffers][kProductTile], slopes[Tile::kBuffers][kProductTile],
      weights[Tile::kBuffers][kProductTile], row_norms[kProductTile];
  float shares[3][Tile::kShares][kProductTile];  // of a row: reference, sum and error
};
template <class Tile>
inline constexpr int kProductBytes = Tile::kPieces * 2 * kPiecePacks * 16;  // of `pieces`

// What a block of threads does, its tiles divided by `Tile`; its shared memory comes from the kernel.
template <class Tile>
__device__ __forceinline__ void product_rows(const ProductTask& task, uint4* pieces,
                                             ProductShared<Tile>& shared) {
  constexpr int kTile = kProductTile, kRows = Tile::kRows, kColumns = Tile::kColumns, kPieces = Tile::kPieces;
  constexpr int kBatch = 8;  // columns that are added together
  const MixtureTask& mixture = task.mixture;
  const LogMixtureProblem& p = mixture.p;
  const MixtureInputs& in = p.in;
  const Tile mine;
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t part = blockIdx.x / mixture.row_tiles;
  const int64_t row_tile = blockIdx.x - part * mixture.row_tiles, first_row = row_tile * kTile;
  const int64_t first_chunk = mixture.parts ? part : 0;
  const int64_t last_chunk = mixture.parts ? part + 1 : mixture.chunks;
  const float slope_of_all = shared_slope<float>(in);
  const int64_t own = first_row + thread;
  const bool writes = thread < kTile && own < in.m;
  if (thread < kTile) shared.row_norms[thread] = task.rows.norms[first_row + thread];

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
#pragma unroll
  for (int i = 0; i < kPieces - 1; ++i) fetch(i);
  mine.begin();
  int slot = 0, buffer = 0;

  RowSums<0> total{};
#pragma unroll 1
  for (int64_t chunk = first_chunk; chunk < last_chunk; ++chunk) {
    const int64_t begin = chunk * mixture.chunk;
    const int64_t end = begin + mixture.chunk < in.n ? begin + mixture.chunk : in.n;
    ThreadSums<float, 0, false, false, kRows> sums;
    sums.clear();
    float steepest = 0.0f, widest = 0.0f;  // largest -slope, and largest -slope |y'|^2
#pragma unroll 1
    for (int64_t first = begin; first < end; first += kTile) {
      const int here = static_cast<int>(end - first < kTile ? end - first : kTile);
      if (Tile::kBuffers == 1) {
        __syncthreads();
      } else {
        // Between two uses of a buffer everybody has waited for a piece.
        buffer ^= 1;
      }
      float* const norms = shared.norms[buffer];
      float* const slopes = shared.slopes[buffer];
      float* const weights = shared.weights[buffer];
      if (thread < kTile) {
        const int64_t j = first + thread;
        const bool exists = thread < here;
        norms[thread] = task.centers.norms[j];
        const bool each = in.scale_kind == MixtureScale::per_center;
        slopes[thread] = !exists ? 0.0f : each ? slope_of_scale(scale_of<float>(in, j)) : slope_of_all;
        weights[thread] = exists ? log2_weight_of<float>(in, j) : 0.0f;
      }
      float q[kRows][kColumns];
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
#pragma unroll
        for (int c = 0; c < kColumns; ++c) q[i][c] = 0.0f;
      }
#pragma unroll 1
      for (int64_t slice = 0; slice < task.slices; ++slice) {
        mine.add(pieces + slot * 2 * kPiecePacks, [&] { fetch(slot == 0 ? kPieces - 1 : slot - 1); }, q);
        slot = slot == kPieces - 1 ? 0 : slot + 1;
      }
      unsigned special = here < kTile ? (1u << kRows) - 1u : 0u;
      if (in.exclude) {
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          const int64_t row = first_row + mine.row(i);
          const int64_t place = (row < in.m ? in.exclude[row] : int64_t{-1}) - first;
          special |= place >= 0 && place < kTile ? 1u << i : 0u;
        }
      }
#pragma unroll
      for (int batch = 0; batch < kColumns; batch += kBatch) {
        float slope[kBatch], weight[kBatch], norm[kBatch];
#pragma unroll
        for (int c = 0; c < kBatch; ++c) {
          const int column = mine.column(batch + c);
          slope[c] = slopes[column];
          weight[c] = weights[column];
          norm[c] = norms[column];
          const float steep = -slope[c], wide = steep * norm[c];
          // NaN stays.
          steepest = steep <= steepest ? steepest : steep;
          widest = wide <= widest ? widest : wide;
        }
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          const float row_norm = shared.row_norms[mine.row(i)];
#pragma unroll
          for (int c = 0; c < kBatch; ++c) {
            const float square = fused(-2.0f, q[i][batch + c], row_norm + norm[c]);
            q[i][batch + c] = square < 0.0f ? 0.0f : square;
          }
        }
        const auto out = [&](int i, int c) {
          const int64_t row = first_row + mine.row(i);
          const int column = mine.column(batch + c);
          return column >= here || (in.exclude && row < in.m && in.exclude[row] == first + column);
        };
        add_batch<true>(
            sums, slope, weight, special, 0, [&](int i, int c) { return q[i][batch + c]; },
            [](int, int) { return 0.0f; }, out, [](int) {});
      }
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
    if (thread % 4 == 0) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const int row = mine.row(i);
        shared.shares[0][mine.share()][row] = sums.reference[i];
        shared.shares[1][mine.share()][row] = sums.sum[i];
        shared.shares[2][mine.share()][row] =
            static_cast<float>(kProductError) * (fused(steepest, shared.row_norms[row], widest));
      }
    }
    __syncthreads();
    if (thread < kTile) {
      RowSums<0> here{};
      here.state.largest = 0.0;
      here.state.index = 0;
#pragma unroll
      for (int w = 0; w < Tile::kShares; ++w) {
        RowSums<0> share{};
        const float reference = shared.shares[0][w][thread], sum = shared.shares[1][w][thread];
        const bool none = reference == kLowest<float> && sum == 0.0f;
        share.state.reference = none ? -kInfinity<double> : static_cast<double>(reference);
        share.state.sum = static_cast<double>(sum);
        share.state.largest = static_cast<double>(shared.shares[2][w][thread]);
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

}  // namespace refine_ext::cuda
