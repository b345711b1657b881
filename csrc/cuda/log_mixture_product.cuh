// Values of large dimensions on the tensor cores of sm_80 and newer: |x - y|^2 = |x'|^2 + |y'|^2 - 2 x' y',
// with x' y' made of six products of bfloat16 parts (log_mixture_pieces.cuh): q is within kProductError
// (|x'|^2 + |y'|^2). Where that is too much for a row, log_mixture_rows.cuh does it again from differences: a
// row finds out by itself.
//
// A block has 128 rows and walks over tiles of 128 centres; eight warps have 64 x 32 pairs each. A slice of
// 32 dimensions takes 192 products of a warp, 36 loads of matrices and 64 additions a thread.
#pragma once

#include "log_mixture_product_rows.cuh"

namespace refine_ext::cuda {

// The products of a block's warps on the tensor cores of sm_80 and newer.
struct WarpProducts : ProductPlace {
  static constexpr int kPieces = kProductPieces;
  static constexpr int kBuffers = 1;             // for what a tile of centres needs
  static constexpr int kRows = 8, kColumns = 8;  // of a thread
  static constexpr int kShares = 4;              // warps that share a row

  __device__ __forceinline__ int share() const { return across / 32; }

  __device__ __forceinline__ void begin() const {}

  // Adds a slice's products to q. refill(): the piece before this one may be overwritten.
  template <class Refill>
  __device__ __forceinline__ void add(const uint4* row_piece, Refill&& refill,
                                      float (&q)[kRows][kColumns]) const {
    wait_copies<kPieces - 2>();
    __syncthreads();
    refill();
    multiply_slice<false, false>(row_piece, row_piece + kPiecePacks, *this,
                                 [&](int t, int u, const float (&d)[4]) {
#pragma unroll
                                   for (int e = 0; e < 4; ++e) q[2 * t + e / 2][2 * u + e % 2] += d[e];
                                 });
  }
};

// Values alone. Products fill the registers: what a tile of centres needs once is in local memory.
// budget: registers 256, local 16, shared 8192, occupancy 12%
__global__ void __launch_bounds__(kProductThreads) mixture_product_kernel(const ProductTask task) {
  REFINE_EXT_DYNAMIC_SHARED(uint4, pieces);
  REFINE_EXT_SHARED(ProductShared<WarpProducts>, shared, [1]);
  product_rows<WarpProducts>(task, pieces, shared[0]);
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
