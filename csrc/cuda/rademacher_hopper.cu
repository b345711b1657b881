// The sums by Hopper's warpgroup products (wgmma), compiled for sm_90a alone: 256 draws a tile, the signs in
// registers, the matrix's bytes where they lie in shared memory, in the order of its 128-byte swizzle.
//
// No GPU has run this kernel yet, and tests/cuda_on_cpu has no wgmma: it is launched only where the
// environment variable REFINE_EXT_WGMMA is 1 (tests/test_cuda_rademacher.py compares it with the other
// kernel's bits).
#if !defined(REFINE_EXT_CUDA_ON_CPU)
#include "rademacher_hopper.cuh"

namespace refine_ext::cuda {

// d += a b of 64 x 64 x 32: four warps, each with 16 rows of `a` as in mma.cuh; b is 64 columns of 32 bytes.
template <bool kSigned>
__device__ __forceinline__ void multiply_add_async(uint32_t (&d)[8][4], const uint32_t (&a)[4], uint64_t b) {
  if constexpr (kSigned) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n64k32.s32.u8.s8 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, "
        "%8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, "
        "%24, %25, %26, %27, %28, %29, %30, %31}, "
        "{%32, %33, %34, %35}, %36, 1;"
        : "+r"(d[0][0]), "+r"(d[0][1]), "+r"(d[0][2]), "+r"(d[0][3]), "+r"(d[1][0]), "+r"(d[1][1]),
          "+r"(d[1][2]), "+r"(d[1][3]), "+r"(d[2][0]), "+r"(d[2][1]), "+r"(d[2][2]), "+r"(d[2][3]),
          "+r"(d[3][0]), "+r"(d[3][1]), "+r"(d[3][2]), "+r"(d[3][3]), "+r"(d[4][0]), "+r"(d[4][1]),
          "+r"(d[4][2]), "+r"(d[4][3]), "+r"(d[5][0]), "+r"(d[5][1]), "+r"(d[5][2]), "+r"(d[5][3]),
          "+r"(d[6][0]), "+r"(d[6][1]), "+r"(d[6][2]), "+r"(d[6][3]), "+r"(d[7][0]), "+r"(d[7][1]),
          "+r"(d[7][2]), "+r"(d[7][3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
  } else {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n64k32.s32.u8.u8 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, "
        "%8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, "
        "%24, %25, %26, %27, %28, %29, %30, %31}, "
        "{%32, %33, %34, %35}, %36, 1;"
        : "+r"(d[0][0]), "+r"(d[0][1]), "+r"(d[0][2]), "+r"(d[0][3]), "+r"(d[1][0]), "+r"(d[1][1]),
          "+r"(d[1][2]), "+r"(d[1][3]), "+r"(d[2][0]), "+r"(d[2][1]), "+r"(d[2][2]), "+r"(d[2][3]),
          "+r"(d[3][0]), "+r"(d[3][1]), "+r"(d[3][2]), "+r"(d[3][3]), "+r"(d[4][0]), "+r"(d[4][1]),
          "+r"(d[4][2]), "+r"(d[4][3]), "+r"(d[5][0]), "+r"(d[5][1]), "+r"(d[5][2]), "+r"(d[5][3]),
          "+r"(d[6][0]), "+r"(d[6][1]), "+r"(d[6][2]), "+r"(d[6][3]), "+r"(d[7][0]), "+r"(d[7][1]),
          "+r"(d[7][2]), "+r"(d[7][3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
  }
}

// Matrix descriptor of columns of 128 bytes, swizzled: address, 1024 bytes from eight columns to the next
// eight.
__device__ __forceinline__ uint64_t columns_at(const void* shared) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  return (address & 0x3ffffu) >> 4 | uint64_t{1} << 16 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
}

// A warpgroup has 128 draws and all columns: kSteps products of 64 draws.
struct WarpgroupTiles {
  static constexpr bool kWide = false;
  static constexpr int kThreads = kHopperThreads, kHalves = 1, kSteps = 2, kRuns = 8, kDraws = kHopperDraws;

  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int down =
      static_cast<int>(threadIdx.x) / 128 * 128 + static_cast<int>(threadIdx.x) % 128 / kWarp * 16;

  __device__ __forceinline__ int draw(int i, int h) const { return down + 64 * i + 8 * h + lane / 4; }
  __device__ __forceinline__ int column(int q, int e) const { return 8 * q + lane % 4 * 2 + e; }
  // What the copies wrote is read by another proxy.
  __device__ __forceinline__ void arrived() const {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  }

  // The compiler does not know that a product writes later: nothing of the sums moves across this.
  static __device__ __forceinline__ void keep(uint32_t (&part)[kSteps][kRuns][4]) {
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
#pragma unroll
      for (int q = 0; q < kRuns; ++q) {
#pragma unroll
        for (int e = 0; e < 4; ++e) asm volatile("" : "+r"(part[i][q][e])::"memory");
      }
    }
  }

  template <bool kSigned>
  __device__ __forceinline__ void add(const uint4* signs, const uint4* piece,
                                      uint32_t (&part)[kSteps][kRuns][4]) const {
    // All signs of a half before the products begin: ptxas would wait for each otherwise.
#pragma unroll 1
    for (int half = 0; half < 2; ++half) {
      uint32_t ones[2][kSteps][4];
#pragma unroll
      for (int i = 0; i < kSteps; ++i) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const uint32_t word = reinterpret_cast<const uint32_t*>(signs + draw(i, h))[lane % 4] >> 4 * half;
#pragma unroll
          for (int step = 0; step < 2; ++step) {
#pragma unroll
            for (int r = 0; r < 2; ++r) ones[step][i][2 * r + h] = word >> (2 * step + r) & 0x01010101u;
          }
        }
      }
      const uint64_t columns = columns_at(piece) + 4 * half;  // in units of 16 bytes
      keep(part);
      asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
      for (int step = 0; step < 2; ++step) {
#pragma unroll
        for (int i = 0; i < kSteps; ++i)
          multiply_add_async<kSigned>(part[i], ones[step][i], columns + 2 * step);
      }
      asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
      asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
      keep(part);
    }
  }
};

// Shared memory is more than a block has without asking, and swizzles by address: pieces begin on 1024 bytes.
// budget: registers 256, occupancy 12%
__global__ void __launch_bounds__(kHopperThreads, 1) hopper_sums_kernel(const SumsTask task) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using Tiles = WarpgroupTiles;
  extern __shared__ __align__(1024) unsigned char memory[];
  constexpr int kPacks = kPieces * (kPieceBytes / 16), kSigns = kGroups * Tiles::kDraws;
  auto& pieces = *reinterpret_cast<uint4(*)[kPacks]>(memory);
  auto& signs = *reinterpret_cast<uint4(*)[kSigns]>(memory + sizeof(uint4) * kPacks);
  auto& halves = *reinterpret_cast<Best(*)[Tiles::kDraws]>(memory);  // not used: a warp has all columns
  sum_tile<Tiles>(task, signs, pieces, halves);
#endif
}

void launch_hopper_sums(const char* op, const SumsTask& task, int64_t blocks, void* stream) {
  constexpr int kBytes =
      static_cast<int>(sizeof(uint4)) * (kPieces * (kPieceBytes / 16) + kGroups * kHopperDraws);
  launch_with_shared(op, hopper_sums_kernel, blocks, kHopperThreads, kBytes, stream, task);
}

}  // namespace refine_ext::cuda
#endif
