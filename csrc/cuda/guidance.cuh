// Kernels of the guidance family: a sampler's update, read once and written once, its noise made between.
//
// In the time that an H200 takes to move a float32 element of x, two terms and the result at 85 % of its copy
// bandwidth of 4.3 TB/s, 16 bytes, its schedulers issue about 107 instructions; 53 for bfloat16, 214 for
// float64. With noise the kernels have 49, 49 and 116 of them, without 11, 14 and 11. Of the noise's, 15 are
// a quarter of a Philox block, 19 half a Box-Muller pair.
//
// Normals in float32 are within 1e-6 max(1, |z|) of their definition, and of their pair's radius near zero.
#pragma once

#include "../math/guidance_problem.h"
#include "samples.cuh"

namespace refine_ext::cuda {

inline constexpr int kStepThreads = 256;
// The terms of a kernel's two instances: Euler's and Heun's steps have at most three.
inline constexpr int kFewTerms = 3;

// Blocks of a multiprocessor: as many as leave a thread the registers that it has a use for.
template <class T, class U, bool kMany>
inline constexpr int kStepBlocks = !std::is_same_v<T, U> || sizeof(T) == 8 ? (kMany ? 1 : 2)
                                   : kMany                                 ? 2
                                   : sizeof(T) == 2                        ? 3
                                                                           : 4;

template <class T>
inline constexpr Storage kStorageOf = Storage::float32;
template <>
inline constexpr Storage kStorageOf<double> = Storage::float64;
template <>
inline constexpr Storage kStorageOf<Half> = Storage::float16;
template <>
inline constexpr Storage kStorageOf<BFloat16> = Storage::bfloat16;

__device__ __forceinline__ float multiply_add(float a, float b, float c) { return ::fmaf(a, b, c); }
__device__ __forceinline__ double multiply_add(double a, double b, double c) { return ::fma(a, b, c); }

// Element i of a sample, of whatever storage.
template <class C>
__device__ __forceinline__ C element(const StepTensor& tensor, const void* sample, int64_t i) {
  switch (tensor.storage) {
    case Storage::float64:
      return static_cast<C>(static_cast<const double*>(sample)[i]);
    case Storage::float16:
      return static_cast<C>(widen(static_cast<const Half*>(sample)[i]));
    case Storage::bfloat16:
      return static_cast<C>(widen(static_cast<const BFloat16*>(sample)[i]));
    default:
      return static_cast<C>(static_cast<const float*>(sample)[i]);
  }
}

// The four normals of a Philox block.
template <class C>
__device__ __forceinline__ void normals(const NoiseSequence& noise, uint32_t index, C* z) {
  const PhiloxBlock<uint32_t> block = noise.block(index);
#pragma unroll
  for (int pair = 0; pair < 2; ++pair) {
    const NormalPair<C> two = normal_pair<C, uint32_t>(block.word[2 * pair], block.word[2 * pair + 1]);
    z[2 * pair] = two.cosine;
    z[2 * pair + 1] = two.sine;
  }
}

// kWidth elements of a tensor as they are loaded, whose storage S need not be the widest.
template <class T, int kWidth>
struct Elements {
  uint4 pack[kWidth / kLanes<T>];

  template <class S>
  __device__ __forceinline__ void load(const uint4* from) {
#pragma unroll
    for (int p = 0; p < kWidth / kLanes<S>; ++p) pack[p] = load_pack(from + p);
  }
  // y += c times these.
  template <class S, class C>
  __device__ __forceinline__ void add_to(C c, C (&y)[kWidth]) const {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      y[i] = multiply_add(c, widen_lane<C, S>(pack[i / kLanes<S>], i % kLanes<S>), y[i]);
    }
  }
};

// Terms are of storage T or, some or all of them, U. A thread takes kWidth elements at a time, whole Philox
// blocks and whole packs of both; where rows do not begin on a pack, or have terms of a third storage, and
// for what is left at a row's end, one Philox block at a time.
//
// A term whose coefficient is zero is not loaded.
// budget: registers 48 (many 96, 16-bit 56, 16-bit many 96, float64 88, float64 many 136, float32 U=float16
//     80, float32 U=bfloat16 80, float32 many U=float16 128, float32 many U=bfloat16 128, noisy 64, noisy
//     many 104, noisy 16-bit 80, noisy 16-bit many 128, noisy float64 104, noisy float64 many 152, noisy
//     many float64 U=float32 160, noisy float32 U=float16 128, noisy float32 U=bfloat16 128, noisy float32
//     many U=float16 168, noisy float32 many U=bfloat16 168), occupancy 62% (many 25%, 16-bit 50%, 16-bit
//     many 25%, float64 25%, float64 many 12%, float32 U=float16 37%, float32 U=bfloat16 37%, float32 many
//     U=float16 25%, float32 many U=bfloat16 25%, noisy 50%, noisy many 25%, noisy 16-bit 37%, noisy 16-bit
//     many 25%, noisy float64 25%, noisy float64 many 12%, noisy float32 U=float16 25%, noisy float32
//     U=bfloat16 25%, noisy float32 many U=float16 12%, noisy float32 many U=bfloat16 12%), inputs 4 (many
//     8, float64 U=float32 5.5, float32 U=float16 5.5, float32 U=bfloat16 5.5, many float64 U=float32 11.5,
//     many float32 U=float16 11.5, many float32 U=bfloat16 11.5), outputs 1,
//   instructions/sample 11 (many 21, 16-bit 14, 16-bit many 27, float64 U=float32 28, many float64
//     U=float32 57, float32 U=float16 19, float32 U=bfloat16 19, many float32 U=float16 40, many float32
//     U=bfloat16 40, noisy 50, noisy many 59, noisy 16-bit many 62, noisy float64 119, noisy float64 many
//     128, noisy float64 U=float32 134, noisy many float64 U=float32 166, noisy float32 U=float16 54, noisy
//     float32 U=bfloat16 54, noisy many float32 U=float16 75, noisy many float32 U=bfloat16 75),
//   special/sample 0 (noisy 1.5),
//   float64/sample 0.5 (float64 5, float64 many 10, float64 U=float32 11, float64 many U=float32 24, noisy
//     float64 38.3, noisy float64 many 44.3, noisy float64 U=float32 44.3, noisy float64 many U=float32
//     58.3)
template <class T, class U, bool kNoisy, bool kMany>
__global__ void __launch_bounds__(kStepThreads, kStepBlocks<T, U, kMany>)
    guided_step_kernel(const GuidedStepProblem problem, const Layout layout) {
  using C = typename ComputeOf<T>::type;
  constexpr int kTerms = kMany ? kMostTerms : kFewTerms;
  constexpr int kWidth = kLanes<T> > kLanes<U> ? kLanes<T> : kLanes<U> > 4 ? kLanes<U> : 4;
  constexpr int kPacks = kWidth / kLanes<T>, kOtherPacks = kWidth / kLanes<U>, kBlocks = kWidth / 4;
  constexpr bool kMixed = kStorageOf<T> != kStorageOf<U>;
  const Team team = my_team(layout);
  if (team.row >= problem.rows) return;

  C c[kTerms + 1], s = C(0);
  const uint4* from[kTerms + 1];
  unsigned other = 0;  // bit k: term k is of storage U
  T* const out = static_cast<T*>(problem.out) + team.row * problem.n;
  bool packed = is_aligned(out);
#pragma unroll
  for (int k = 0; k <= kTerms; ++k) {
    const StepTensor& tensor = k == 0 ? problem.x : problem.term[k - 1];
    const int64_t offset = team.row * tensor.stride * size_of(tensor.storage);
    from[k] = reinterpret_cast<const uint4*>(static_cast<const char*>(tensor.data) + offset);
    c[k] = C(0);
    if (k > problem.terms) continue;
    c[k] = static_cast<C>(problem.coefficient(team.row, k));
    if (c[k] == C(0)) continue;
    packed = packed && is_aligned(from[k]);
    if (kMixed && k > 0 && tensor.storage == kStorageOf<U>) {
      other |= 1u << k;
    } else {
      packed = packed && tensor.storage == kStorageOf<T>;
    }
  }
  NoiseSequence noise{};
  if constexpr (kNoisy) {
    s = static_cast<C>(problem.coefficient(team.row, problem.terms + 1));
    noise = problem.noise(team.row);
  }

  const int64_t groups = packed ? problem.n / kWidth : 0;
  // 32 bits count the groups of a row, which has at most 2^34 elements.
  int left = team.first < groups ? static_cast<int>((groups - team.first - 1) / team.stride) + 1 : 0;
  const uint32_t stride = static_cast<uint32_t>(team.stride);
  uint4* const to = reinterpret_cast<uint4*>(out);
#pragma unroll 1
  for (uint32_t group = static_cast<uint32_t>(team.first); left > 0; group += stride, --left) {
    Elements<T, kWidth> terms[kTerms + 1];
#pragma unroll
    for (int k = 0; k <= kTerms; ++k) {
      if (c[k] == C(0)) continue;
      if (kMixed && k > 0 && (other >> k & 1)) {
        terms[k].template load<U>(from[k] + static_cast<uint64_t>(group) * kOtherPacks);
      } else {
        terms[k].template load<T>(from[k] + static_cast<uint64_t>(group) * kPacks);
      }
    }
    C y[kWidth] = {}, z[kWidth];
    if constexpr (kNoisy) {
      if (s != C(0)) {
#pragma unroll
        for (int b = 0; b < kBlocks; ++b) normals(noise, group * kBlocks + b, z + 4 * b);
      }
    }
#pragma unroll
    for (int k = 0; k <= kTerms; ++k) {
      if (c[k] == C(0)) continue;
      if (kMixed && k > 0 && (other >> k & 1)) {
        terms[k].template add_to<U>(c[k], y);
      } else {
        terms[k].template add_to<T>(c[k], y);
      }
    }
    T lanes[kWidth];
#pragma unroll
    for (int lane = 0; lane < kWidth; ++lane) {
      if (kNoisy && s != C(0)) y[lane] = multiply_add(s, z[lane], y[lane]);
      narrow(y[lane], lanes[lane]);
    }
    Elements<T, kWidth> result;
    memcpy(result.pack, lanes, sizeof(lanes));
#pragma unroll
    for (int p = 0; p < kPacks; ++p) __stwb(to + static_cast<uint64_t>(group) * kPacks + p, result.pack[p]);
  }

#pragma unroll 1
  for (int64_t block = groups * kBlocks + team.first; 4 * block < problem.n; block += team.stride) {
    C z[4] = {};
    if constexpr (kNoisy) {
      if (s != C(0)) normals(noise, static_cast<uint32_t>(block), z);
    }
#pragma unroll 1
    for (int lane = 0; lane < 4; ++lane) {
      const int64_t i = 4 * block + lane;
      if (i >= problem.n) break;
      C y = C(0);
#pragma unroll
      for (int k = 0; k <= kTerms; ++k) {
        if (c[k] == C(0)) continue;
        y = multiply_add(c[k], element<C>(k == 0 ? problem.x : problem.term[k - 1], from[k], i), y);
      }
      if (kNoisy && s != C(0)) y = multiply_add(s, z[0], y);
      narrow(y, out[i]);
      // The next is the first: an index that is not known when compiled would put them into local memory.
      z[0] = z[1];
      z[1] = z[2];
      z[2] = z[3];
    }
  }
}

}  // namespace refine_ext::cuda
