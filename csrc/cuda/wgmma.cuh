// Products by warpgroups on Hopper's tensor cores (sm_90a): four warps, the first of which has a number
// divisible by four, multiply together while their threads go on.
//
// Sums [64, n] are in registers: warp w of the four has rows 16 w + g and 16 w + g + 8, g = lane / 4, in
//   d[u][0], d[u][1]  row g, columns 8 u + t and 8 u + t + 1, t = 2 (lane % 4)     d[u][2], d[u][3]  row g +
//   8
// and so are rows of A where registers hold them, as in mma.cuh. What shared memory holds has rows of A, or
// columns of B, one after the other, swizzled, and is known by a descriptor; 32 bytes of it, in units of 16,
// are what one product takes (PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions").
//
// Registers belong to the products from begin_products to wait_products: nothing may touch sums meanwhile,
// nor what holds A, nor shared memory that is read, which other warps may do longer. ptxas waits for each
// product where it sees that it must, and says so.
#pragma once

#include <type_traits>

#include "mma.cuh"

#if defined(REFINE_EXT_CUDA_ON_CPU)
#include "wgmma.h"
#else
// As REFINE_EXT_DYNAMIC_SHARED, aligned to more; one or the other in a kernel.
#define REFINE_EXT_DYNAMIC_SHARED_ALIGNED(type, name, alignment) \
  extern __shared__ __align__(alignment)                         \
  unsigned char refine_ext_aligned_dynamic_shared_memory[];      \
  type* const name = reinterpret_cast<type*>(refine_ext_aligned_dynamic_shared_memory)
#endif

namespace refine_ext::cuda {

inline constexpr int kWarpgroup = 128;

// The descriptor of rows of kBytes in shared memory, one after the other, of which eight begin on 8 kBytes; a
// 16-byte pack of row r stands in place pack ^ (r % 8) of 128 bytes, pack ^ (r / 2 % 4) of 64.
template <int kBytes>
__device__ __forceinline__ uint64_t matrix_at(const void* shared) {
  static_assert(kBytes == 128 || kBytes == 64);
#if defined(REFINE_EXT_CUDA_ON_CPU)
  const uint32_t address = cuda_on_cpu::shared_address(shared, __FILE__, __LINE__);
#else
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
#endif
  // From eight rows to the next, and the swizzle's number; a distance along the rows is not used.
  return (address & 0x3ffffu) >> 4 | uint64_t{1} << 16 | uint64_t{8 * kBytes >> 4} << 32 |
         uint64_t{kBytes == 128 ? 1 : 2} << 62;
}

// What this thread's copies have brought is there for the products of all that a barrier later comes before.
__device__ __forceinline__ void show_to_products() {
#if defined(REFINE_EXT_CUDA_ON_CPU)
  cuda_on_cpu::fence_proxies();
#else
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// The compiler does not know that a product writes later: nothing of the sums moves across this.
template <class T, int kRuns>
__device__ __forceinline__ void keep([[maybe_unused]] T (&d)[kRuns][4]) {
#if !defined(REFINE_EXT_CUDA_ON_CPU)
#pragma unroll
  for (int u = 0; u < kRuns; ++u) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (std::is_same_v<T, float>) {
        asm volatile("" : "+f"(d[u][i])::"memory");
      } else {
        asm volatile("" : "+r"(d[u][i])::"memory");
      }
    }
  }
#endif
}

// Before products that follow other uses of their registers.
__device__ __forceinline__ void begin_products() {
#if defined(REFINE_EXT_CUDA_ON_CPU)
  cuda_on_cpu::fence_products();
#else
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

// Closes a group of products.
__device__ __forceinline__ void commit_products() {
#if defined(REFINE_EXT_CUDA_ON_CPU)
  cuda_on_cpu::commit_products();
#else
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

// Until this warp's part of all groups is done.
__device__ __forceinline__ void wait_products() {
#if defined(REFINE_EXT_CUDA_ON_CPU)
  cuda_on_cpu::wait_products(0, __FILE__, __LINE__);
#else
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#endif
}

#define REFINE_EXT_SUMS(constraint, d, u) \
  constraint(d[u][0]), constraint(d[u][1]), constraint(d[u][2]), constraint(d[u][3])

// d += a b of 64 x 64 x 32 bytes, exactly, modulo 2^32. A's are unsigned, in registers, B's signed or not.
template <bool kSigned>
__device__ __forceinline__ void multiply_add_async(uint32_t (&d)[8][4], const uint32_t (&a)[4], uint64_t b) {
#if defined(REFINE_EXT_CUDA_ON_CPU)
  cuda_on_cpu::multiply_bytes_async(d[0], a, b, kSigned, __FILE__, __LINE__);
#else
  if constexpr (kSigned) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n64k32.s32.u8.s8 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, "
        "%8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, "
        "%24, %25, %26, %27, %28, %29, %30, %31}, "
        "{%32, %33, %34, %35}, %36, 1;"
        : REFINE_EXT_SUMS("+r", d, 0), REFINE_EXT_SUMS("+r", d, 1), REFINE_EXT_SUMS("+r", d, 2),
          REFINE_EXT_SUMS("+r", d, 3), REFINE_EXT_SUMS("+r", d, 4), REFINE_EXT_SUMS("+r", d, 5),
          REFINE_EXT_SUMS("+r", d, 6), REFINE_EXT_SUMS("+r", d, 7)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
  } else {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n64k32.s32.u8.u8 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, "
        "%8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, "
        "%24, %25, %26, %27, %28, %29, %30, %31}, "
        "{%32, %33, %34, %35}, %36, 1;"
        : REFINE_EXT_SUMS("+r", d, 0), REFINE_EXT_SUMS("+r", d, 1), REFINE_EXT_SUMS("+r", d, 2),
          REFINE_EXT_SUMS("+r", d, 3), REFINE_EXT_SUMS("+r", d, 4), REFINE_EXT_SUMS("+r", d, 5),
          REFINE_EXT_SUMS("+r", d, 6), REFINE_EXT_SUMS("+r", d, 7)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
  }
#endif
}

// d = a b, or d += a b, of 64 x 128 x 16 bfloat16, both from shared memory. Products are exact; sums are
// float32, in the hardware's order and with its rounding.
template <bool kFirst>
__device__ __forceinline__ void multiply_add_async(float (&d)[16][4], uint64_t a, uint64_t b) {
#if defined(REFINE_EXT_CUDA_ON_CPU)
  cuda_on_cpu::multiply_bfloat16_async(d[0], a, b, kFirst, __FILE__, __LINE__);
#else
  if constexpr (kFirst) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
        "%64, %65, 0, 1, 1, 0, 0;"
        : REFINE_EXT_SUMS("=f", d, 0), REFINE_EXT_SUMS("=f", d, 1), REFINE_EXT_SUMS("=f", d, 2),
          REFINE_EXT_SUMS("=f", d, 3), REFINE_EXT_SUMS("=f", d, 4), REFINE_EXT_SUMS("=f", d, 5),
          REFINE_EXT_SUMS("=f", d, 6), REFINE_EXT_SUMS("=f", d, 7), REFINE_EXT_SUMS("=f", d, 8),
          REFINE_EXT_SUMS("=f", d, 9), REFINE_EXT_SUMS("=f", d, 10), REFINE_EXT_SUMS("=f", d, 11),
          REFINE_EXT_SUMS("=f", d, 12), REFINE_EXT_SUMS("=f", d, 13), REFINE_EXT_SUMS("=f", d, 14),
          REFINE_EXT_SUMS("=f", d, 15)
        : "l"(a), "l"(b));
  } else {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
        "%64, %65, 1, 1, 1, 0, 0;"
        : REFINE_EXT_SUMS("+f", d, 0), REFINE_EXT_SUMS("+f", d, 1), REFINE_EXT_SUMS("+f", d, 2),
          REFINE_EXT_SUMS("+f", d, 3), REFINE_EXT_SUMS("+f", d, 4), REFINE_EXT_SUMS("+f", d, 5),
          REFINE_EXT_SUMS("+f", d, 6), REFINE_EXT_SUMS("+f", d, 7), REFINE_EXT_SUMS("+f", d, 8),
          REFINE_EXT_SUMS("+f", d, 9), REFINE_EXT_SUMS("+f", d, 10), REFINE_EXT_SUMS("+f", d, 11),
          REFINE_EXT_SUMS("+f", d, 12), REFINE_EXT_SUMS("+f", d, 13), REFINE_EXT_SUMS("+f", d, 14),
          REFINE_EXT_SUMS("+f", d, 15)
        : "l"(a), "l"(b));
  }
#endif
}

#undef REFINE_EXT_SUMS

}  // namespace refine_ext::cuda
