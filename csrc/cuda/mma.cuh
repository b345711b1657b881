// Products of small matrices by one warp on the tensor cores, sm_80 and newer: bfloat16 in, float32 sums.
//
//   A [16, 16], B [16, 8], D [16, 8]; a register holds two bfloat16, the first in its low half. Lane l has,
//   with g = l / 4 and t = 2 (l % 4):
//     a[0] A[g, t..t+1]     a[1] A[g + 8, t..t+1]     a[2] A[g, t + 8..t + 9]     a[3] A[g + 8, t + 8..t + 9]
//     b[0] B[t..t+1, g]     b[1] B[t + 8..t + 9, g]
//     d[0], d[1] D[g, t..t+1]     d[2], d[3] D[g + 8, t..t+1]
//   (PTX ISA, "Matrix fragments for mma.m16n8k16 with floating point type").
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

}  // namespace refine_ext::cuda
