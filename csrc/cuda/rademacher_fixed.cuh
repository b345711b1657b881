// A matrix in fixed point (csrc/math/rademacher.h) as the tensor cores take it: the integers of a block of
// rows as bytes, the highest, which is signed, first, in pieces of kGroup rows and kTileColumns columns:
//
//   planes [column tile][block][byte][group][column][kGroup]
//
// Row r of a group is byte r / 8 of chunk r % 8, and chunk c of column j stands in place c ^ (j % 8): eight
// columns' chunks come from eight different banks. Which row is which of a product's summands does not
// matter; this order makes a thread's share of the signs the bytes of one word.
#pragma once

#include "../math/rademacher_problem.h"
#include "storage.cuh"

namespace refine_ext::cuda {

inline constexpr int kTileColumns = 64;
inline constexpr int kGroup = static_cast<int>(kSignsPerPhilox);       // rows
inline constexpr int kGroups = static_cast<int>(kSignBlock) / kGroup;  // in a block
inline constexpr int kChunks = 8;                                      // of 16 rows, in a group
inline constexpr int kPieceBytes = kTileColumns * kGroup;              // what a group is in one plane
inline constexpr int kDigits64 = 7;                                    // bytes of an integer of float64
inline constexpr int kFixedThreads = 256;

__device__ __forceinline__ int place_of_chunk(int chunk, int column) { return 16 * (chunk ^ (column % 8)); }

// What a column's block of sums becomes a number with.
struct ColumnBlock {
  double back;
  int64_t total;  // of the integers
};

struct FixedColumns {
  int digits;
  int64_t tiles, blocks;
  unsigned char* planes;
  ColumnBlock* columns;  // [column tile][block][kTileColumns]
  double* peaks;         // max |value|, likewise; NaN if there is one
};

// The rows and columns that they are of: `n` rows from row 0, `m` columns from column 0.
struct MatrixPart {
  const void* data;
  int64_t n, m, stride;
};

// How values of a storage type are divided among a block's threads: kSlab columns, of which a thread has
// kOwn rows of one: chunk rank % kChunks of every kApart-th group.
template <class T>
struct FixedLayout {
  static constexpr int kSlab = sizeof(T) == 8 ? 8 : 16;
  static constexpr int kRanks = kFixedThreads / kSlab;
  static constexpr int kApart = kRanks / kChunks;
  static constexpr int kOwnGroups = kGroups / kApart;
  static constexpr int kOwn = 16 * kOwnGroups;
};

// Integers of a column; `limit` is the largest.
struct FloatToFixed {
  float first, second;  // 2^shift, which need not be a float32: the product of both
  int32_t limit;
  __device__ __forceinline__ FloatToFixed(int shift, int bits) : limit((1 << bits) - 1) {
    const int part = shift < -126 ? -126 : shift > 127 ? 127 : shift;
    first = ::ldexpf(1.0f, part);
    second = ::ldexpf(1.0f, shift - part);
  }
  // Both products are exact but where they are far below the unit.
  __device__ __forceinline__ int32_t operator()(float value) const {
    const int32_t rounded = static_cast<int32_t>(::nearbyintf(value * first * second));
    return rounded > limit ? limit : rounded < -limit ? -limit : rounded;
  }
};
struct DoubleToFixed {
  double scale;
  int64_t limit;
  __device__ __forceinline__ DoubleToFixed(int shift, int bits)
      : scale(::ldexp(1.0, shift)), limit((int64_t{1} << bits) - 1) {}
  __device__ __forceinline__ int64_t operator()(double value) const {
    const int64_t rounded = static_cast<int64_t>(::nearbyint(value * scale));
    return rounded > limit ? limit : rounded < -limit ? -limit : rounded;
  }
};

struct LargestOrNan {
  template <class V>
  static __device__ __forceinline__ V merge(V a, V b) {
    return b > a || b != b ? b : a;
  }
};
struct Add {
  template <class V>
  static __device__ __forceinline__ V merge(V a, V b) {
    return a + b;
  }
};

// Over the ranks of a column; every one of its threads gets the result. Ends with a barrier to come.
template <class Monoid, int kSlab, class V>
__device__ __forceinline__ V over_ranks(V value, V (&parts)[kFixedThreads / kWarp][kSlab]) {
  const int warp = static_cast<int>(threadIdx.x) / kWarp, column = static_cast<int>(threadIdx.x) % kSlab;
#pragma unroll
  for (int distance = kSlab; distance < kWarp; distance *= 2) {
    value = Monoid::merge(value, __shfl_xor_sync(kFullMask, value, distance));
  }
  if (static_cast<int>(threadIdx.x) % kWarp < kSlab) parts[warp][column] = value;
  __syncthreads();
  value = parts[0][column];
#pragma unroll
  for (int w = 1; w < kFixedThreads / kWarp; ++w) value = Monoid::merge(value, parts[w][column]);
  return value;
}

// A block: a slab of columns of one block of rows. Reads each value once and keeps it.
// budget: registers 128 (float64 120), shared 2048 (float64 1024), occupancy 25%
template <class T>
__global__ void __launch_bounds__(kFixedThreads, 2)
    fixed_kernel(const MatrixPart matrix, const FixedColumns out) {
  using L = FixedLayout<T>;
  using C = typename ComputeOf<T>::type;
  constexpr bool kDouble = sizeof(T) == 8;
  using Integer = std::conditional_t<kDouble, int64_t, int32_t>;
  using ToFixed = std::conditional_t<kDouble, DoubleToFixed, FloatToFixed>;
  REFINE_EXT_SHARED(C, peaks, [kFixedThreads / kWarp][L::kSlab]);
  REFINE_EXT_SHARED(uint32_t, magnitudes, [kFixedThreads / kWarp][L::kSlab]);
  REFINE_EXT_SHARED(int64_t, totals, [kFixedThreads / kWarp][L::kSlab]);
  const int64_t slab = blockIdx.x / out.blocks, block = blockIdx.x - slab * out.blocks;
  const int rank = static_cast<int>(threadIdx.x) / L::kSlab;
  const int64_t column = slab * L::kSlab + static_cast<int>(threadIdx.x) % L::kSlab;
  const int64_t first = block * kSignBlock, left = matrix.n - first;
  const int rows = static_cast<int>(left < kSignBlock ? left : kSignBlock);
  const int chunk = rank % kChunks;
  const int first_row = rank / kChunks * kGroup + chunk;

  C values[L::kOwnGroups][16], peak = C(0);
  const T* from = static_cast<const T*>(matrix.data) + (first + first_row) * matrix.stride + column;
  const bool inside = column < matrix.m;
#pragma unroll
  for (int g = 0; g < L::kOwnGroups; ++g) {
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const bool given = inside && first_row + g * L::kApart * kGroup + 8 * i < rows;
      values[g][i] = given ? widen(*from) : C(0);
      from += 8 * matrix.stride;
    }
    from += (L::kApart - 1) * kGroup * matrix.stride;
  }
#pragma unroll
  for (int g = 0; g < L::kOwnGroups; ++g) {
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const C size = values[g][i] < C(0) ? -values[g][i] : values[g][i];
      peak = LargestOrNan::merge(peak, size);
    }
  }
  peak = over_ranks<LargestOrNan, L::kSlab>(peak, peaks);
  const bool finite = peak < std::numeric_limits<C>::infinity();

  int bits = kFixedBits64;
  if constexpr (!kDouble) {
    const int certain = certain_bits(rows);
    const FloatToFixed coarse(fixed_point(static_cast<double>(peak), certain).shift, certain);
    uint32_t magnitude = 0;
    if (finite) {
#pragma unroll
      for (int g = 0; g < L::kOwnGroups; ++g) {
#pragma unroll
        for (int i = 0; i < 16; ++i) {
          const int32_t fixed = coarse(values[g][i]);
          magnitude += static_cast<uint32_t>(fixed < 0 ? -fixed : fixed);
        }
      }
    }
    magnitude = over_ranks<Add, L::kSlab>(magnitude, magnitudes);
    bits = fixed_bits(rows, magnitude, out.digits);
  }
  const FixedPoint point = fixed_point(static_cast<double>(peak), bits);
  const ToFixed to_fixed(point.shift, bits);

  const int64_t tile = column / kTileColumns;
  const int j = static_cast<int>(column % kTileColumns);
  unsigned char* const planes = out.planes +
                                (tile * out.blocks + block) * out.digits * (kGroups * kPieceBytes) +
                                j * kGroup + place_of_chunk(chunk, j);
  int64_t total = 0;
#pragma unroll
  for (int g = 0; g < L::kOwnGroups; ++g) {
    Integer fixed[16];
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      fixed[i] = finite ? to_fixed(values[g][i]) : Integer(0);
      total += fixed[i];
    }
    unsigned char* const group = planes + (rank / kChunks + g * L::kApart) * kPieceBytes;
    for (int digit = 0; digit < out.digits; ++digit) {
      const int shift = 8 * (out.digits - 1 - digit);
      uint32_t words[4];
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        const auto byte = [&](int i) { return static_cast<uint32_t>(fixed[4 * w + i] >> shift) & 255u; };
        words[w] = byte(0) | byte(1) << 8 | byte(2) << 16 | byte(3) << 24;
      }
      *reinterpret_cast<uint4*>(group + digit * (kGroups * kPieceBytes)) =
          uint4{words[0], words[1], words[2], words[3]};
    }
  }
  total = over_ranks<Add, L::kSlab>(total, totals);
  if (rank == 0) {
    const int64_t place = (tile * out.blocks + block) * kTileColumns + j;
    out.columns[place] = {point.back, total};
    out.peaks[place] = static_cast<double>(peak);
  }
}

}  // namespace refine_ext::cuda
