// Large dimensions on the tensor cores of sm_80 and newer: |x - y|^2 = |x'|^2 + |y'|^2 - 2 x' y' with x' and
// y' taken from about the middle of the centres, in float64.
//
// Both are split into three bfloat16 parts, h + m + l with l below 2^-16 of the whole, and six products make
// float32's: h h, h m, m h, m m, h l, l h. Those of 32 dimensions are summed by the tensor cores, the small
// ones first, and then added in float32, so that the tensor cores' cutting off of sums counts for the last
// few additions of each slice alone: q is within kProductError (|x'|^2 + |y'|^2). Where that is too much for
// a row, log_mixture_rows.cuh does it again from differences: a row finds out by itself.
//
// A block has 128 rows and walks over tiles of 128 centres; eight warps have 64 x 32 pairs each. A slice of
// 32 dimensions takes 192 products of a warp, 36 loads of matrices and 64 additions a thread.
#pragma once

#include "log_mixture_product_rows.cuh"
#include "reduce.cuh"

namespace refine_ext::cuda {

// A thread a dimension: the mean of some of the centres.
// budget: registers 32, occupancy 100%
__global__ void __launch_bounds__(kMixtureThreads)
    mixture_offset_kernel(const MixtureInputs in, float* offset) {
  const int64_t k = static_cast<int64_t>(blockIdx.x) * kMixtureThreads + static_cast<int>(threadIdx.x);
  if (k >= in.d) return;
  const int64_t count = in.n < kOffsetSample ? in.n : kOffsetSample, apart = in.n / count;
  double sum = 0.0;
#pragma unroll 8
  for (int64_t i = 0; i < count; ++i) sum += element<double>(in.centers, in.storage, i * apart * in.d + k);
  offset[k] = static_cast<float>(sum / static_cast<double>(count));
}

// A warp a row of x, or a centre; those that fill the last tile up are zeros.
// budget: registers 56, occupancy 56%
__global__ void __launch_bounds__(kMixtureThreads)
    mixture_split_kernel(const ProductTask task, bool centers, int64_t first, int64_t padded) {
  const MixtureInputs& in = task.mixture.p.in;
  const ProductOperand& to = centers ? task.centers : task.rows;
  const void* const data = centers ? in.centers : in.x;
  const int64_t count = centers ? in.n : in.m;
  const Team team = my_team({kWarp, 1});
  if (team.row >= padded) return;
  const int64_t row = first + team.row, tile = row / kProductTile;
  const int in_tile = static_cast<int>(row - tile * kProductTile);
  double norm[1] = {0.0};
  for (int64_t pack = team.rank; pack < task.slices * kProductPacks; pack += kWarp) {
    BFloat16 parts[kProductParts][8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int64_t k = pack * 8 + i;
      float rest = 0.0f;
      if (row < count && k < in.d) {
        rest = static_cast<float>(element<double>(data, in.storage, row * in.d + k) -
                                  static_cast<double>(task.offset[k]));
      }
      norm[0] += static_cast<double>(rest) * static_cast<double>(rest);
#pragma unroll
      for (int part = 0; part < kProductParts; ++part) {
        narrow(rest, parts[part][i]);
        rest -= widen(parts[part][i]);
      }
    }
    const int64_t slice = pack / kProductPacks;
    uint4* const piece = to.pieces + (tile * task.slices + slice) * kPiecePacks;
#pragma unroll
    for (int part = 0; part < kProductParts; ++part) {
      uint4 packed;
      memcpy(&packed, parts[part], sizeof(packed));
      piece[part * kPartPacks + place_of_pack(in_tile, static_cast<int>(pack % kProductPacks))] = packed;
    }
  }
  reduce_warp<Sum>(norm);
  if (team.rank == 0) to.norms[row] = static_cast<float>(norm[0]);
}

// How the warps of a block divide its tile on the tensor cores of sm_80 and newer: two of them down, four
// across, 64 x 32 pairs each.
struct WarpProducts {
  static constexpr int kPieces = 3;              // in shared memory, of rows and columns each
  static constexpr int kBuffers = 1;             // for what a tile of centres needs
  static constexpr int kRows = 8, kColumns = 8;  // of a thread
  static constexpr int kShares = 4;              // warps that share a row

  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int down = static_cast<int>(threadIdx.x) / kWarp % 2 * 64;
  const int across = static_cast<int>(threadIdx.x) / kWarp / 2 * 32;

  __device__ __forceinline__ int row(int i) const { return down + i / 2 * 16 + i % 2 * 8 + lane / 4; }
  __device__ __forceinline__ int column(int c) const { return across + c / 2 * 8 + lane % 4 * 2 + c % 2; }
  __device__ __forceinline__ int share() const { return across / 32; }

  __device__ __forceinline__ void begin() const {}

  // Adds a slice's products to q. refill(): the piece before this one may be overwritten.
  template <class Refill>
  __device__ __forceinline__ void add(const uint4* row_piece, Refill&& refill,
                                      float (&q)[kRows][kColumns]) const {
    wait_copies<kPieces - 2>();
    __syncthreads();
    refill();
    const uint4* const center_piece = row_piece + kPiecePacks;
    float d[4][4][4] = {};
    const auto multiply = [&](int row_part, int center_part) {
#pragma unroll
      for (int step = 0; step < kProductSlice / 16; ++step) {
        uint32_t b[2][4];
#pragma unroll
        for (int pair = 0; pair < 2; ++pair) {
          const int own = across + 16 * pair + lane / 16 * 8 + lane % 8;
          load_matrices<false>(
              b[pair], center_piece + center_part * kPartPacks + place_of_pack(own, 2 * step + lane / 8 % 2));
        }
#pragma unroll
        for (int t = 0; t < 4; ++t) {
          uint32_t a[4];
          const int own = down + 16 * t + lane / 8 % 2 * 8 + lane % 8;
          load_matrices<false>(a,
                               row_piece + row_part * kPartPacks + place_of_pack(own, 2 * step + lane / 16));
#pragma unroll
          for (int u = 0; u < 4; ++u) {
            const uint32_t two[2] = {b[u / 2][2 * (u % 2)], b[u / 2][2 * (u % 2) + 1]};
            multiply_add(d[t][u], a, two);
          }
        }
      }
    };
    multiply(0, 2);
    multiply(2, 0);
    multiply(1, 1);
    multiply(0, 1);
    multiply(1, 0);
    multiply(0, 0);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int c = 0; c < kColumns; ++c) q[i][c] += d[i / 2][c / 2][i % 2 * 2 + c % 2];
    }
  }
};

// Values alone. Products fill the registers: what a tile of centres needs once is in local memory.
// budget: registers 256, local 96, shared 8192, occupancy 12%
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
