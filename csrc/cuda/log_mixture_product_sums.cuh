// Weighted sums of coordinates on the tensor cores of sm_80 and newer, where log_mixture_sums.cuh would take
// differences one by one: sum_j a_ij y'_j for a row, sum_i a_ij x'_i for a centre, y' and x' from the offset.
//
// Weights are in parts as the coordinates are (log_mixture_pieces.cuh), six products: a sum is within 2^-21
// of sum |a| |y'|, and 2^-24 of itself for each of the float32 additions that put slices together, 64 a block
// of weights at most.
//
// A block has a tile of 128 owners x 128 dimensions and walks over the others in slices of 32; eight warps
// have 64 x 32 sums each. A slice takes 192 products of a warp, 36 loads of matrices and 64 additions a
// thread: 2048 multiply-adds a product make 3072 clocks of an A100's tensor cores (1024 a clock), where the
// loads take 1152 (of 512 bytes, 128 a clock) and the 48 KiB that arrive from L2 some 1000: the products are
// the limit, and on an H100, where they take half as long at best, still. They do 128 x 128 x 32
// multiply-adds in that time, 171 a clock, where CUDA cores do 64 on an A100 and 128 on an H100 and take two
// or three instructions for each, with the difference.
#pragma once

#include "log_mixture_sums.cuh"

namespace refine_ext::cuda {

struct ProductSums {
  const int* multiplied;  // whether to do it, or nullptr: yes
  const uint4* weights;  // of the block, in parts: [tile of rows][slice of centres], `weight_slices` of these
  const uint4* others;   // of the block's centres, or rows, on: [tile][slice of the dimensions]
  float* sums;           // [parts][owners][d]
  int64_t owners, count, weight_slices, slices, d, parts;  // count: of the others
};

// Sums and products fill the registers: what only the beginning and the end need is in local memory.
// budget: registers 256, local 8 (centers 0), occupancy 12%
template <bool kCenters>
__global__ void __launch_bounds__(kProductThreads) mixture_product_sums_kernel(const ProductSums task) {
  constexpr int kOwn = 8, kTile = kProductTile, kSlices = kProductTile / kProductSlice;
  constexpr int kRowPacks = kProductSlice * kProductPacks;  // of 32 rows of a part
  REFINE_EXT_DYNAMIC_SHARED(uint4, pieces);
  if (task.multiplied && !*task.multiplied) return;
  const int thread = static_cast<int>(threadIdx.x);
  const ProductPlace place;
  const int64_t across = (task.d + kTile - 1) / kTile;
  const int64_t tiles = (task.owners + kTile - 1) / kTile * across;
  const int64_t part = blockIdx.x / tiles, tile = (blockIdx.x - part * tiles) / across;
  const int64_t k0 = (blockIdx.x - part * tiles - tile * across) * kTile;
  const int64_t all = (task.count + kProductSlice - 1) / kProductSlice;
  const int64_t each = (all + task.parts - 1) / task.parts;
  const int64_t begin = part * each, end = begin + each < all ? begin + each : all;

  // A slice of 32 rows of four slices of columns from `from` on, the last of which there are `slices`.
  const auto copy_across = [&](uint4* to, const uint4* from, int64_t slice, int64_t first, int64_t slices) {
#pragma unroll
    for (int i = 0; i < kPiecePacks; i += kProductThreads) {
      const int chunk = (i + thread) / kRowPacks, in_chunk = (i + thread) % kRowPacks;
      const int64_t column = first + chunk / kProductParts;
      const int64_t piece = slice / kSlices * slices + (column < slices ? column : slices - 1);
      copy_async(to + i + thread, from + piece * kPiecePacks +
                                      (chunk % kProductParts * kSlices + slice % kSlices) * kRowPacks +
                                      in_chunk);
    }
  };
  int64_t next = begin;
  const auto fetch = [&](int slot) {
    if (next < end) {
      uint4* const to = pieces + slot * 2 * kPiecePacks;
      if constexpr (kCenters) {
        copy_across(to, task.weights, next, tile * kSlices, task.weight_slices);
      } else {
        const uint4* const from = task.weights + (tile * task.weight_slices + next) * kPiecePacks;
#pragma unroll
        for (int i = 0; i < kPiecePacks; i += kProductThreads) copy_async(to + i + thread, from + i + thread);
      }
      copy_across(to + kPiecePacks, task.others, next, k0 / kProductSlice, task.slices);
    }
    commit_copies();
    ++next;
  };
  fetch(0);
  fetch(1);
  int slot = 0;

  float sums[kOwn][kOwn];
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
#pragma unroll
    for (int c = 0; c < kOwn; ++c) sums[i][c] = 0.0f;
  }
#pragma unroll 1
  for (int64_t slice = begin; slice < end; ++slice) {
    wait_copies<1>();
    __syncthreads();
    fetch(slot == 0 ? kProductPieces - 1 : slot - 1);  // which everybody has read
    const uint4* const weights = pieces + slot * 2 * kPiecePacks;
    slot = slot == kProductPieces - 1 ? 0 : slot + 1;
    multiply_slice<kCenters, true>(weights, weights + kPiecePacks, place,
                                   [&](int t, int u, const float (&d)[4]) {
#pragma unroll
                                     for (int e = 0; e < 4; ++e) sums[2 * t + e / 2][2 * u + e % 2] += d[e];
                                   });
  }
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    const int64_t owner = tile * kTile + place.row(i);
    if (owner >= task.owners) continue;
    float* const to = task.sums + (part * task.owners + owner) * task.d;
#pragma unroll
    for (int c = 0; c < kOwn; ++c) {
      const int64_t k = k0 + place.column(c);
      if (k < task.d) to[k] = sums[i][c];
    }
  }
}

// to[i] += the sum of parts[p][i] in their order, from zero on at first.
struct Addition {
  const float* parts;
  float* to;
  int64_t count, each, apart;  // parts, elements, and from a part to the next
};
struct Additions {
  const int* multiplied;  // as above
  bool first;
  Addition of[3];
};

// A thread an element of all.
// budget: registers 24, occupancy 100%
__global__ void __launch_bounds__(kMixtureThreads) mixture_add_kernel(const Additions task) {
  if (task.multiplied && !*task.multiplied) return;
  int64_t e = static_cast<int64_t>(blockIdx.x) * kMixtureThreads + static_cast<int>(threadIdx.x);
#pragma unroll
  for (const Addition& addition : task.of) {
    if (e >= 0 && e < addition.each) {
      float sum = 0.0f;
#pragma unroll 4
      for (int64_t p = 0; p < addition.count; ++p) sum += addition.parts[p * addition.apart + e];
      addition.to[e] = task.first ? sum : addition.to[e] + sum;
    }
    e -= addition.each;
  }
}

// A thread an element: gradients by a block's rows, sum_j a_ij y'_j - x'_i sum_j a_ij, of weights that have
// the factor 1 / s^2 or, of a shared scale, do not.
// budget: registers 32, occupancy 100%
__global__ void __launch_bounds__(kMixtureThreads)
    mixture_product_store_kernel(const MixtureInputs in, const WeightBlock block, const float* offset,
                                 const float* sums, const float* totals, const double* grad, void* to) {
  const int64_t e = static_cast<int64_t>(blockIdx.x) * kMixtureThreads + static_cast<int>(threadIdx.x);
  if (e >= block.rows * in.d || !block.is_multiplied()) return;
  const int64_t local = e / in.d, k = e - local * in.d, row = block.first_row + local;
  const double from = static_cast<double>(offset[k]);
  // As it would be in parts.
  const double x = static_cast<float>(element<double>(in.x, in.storage, row * in.d + k) - from);
  const double sum = static_cast<double>(sums[e]) - static_cast<double>(totals[local]) * x;
  const double scale = block.factored ? 1.0 : scale_of<double>(in, 0);
  store_element(grad[row] == 0.0 ? 0.0 : sum / scale / scale, to, in.storage, row * in.d + k);
}

}  // namespace refine_ext::cuda
