// Rows and centres, and weights of their pairs, in parts that the tensor cores of sm_80 and newer multiply.
//
// A float32 number is split into three bfloat16 parts, h + m + l, each the rest of those before to 8 bits: l
// is below 2^-16 of the whole, and what is left over below 2^-26. Six products make float32's: h h, h m, m h,
// m m, h l, l h; those left out are below 2^-23 of the whole together. Those of 32 dimensions (or of as many
// others, where weights multiply) are summed by the tensor cores, the small ones first, and then added in
// float32: the tensor cores cut off what is below 2^-23 of a sum, which counts for the last few additions of
// each slice alone, four of them. A slice's sum is within 2^-21 of the sum of its absolute products.
//
// Data are taken from about their middle, in float64, so that it is their width that errors are relative to.
#pragma once

#include "log_mixture_tile.cuh"
#include "mma.cuh"

namespace refine_ext::cuda {

inline constexpr int kProductThreads = 256;
inline constexpr int kProductTile = 128;  // rows, and columns
inline constexpr int kProductSlice = 32;
inline constexpr int kProductParts = 3;
inline constexpr int kProductPacks = kProductSlice / 8;  // of 16 bytes, of a row's part of a slice
inline constexpr int kPartPacks = kProductTile * kProductPacks;
inline constexpr int kPiecePacks = kProductParts * kPartPacks;
inline constexpr int kProductPieces = 3;  // in shared memory, of rows and columns each
inline constexpr int kProductShared = kProductPieces * 2 * kPiecePacks * 16;

// Rows or centres in parts: [tile][slice][part][row][pack], as a piece lies in shared memory; of each its
// norm and its largest coordinate. nullptr: not wanted.
struct ProductOperand {
  uint4* pieces;
  float* norms;
  float* widths;
};

// Packs change places so that eight rows' are in different banks, and one row's too.
__device__ __forceinline__ int place_of_pack(int row, int pack) {
  return row * kProductPacks + (pack ^ (row / 2 % kProductPacks));
}

// A piece that is multiplied along its rows has a slice of the dimensions of a tile's rows, as above. One
// that is multiplied across them has all of a tile's 128 dimensions of a slice of 32 rows: [slice of the
// dimensions][part][row][pack].
__device__ __forceinline__ int place_across(int part, int row, int pack) {
  return (pack / kProductPacks * kProductParts + part) * kProductSlice * kProductPacks +
         place_of_pack(row, pack % kProductPacks);
}

// Sixteen of a tile's 128 from `first` on, and as many of the slice that is summed over: a quarter of a warp
// has a matrix of eight and eight, in the halves that it names.
template <bool kAcross>
__device__ __forceinline__ void load_part(uint32_t (&matrices)[4], const uint4* piece, int part, int first,
                                          int half, int step, int half_step) {
  const int eighth = static_cast<int>(threadIdx.x) % 8;
  if constexpr (kAcross) {
    load_matrices<true>(matrices,
                        piece + place_across(part, 16 * step + 8 * half_step + eighth, first / 8 + half));
  } else {
    load_matrices<false>(
        matrices, piece + part * kPartPacks + place_of_pack(first + 8 * half + eighth, 2 * step + half_step));
  }
}

// Where a warp of eight is in a tile of 128 x 128, with 64 x 32 products: a thread has in d[t][u] those of
// mma.cuh, of rows down + 16 t and on, columns across + 8 u and on.
struct ProductPlace {
  int lane, down, across;
  __device__ __forceinline__ ProductPlace()
      : lane(static_cast<int>(threadIdx.x) % kWarp),
        down(static_cast<int>(threadIdx.x) / kWarp % 2 * 64),
        across(static_cast<int>(threadIdx.x) / kWarp / 2 * 32) {}
  // Of the thread's eight rows and columns.
  __device__ __forceinline__ int row(int i) const { return down + i / 2 * 16 + i % 2 * 8 + lane / 4; }
  __device__ __forceinline__ int column(int c) const { return across + c / 2 * 8 + lane % 4 * 2 + c % 2; }
};

// add(t, u, d) with the products of a slice: of rows' and columns' pieces, for rows down + 16 t and on and
// columns across + 8 u and on.
template <bool kRowsAcross, bool kColumnsAcross, class Add>
__device__ __forceinline__ void multiply_slice(const uint4* rows, const uint4* columns,
                                               const ProductPlace& place, Add&& add) {
  constexpr int kSteps = kProductSlice / 16;
  const int low = place.lane / 8 % 2, high = place.lane / 16;
  uint32_t b[kProductParts][kSteps][2][4];
#pragma unroll
  for (int part = 0; part < kProductParts; ++part) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int pair = 0; pair < 2; ++pair)
        load_part<kColumnsAcross>(b[part][step][pair], columns, part, place.across + 16 * pair, high, step,
                                  low);
    }
  }
#pragma unroll
  for (int t = 0; t < 4; ++t) {
    uint32_t a[kProductParts][kSteps][4];
#pragma unroll
    for (int part = 0; part < kProductParts; ++part) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step)
        load_part<kRowsAcross>(a[part][step], rows, part, place.down + 16 * t, low, step, high);
    }
    float d[4][4] = {};
    const auto multiply = [&](int row_part, int column_part) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
#pragma unroll
        for (int u = 0; u < 4; ++u) {
          const uint32_t (&all)[4] = b[column_part][step][u / 2];
          const uint32_t two[2] = {all[2 * (u % 2)], all[2 * (u % 2) + 1]};
          multiply_add(d[u], a[row_part][step], two);
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
    for (int u = 0; u < 4; ++u) add(t, u, d[u]);
  }
}

template <class V>
__device__ __forceinline__ void split(float value, V (&parts)[kProductParts][8], int i) {
#pragma unroll
  for (int part = 0; part < kProductParts; ++part) {
    narrow(value, parts[part][i]);
    value -= widen(parts[part][i]);
  }
}

}  // namespace refine_ext::cuda
