// The log-mixture's products by Hopper's warpgroup products (wgmma), compiled for sm_90a alone: the split,
// the pieces and the order of the six products are those of log_mixture_pieces.cuh, whose packs lie in the
// order of the 64-byte swizzle.
//
// Two warpgroups have 64 rows and all 128 columns of a tile each. A slice of 32 dimensions takes 12 products
// of 64 x 128 x 16 of each and 64 additions a thread; no thread loads an operand. The next piece is waited
// for while the products are made and not after them, so that one warpgroup adds, or takes exponentials,
// while the other multiplies.
//
// The 24 products take the tensor cores 1536 clocks at their 1024 multiply-adds a clock and quarter of a
// multiprocessor. Meanwhile 144 KB of operands are read from shared memory and 48 KB arrive there, from the
// L2 cache, 32 bytes a clock: together the 128 bytes a clock that shared memory has. Both are limits, of
// which no GPU has said yet which comes first: none has run this kernel (hopper.h). Additions are 128 of the
// clocks.
#include "log_mixture_hopper.cuh"
#include "wgmma.cuh"

namespace refine_ext::cuda {

struct WarpgroupProducts {
  static constexpr int kPieces = 4;
  static constexpr int kBuffers = 2;
  static constexpr int kRows = 2, kColumns = 32;
  static constexpr int kShares = 1;

  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int down = static_cast<int>(threadIdx.x) / kWarp * 16;

  __device__ __forceinline__ int row(int i) const { return down + 8 * i + lane / 4; }
  __device__ __forceinline__ int column(int c) const { return c / 2 * 8 + lane % 4 * 2 + c % 2; }
  __device__ __forceinline__ int share() const { return 0; }

  // Makes a piece everybody's, after which kPending may be on their way.
  template <int kPending>
  __device__ __forceinline__ void receive() const {
    wait_copies<kPending>();
    show_to_products();
    __syncthreads();
  }
  __device__ __forceinline__ void begin() const { receive<kPieces - 2>(); }

  // The slice's piece is there already. Who comes to the barrier has made the products of the one before.
  template <class Refill>
  __device__ __forceinline__ void add(const uint4* row_piece, Refill&& refill,
                                      float (&q)[kRows][kColumns]) const {
    constexpr int kGroupRows = 64, kRowBytes = 16 * kProductPacks;
    const int first = static_cast<int>(threadIdx.x) / kWarpgroup * kGroupRows;
    const uint64_t rows = matrix_at<kRowBytes>(row_piece + first * kProductPacks);
    const uint64_t centers = matrix_at<kRowBytes>(row_piece + kPiecePacks);
    float d[16][4];
    const auto multiply = [&](auto is_first, int row_part, int center_part) {
      // In units of 16 bytes.
      const uint64_t a = rows + row_part * kPartPacks, b = centers + center_part * kPartPacks;
      multiply_add_async<decltype(is_first)::value>(d, a, b);
      multiply_add_async<false>(d, a + 2, b + 2);
    };
    begin_products();
    multiply(std::true_type{}, 0, 2);
    multiply(std::false_type{}, 2, 0);
    multiply(std::false_type{}, 1, 1);
    multiply(std::false_type{}, 0, 1);
    multiply(std::false_type{}, 1, 0);
    multiply(std::false_type{}, 0, 0);
    commit_products();
    receive<kPieces - 3>();
    refill();
    wait_products();
    keep(d);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int c = 0; c < kColumns; ++c) q[i][c] += d[c / 2][2 * i + c % 2];
    }
  }
};

// Shared memory is more than a block has without asking, and swizzles by address: pieces begin on 1024 bytes.
// budget: registers 208, shared 5120, occupancy 12%
__global__ void __launch_bounds__(kProductThreads, 1) hopper_mixture_kernel(const ProductTask task) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(REFINE_EXT_CUDA_ON_CPU)
  REFINE_EXT_DYNAMIC_SHARED_ALIGNED(uint4, pieces, 1024);
  REFINE_EXT_SHARED(ProductShared<WarpgroupProducts>, shared, [1]);
  product_rows<WarpgroupProducts>(task, pieces, shared[0]);
#endif
}

void launch_hopper_products(const char* op, const ProductTask& task, int64_t blocks, void* stream) {
  launch_with_shared(op, hopper_mixture_kernel, blocks, kProductThreads, kProductBytes<WarpgroupProducts>,
                     stream, task);
}

}  // namespace refine_ext::cuda
