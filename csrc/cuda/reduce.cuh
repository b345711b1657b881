// Sums and maxima over a team, in a fixed order: every thread gets the same bits on every run.
#pragma once

#include "samples.cuh"

namespace refine_ext::cuda {

inline constexpr int kMaxThreads = 512;
inline constexpr int kMaxWarps = kMaxThreads / kWarp;

struct Sum {
  static __device__ __forceinline__ double neutral() { return 0.0; }
  static __device__ __forceinline__ double merge(double a, double b) { return a + b; }
};
struct Maximum {  // skips NaN
  static __device__ __forceinline__ double neutral() { return -std::numeric_limits<double>::infinity(); }
  static __device__ __forceinline__ double merge(double a, double b) { return b > a ? b : a; }
};

template <class Monoid, int kCount>
__device__ __forceinline__ void reduce_warp(double (&values)[kCount]) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      values[k] = Monoid::merge(values[k], __shfl_xor_sync(kFullMask, values[k], distance));
    }
  }
}

// A block team calls this with all of its threads.
template <class Monoid, int kCount>
__device__ __forceinline__ void reduce(const Team& team, double (&values)[kCount]) {
  reduce_warp<Monoid>(values);
  if (team.size == kWarp) return;
  REFINE_EXT_SHARED(double, parts, [kCount][kMaxWarps]);
  const int warp = team.rank / kWarp, lane = team.rank % kWarp, warps = team.size / kWarp;
  if (lane == 0) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) parts[k][warp] = values[k];
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < kCount; ++k) values[k] = lane < warps ? parts[k][lane] : Monoid::neutral();
  __syncthreads();
  reduce_warp<Monoid>(values);
}

__device__ __forceinline__ void synchronise(const Team& team) {
  if (team.size == kWarp) {
    __syncwarp();
  } else {
    __syncthreads();
  }
}

}  // namespace refine_ext::cuda
