// Tiles of pairs of a Gaussian log-mixture: which of them a thread has, their squared distances, and how an
// exponent becomes a weight.
//
// Exponents are in base 2 (csrc/math/log_mixture.h): t = log2(w) + slope * q with q = |x - y|^2 and slope =
// -log2(e) / (2 s^2), or q = |(x - y) / s|^2 log2(e) / 2 and slope = -1 where every dimension has its own s.
// Differences are taken before anything is scaled. Then t - reference is one multiply-add from the exact q,
// so that it is as accurate where t is a million as where it is one; from kCoarse on, where the reference's
// own rounding is many powers of two, t is rounded first.
#pragma once

#include "../math/log_mixture_problem.h"
#include "storage.cuh"

namespace refine_ext::cuda {

inline constexpr int kMixtureThreads = 128;
inline constexpr int kMixtureAcross = 8;  // threads that share a row
inline constexpr int kMixtureSlice = 16;  // dimensions in shared memory at a time

template <class C>
inline constexpr C kCoarse = C(268435456.0);
template <class C>
inline constexpr C kLowest = std::numeric_limits<C>::lowest();
template <class C>
inline constexpr C kInfinity = std::numeric_limits<C>::infinity();
// Finite, and infinitely far from anything less than half of it: squared differences overflow.
template <class C>
inline constexpr C kFar = C(0.75) * std::numeric_limits<C>::max();

__device__ __forceinline__ float fused(float a, float b, float c) { return ::fmaf(a, b, c); }
__device__ __forceinline__ double fused(double a, double b, double c) { return ::fma(a, b, c); }

// a b, whose rounding no addition that follows takes away: in another kernel it may come from memory.
template <class C>
__device__ __forceinline__ C rounded_product(C a, C b) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(C) == 4) {
    return __fmul_rn(a, b);
  } else {
    return __dmul_rn(a, b);
  }
#else
  return a * b;
#endif
}

// 2^x. In float32 one instruction, within 2^-22 of itself; zero below 2^-126.
__device__ __forceinline__ float power_of_two(float x) {
#if defined(__CUDA_ARCH__)
  asm("ex2.approx.ftz.f32 %0, %0;" : "+f"(x));
  return x;
#else
  return ::exp2f(x);
#endif
}
__device__ __forceinline__ double power_of_two(double x) { return ::exp2(x); }

// What depends on `value` is computed again from here on, where a branch is rare, rather than kept.
__device__ __forceinline__ void forget([[maybe_unused]] float& value) {
#if defined(__CUDA_ARCH__)
  asm volatile("" : "+f"(value));
#endif
}

template <class C>
__device__ __forceinline__ C element(const void* data, Storage storage, int64_t i) {
  switch (storage) {
    case Storage::float32:
      return static_cast<C>(static_cast<const float*>(data)[i]);
    case Storage::float16:
      return static_cast<C>(widen(static_cast<const Half*>(data)[i]));
    case Storage::bfloat16:
      return static_cast<C>(widen(static_cast<const BFloat16*>(data)[i]));
    default:
      if constexpr (sizeof(C) == 8) return static_cast<const double*>(data)[i];
      return C(0);
  }
}

// A coordinate of a centre that sums multiply by its weight. At infinity that is zero, but zero times
// infinity is not: `instead` is finite.
template <class C>
__device__ __forceinline__ C finite_or(C coordinate, C instead) {
  return ::fabs(coordinate) == kInfinity<C> ? instead : coordinate;
}

__device__ __forceinline__ void store_element(double value, void* data, Storage storage, int64_t i) {
  switch (storage) {
    case Storage::float64:
      static_cast<double*>(data)[i] = value;
      return;
    case Storage::float32:
      narrow(value, static_cast<float*>(data)[i]);
      return;
    case Storage::float16:
      return narrow(value, static_cast<Half*>(data)[i]);
    case Storage::bfloat16:
      return narrow(value, static_cast<BFloat16*>(data)[i]);
  }
}

// In the compute type of `storage`.
template <class C>
__device__ __forceinline__ C compute_element(const void* data, Storage storage, int64_t i) {
  if constexpr (sizeof(C) == 4) return static_cast<const float*>(data)[i];
  return storage == Storage::float64 ? static_cast<C>(static_cast<const double*>(data)[i])
                                     : static_cast<C>(static_cast<const float*>(data)[i]);
}

template <class C>
__device__ __forceinline__ C scale_of(const MixtureInputs& in, int64_t j) {
  return compute_element<C>(in.scale, in.storage, in.scale_kind == MixtureScale::shared ? 0 : j);
}
template <class C>
__device__ __forceinline__ C slope_of_scale(C scale) {
  return C(-0.5 * kLog2E) / scale / scale;
}
template <class C>
__device__ __forceinline__ C log2_weight_of(const MixtureInputs& in, int64_t j) {
  return in.log_weights ? rounded_product(C(kLog2E), compute_element<C>(in.log_weights, in.storage, j))
                        : C(0);
}

// t - reference. Forward and backward take the same operations in the same order: what the rounding of q has
// made of t is in a pair's weight and in its row's value alike, and cancels however large t is. The
// log-weight comes last, so that its sum with the reference, as large as t, is never rounded.
template <bool kWeighted = true, class C>
__device__ __forceinline__ C exponent(C q, C slope, C weight, C reference) {
  const C distant = fused(q, slope, -reference);
  return kWeighted ? distant + weight : distant;
}

// How kMixtureThreads threads divide a tile of kRows x kColumns pairs: each has kOwn rows and kOwn columns,
// four neighbours at a time, so that 16 bytes of shared memory hold them and eight threads' are 128.
template <class C>
struct PairTile {
  static constexpr int kOwn = sizeof(C) == 4 ? 8 : 4;
  static constexpr int kRows = kMixtureThreads / kMixtureAcross * kOwn;
  static constexpr int kColumns = kMixtureAcross * kOwn;

  const int across = static_cast<int>(threadIdx.x) % kMixtureAcross;
  const int down = static_cast<int>(threadIdx.x) / kMixtureAcross;

  __device__ __forceinline__ int row(int i) const {
    return i / 4 * (4 * kMixtureThreads / kMixtureAcross) + 4 * down + i % 4;
  }
  __device__ __forceinline__ int column(int c) const {
    return c / 4 * (4 * kMixtureAcross) + 4 * across + c % 4;
  }
};

// A slice of the dimensions of a tile's rows and columns, and of 1 / s; 16 bytes between two dimensions put
// what is stored together into other banks.
template <class C, bool kDims>
struct PairSlice {
  static constexpr int kApart = 16 / sizeof(C);
  C rows[kMixtureSlice][PairTile<C>::kRows + kApart];
  C columns[kMixtureSlice][PairTile<C>::kColumns + kApart];
  C inverse[kDims ? kMixtureSlice : 1][kDims ? PairTile<C>::kColumns + kApart : kApart];
};

// Squared distances of a tile's pairs by the whole block, which may not be in `slice` still. Rows and centres
// that do not exist are zeros.
template <class C, bool kDims>
__device__ __forceinline__ void squared_distances(const MixtureInputs& in, int64_t first_row,
                                                  int64_t first_center, PairSlice<C, kDims>& slice,
                                                  C (&q)[PairTile<C>::kOwn][PairTile<C>::kOwn]) {
  using Tile = PairTile<C>;
  constexpr int kOwn = Tile::kOwn;
  const Tile mine;
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
#pragma unroll
    for (int c = 0; c < kOwn; ++c) q[i][c] = C(0);
  }
  const int k_own = static_cast<int>(threadIdx.x) % kMixtureSlice;
  const int first = static_cast<int>(threadIdx.x) / kMixtureSlice;
  constexpr int kStep = kMixtureThreads / kMixtureSlice;
#pragma unroll 1
  for (int64_t k0 = 0; k0 < in.d; k0 += kMixtureSlice) {
    const int64_t k = k0 + k_own;
    __syncthreads();
#pragma unroll 4
    for (int r = first; r < Tile::kRows; r += kStep) {
      const bool exists = k < in.d && first_row + r < in.m;
      slice.rows[k_own][r] = exists ? element<C>(in.x, in.storage, (first_row + r) * in.d + k) : C(0);
    }
#pragma unroll 4
    for (int r = first; r < Tile::kColumns; r += kStep) {
      const bool exists = k < in.d && first_center + r < in.n;
      const int64_t at = (first_center + r) * in.d + k;
      slice.columns[k_own][r] = exists ? element<C>(in.centers, in.storage, at) : C(0);
      if constexpr (kDims) {
        slice.inverse[k_own][r] =
            exists ? C(0.84932180028801904272) / compute_element<C>(in.scale, in.storage, at) : C(0);
      }
    }
    __syncthreads();
#pragma unroll 4
    for (int l = 0; l < kMixtureSlice; ++l) {
      C x[kOwn], y[kOwn], s[kOwn];
#pragma unroll
      for (int i = 0; i < kOwn; ++i) x[i] = slice.rows[l][mine.row(i)];
#pragma unroll
      for (int c = 0; c < kOwn; ++c) {
        y[c] = slice.columns[l][mine.column(c)];
        if constexpr (kDims) s[c] = slice.inverse[l][mine.column(c)];
      }
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
#pragma unroll
        for (int c = 0; c < kOwn; ++c) {
          C z = x[i] - y[c];
          if constexpr (kDims) z *= s[c];
          q[i][c] = fused(z, z, q[i][c]);
        }
      }
    }
  }
}

// The slope that all centres have, unless each has its own.
template <class C>
__device__ __forceinline__ C shared_slope(const MixtureInputs& in) {
  return in.scale_kind == MixtureScale::shared ? static_cast<C>(slope_of_scale(scale_of<double>(in, 0)))
                                               : C(-1);
}

// Slopes and log-weights of kCount centres from `first` on; zeros where there is none.
template <class C, bool kDims, int kCount>
__device__ __forceinline__ void load_weights(const MixtureInputs& in, int64_t first, C shared,
                                             C (&slopes)[kCount], C (&weights)[kCount]) {
#pragma unroll 1
  for (int o = static_cast<int>(threadIdx.x); o < kCount; o += kMixtureThreads) {
    const int64_t j = first + o;
    C slope = shared;
    if (!kDims && in.scale_kind == MixtureScale::per_center && j < in.n)
      slope = slope_of_scale(scale_of<C>(in, j));
    slopes[o] = j < in.n ? slope : C(0);
    weights[o] = j < in.n ? log2_weight_of<C>(in, j) : C(0);
  }
}

}  // namespace refine_ext::cuda
