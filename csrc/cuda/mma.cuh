// Products of small matrices by one warp on the tensor cores, and what feeds them.
//
// bfloat16 in, float32 sums (sm_80 and newer):
//
//   A [16, 16], B [16, 8], D [16, 8]; a register holds two bfloat16, the first in its low half. Lane l has,
//   with g = l / 4 and t = 2 (l % 4):
//     a[0] A[g, t..t+1]     a[1] A[g + 8, t..t+1]     a[2] A[g, t + 8..t + 9]     a[3] A[g + 8, t + 8..t + 9]
//     b[0] B[t..t+1, g]     b[1] B[t + 8..t + 9, g]
//     d[0], d[1] D[g, t..t+1]     d[2], d[3] D[g + 8, t..t+1]
//   (PTX ISA, "Matrix fragments for mma.m16n8k16 with floating point type").
//
// Bytes in, 32-bit integer sums, which wrap around: the same with A [16, 32], B [32, 8], a register four
// bytes of a row of A or of a column of B, and t = 4 (l % 4):
//     a[0] A[g, t..t+3]     a[1] A[g + 8, t..t+3]     a[2] A[g, t + 16..t + 19]     a[3] A[g + 8, ...]
//     b[0] B[t..t+3, g]     b[1] B[t + 16..t + 19, g]     d as above
//   (PTX ISA, "Matrix fragments for mma.m16n8k32 with integer type").
#pragma once

#include "launch.h"

namespace refine_ext::cuda {

// d += a b; all lanes of the warp together. Products are exact; sums are float32, in the hardware's order and
// with its rounding.
__device__ __forceinline__ void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if defined(REFINE_EXT_CUDA_ON_CPU)
  cuda_on_cpu::mma_bf16(d, a, b, __FILE__, __LINE__);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// d += a b, exactly, modulo 2^32. A's bytes are unsigned, B's signed or not.
template <bool kSigned>
__device__ __forceinline__ void multiply_add(uint32_t (&d)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2]) {
#if defined(REFINE_EXT_CUDA_ON_CPU)
  cuda_on_cpu::mma_bytes(d, a, b, kSigned, __FILE__, __LINE__);
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  // In quarters: 8 rows, 16 of the summands.
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int rows = 0; rows < 2; ++rows) {
      if constexpr (kSigned) {
        asm volatile("mma.sync.aligned.m8n8k16.row.col.s32.u8.s8.s32 {%0, %1}, {%2}, {%3}, {%0, %1};"
                     : "+r"(d[2 * rows]), "+r"(d[2 * rows + 1])
                     : "r"(a[2 * half + rows]), "r"(b[half]));
      } else {
        asm volatile("mma.sync.aligned.m8n8k16.row.col.s32.u8.u8.s32 {%0, %1}, {%2}, {%3}, {%0, %1};"
                     : "+r"(d[2 * rows]), "+r"(d[2 * rows + 1])
                     : "r"(a[2 * half + rows]), "r"(b[half]));
      }
    }
  }
#else
  if constexpr (kSigned) {
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.u8.u8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
#endif
}

// Four 8 x 8 matrices of 16-bit values from shared memory. Lane l gives the address of row l % 8 of matrix l
// / 8, 16 bytes aligned to 16; result[m] are elements [g, t..t+1] of matrix m, or of its transpose.
template <bool kTransposed>
__device__ __forceinline__ void load_matrices(uint32_t (&result)[4], const void* row) {
#if defined(REFINE_EXT_CUDA_ON_CPU)
  cuda_on_cpu::load_matrices(result, row, kTransposed, __FILE__, __LINE__);
#else
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(result[0]), "=r"(result[1]), "=r"(result[2]), "=r"(result[3])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(result[0]), "=r"(result[1]), "=r"(result[2]), "=r"(result[3])
                 : "r"(address)
                 : "memory");
  }
#endif
}

// 16 bytes from global to shared memory, both aligned to that, past the registers. They are there, for this
// thread only, once wait_copies has seen the group that commit_copies closed; before sm_80, at once.
__device__ __forceinline__ void copy_async(void* shared, const void* global) {
#if defined(REFINE_EXT_CUDA_ON_CPU)
  cuda_on_cpu::copy_async(shared, global, __FILE__, __LINE__);
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  *static_cast<uint4*>(shared) = *static_cast<const uint4*>(global);
#else
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(
                   static_cast<uint32_t>(__cvta_generic_to_shared(shared))),
               "l"(__cvta_generic_to_global(global))
               : "memory");
#endif
}

__device__ __forceinline__ void commit_copies() {
#if defined(REFINE_EXT_CUDA_ON_CPU)
  cuda_on_cpu::commit_copies();
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Until all of this thread's groups but the last kPending are there.
template <int kPending>
__device__ __forceinline__ void wait_copies() {
#if defined(REFINE_EXT_CUDA_ON_CPU)
  cuda_on_cpu::wait_copies(kPending);
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

}  // namespace refine_ext::cuda
