// Sums and maxima over a team, in a fixed order: every thread gets the same bits on every run.
#pragma once

#include "samples.cuh"

namespace refine_ext::cuda {

inline constexpr int kMaxThreads = 512;
inline constexpr int kMaxWarps = kMaxThreads / kWarp;

struct Sum {
  template <class V>
  static __device__ __forceinline__ V neutral() {
    return V(0);
  }
  template <class V>
  static __device__ __forceinline__ V merge(V a, V b) {
    return a + b;
  }
};
struct Maximum {  // skips NaN
  template <class V>
  static __device__ __forceinline__ V neutral() {
    return std::numeric_limits<V>::has_infinity ? -std::numeric_limits<V>::infinity()
                                                : std::numeric_limits<V>::lowest();
  }
  template <class V>
  static __device__ __forceinline__ V merge(V a, V b) {
    return b > a ? b : a;
  }
};

template <class Monoid, class V, int kCount>
__device__ __forceinline__ void reduce_warp(V (&values)[kCount]) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      values[k] = Monoid::merge(values[k], __shfl_xor_sync(kFullMask, values[k], distance));
    }
  }
}

// A block team calls this with all of its threads.
template <class Monoid, class V, int kCount>
__device__ __forceinline__ void reduce(const Team& team, V (&values)[kCount]) {
  reduce_warp<Monoid>(values);
  if (team.size == kWarp) return;
  REFINE_EXT_SHARED(V, parts, [kCount][kMaxWarps]);
  const int warp = team.rank / kWarp, lane = team.rank % kWarp, warps = team.size / kWarp;
  if (lane == 0) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) parts[k][warp] = values[k];
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < kCount; ++k) values[k] = lane < warps ? parts[k][lane] : Monoid::template neutral<V>();
  __syncthreads();
  reduce_warp<Monoid>(values);
}

// Running sums of a block of `size` threads, this thread's value included; `total` is the block's.
template <class V>
__device__ __forceinline__ V running_sum(const Team& team, V value, V& total) {
  const int warp = team.rank / kWarp, lane = team.rank % kWarp, warps = team.size / kWarp;
  V sum = value;
#pragma unroll
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const V before = __shfl_up_sync(kFullMask, sum, distance);
    sum += lane >= distance ? before : V(0);
  }
  REFINE_EXT_SHARED(V, ends, [kMaxWarps]);
  if (lane == kWarp - 1) ends[warp] = sum;
  __syncthreads();
  V before = V(0);
  total = V(0);
  for (int w = 0; w < warps; ++w) {
    before += w < warp ? ends[w] : V(0);
    total += ends[w];
  }
  __syncthreads();
  return before + sum;
}

__device__ __forceinline__ void synchronise(const Team& team) {
  if (team.size == kWarp) {
    __syncwarp();
  } else {
    __syncthreads();
  }
}

}  // namespace refine_ext::cuda
