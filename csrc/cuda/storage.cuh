// Storage types and the 16-byte packs they are moved in.
#pragma once

#include <type_traits>

#include "launch.h"

namespace refine_ext::cuda {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// What arithmetic on a storage type is done in.
template <class T>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};

template <class To, class From>
__device__ __forceinline__ To from_bits(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  memcpy(&result, &value, sizeof(To));
  return result;
}

__device__ __forceinline__ double widen(double value) { return value; }
__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ float widen(BFloat16 value) {
  return from_bits<float>(uint32_t{value.bits} << 16);
}
__device__ __forceinline__ float widen(Half value) {
#if defined(REFINE_EXT_CUDA_ON_CPU)
  return cuda_on_cpu::half_to_float(value.bits);
#else
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
  return result;
#endif
}

__device__ __forceinline__ void narrow(double value, double& result) { result = value; }
__device__ __forceinline__ void narrow(float value, double& result) { result = value; }
__device__ __forceinline__ void narrow(float value, float& result) { result = value; }
__device__ __forceinline__ void narrow(double value, float& result) { result = static_cast<float>(value); }
__device__ __forceinline__ void narrow(float value, BFloat16& result) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
#else
  const uint32_t bits = from_bits<uint32_t>(value);
  // Round to nearest even; the carry of a large mantissa makes the next exponent, or infinity, by itself.
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  result.bits = static_cast<uint16_t>(value != value ? 0x7fffu : rounded);
#endif
}
__device__ __forceinline__ void narrow(float value, Half& result) {
#if defined(REFINE_EXT_CUDA_ON_CPU)
  result.bits = cuda_on_cpu::float_to_half(value);
#else
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
#endif
}
__device__ __forceinline__ void narrow(double value, BFloat16& result) {
  narrow(static_cast<float>(value), result);
}
__device__ __forceinline__ void narrow(double value, Half& result) {
  narrow(static_cast<float>(value), result);
}

template <class T>
inline constexpr int kLanes = 16 / static_cast<int>(sizeof(T));

// By instruction: of a pointer that was chosen among others the compiler does not know that it is to global
// memory.
__device__ __forceinline__ uint4 load_pack(const uint4* p) {
#if defined(__CUDA_ARCH__)
  uint4 pack;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(pack.x), "=r"(pack.y), "=r"(pack.z), "=r"(pack.w)
               : "l"(__cvta_generic_to_global(p)));
  return pack;
#else
  return *p;
#endif
}

// Lane `lane` of a pack; known when compiled.
template <class C, class T>
__device__ __forceinline__ C widen_lane(const uint4& pack, int lane) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    // Without taking the two halves of a word apart first.
    const uint32_t word = lane < 4 ? (lane < 2 ? pack.x : pack.y) : (lane < 6 ? pack.z : pack.w);
    return from_bits<float>(lane % 2 ? word & 0xffff0000u : word << 16);
  } else {
    T lanes[kLanes<T>];
    memcpy(lanes, &pack, sizeof(pack));
    return static_cast<C>(widen(lanes[lane]));
  }
}

template <class T>
__device__ __forceinline__ bool is_aligned(const T* p) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0;
}

template <class T>
__device__ __forceinline__ void store_pack(T* p, bool aligned, const T (&lanes)[kLanes<T>]) {
  // By intrinsic: as plain code the two branches are merged into one of small accesses.
  if (aligned) {
    uint4 pack;
    memcpy(&pack, lanes, sizeof(pack));
    __stwb(reinterpret_cast<uint4*>(p), pack);
    return;
  }
#pragma unroll
  for (int lane = 0; lane < kLanes<T>; ++lane) p[lane] = lanes[lane];
}

}  // namespace refine_ext::cuda
