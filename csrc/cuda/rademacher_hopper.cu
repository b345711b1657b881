// The sums by Hopper's warpgroup products (wgmma), compiled for sm_90a alone: 256 draws a tile, the signs in
// registers, the matrix's bytes where they lie in shared memory, in the order of its 128-byte swizzle.
//
// No GPU has run this kernel yet: hopper.h says where it is launched. tests/cuda_on_cpu models its products,
// and tests/test_cuda_rademacher.py compares it with the other kernel's bits.
#include "rademacher_hopper.cuh"
#include "wgmma.cuh"

namespace refine_ext::cuda {

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
  __device__ __forceinline__ void arrived() const { show_to_products(); }

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
      const uint64_t columns = matrix_at<kGroup>(piece) + 4 * half;  // in units of 16 bytes
#pragma unroll
      for (int i = 0; i < kSteps; ++i) keep(part[i]);
      begin_products();
#pragma unroll
      for (int step = 0; step < 2; ++step) {
#pragma unroll
        for (int i = 0; i < kSteps; ++i)
          multiply_add_async<kSigned>(part[i], ones[step][i], columns + 2 * step);
      }
      commit_products();
      wait_products();
#pragma unroll
      for (int i = 0; i < kSteps; ++i) keep(part[i]);
    }
  }
};

// Shared memory is more than a block has without asking, and swizzles by address: pieces begin on 1024 bytes.
// budget: registers 256, occupancy 12%
__global__ void __launch_bounds__(kHopperThreads, 1) hopper_sums_kernel(const SumsTask task) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(REFINE_EXT_CUDA_ON_CPU)
  using Tiles = WarpgroupTiles;
  REFINE_EXT_DYNAMIC_SHARED_ALIGNED(unsigned char, memory, 1024);
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
