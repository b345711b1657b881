// Kernels with one mistake each, and beside them the same without; test_cuda_checker.py says what must report
// each. Prints the first result, and how many of the 64 are still as they were before the launch.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <memory>
#include <string>

#include "../../csrc/cuda/mma.cuh"
#include "../../csrc/cuda/reduce.cuh"
#include "../../csrc/cuda/wgmma.cuh"

namespace {

using namespace refine_ext::cuda;

constexpr int kThreads = 64, kBlocks = 3;

__global__ void reduction(const float*, double* out) {
  const Team team = my_team({kThreads, 1});
  double value[1] = {1.0};
  reduce<Sum>(team, value);
  if (team.rank == 0) *out = value[0];
}

// ---- order within a block

__global__ void missing_barrier(const float*, double* out) {
  REFINE_EXT_SHARED(double, shared, [kThreads]);
  shared[threadIdx.x] = threadIdx.x;
  if (threadIdx.x == 0) *out = shared[63];
}

template <bool kSecondBarrier>
__global__ void tiles(const float* in, double* out) {
  REFINE_EXT_SHARED(float, tile, [kThreads]);
  double sum = 0.0;
  for (int k = 0; k < 4; ++k) {
    tile[threadIdx.x] = in[threadIdx.x];
    __syncthreads();
    sum += static_cast<double>(tile[63 - threadIdx.x]);
    if (kSecondBarrier) __syncthreads();
  }
  if (threadIdx.x == 0) *out = sum;
}
constexpr auto kept_tile = tiles<true>, overwritten_tile = tiles<false>;

template <bool kBarrier>
__global__ void neighbours(const float*, double* out) {
  REFINE_EXT_SHARED(double, shared, [kWarp]);
  if (threadIdx.x >= kWarp) return;
  shared[threadIdx.x] = threadIdx.x;
  if (kBarrier) __syncwarp();
  const int zero = __shfl_xor_sync(kFullMask, 0, 1);
  if (threadIdx.x == 0) *out = shared[31 - zero];
}
constexpr auto warp_barrier = neighbours<true>, shuffle_as_barrier = neighbours<false>;

__global__ void divergent_barrier(const float*, double*) {
  if (threadIdx.x < kWarp) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void divergent_shuffle(const float*, double* out) {
  if (threadIdx.x < 16) out[0] = __shfl_xor_sync(kFullMask, 1.0, 1);
}

// ---- order between blocks

__global__ void blocks_share_a_sum(const float*, double* out) {
  if (threadIdx.x == 0) *out += 1.0;
}

__global__ void blocks_add_integers(const float*, double* out) {
  if (threadIdx.x == 0) atomicAdd(out, 1.0 + blockIdx.x);
}

// No race, but the sum is another for another order of the blocks: 10^17 + 1 is 10^17.
__global__ void blocks_add_in_any_order(const float*, double* out) {
  constexpr double terms[kBlocks] = {1.0, 1e17, -1e17};
  if (threadIdx.x == 0) atomicAdd(out, terms[blockIdx.x]);
}

// The block that arrives last adds up what all of them left.
__device__ unsigned arrivals = 0;
enum class Fences { both, none_before, none_after, before_the_write };
template <Fences kFences>
__global__ void last_block(const float*, double* out) {
  REFINE_EXT_SHARED(bool, last, [1]);
  if (kFences == Fences::before_the_write) __threadfence();
  if (threadIdx.x == kWarp) out[1 + blockIdx.x] = 1.0 + blockIdx.x;
  __syncthreads();
  if (threadIdx.x == 0) {
    if (kFences == Fences::both || kFences == Fences::none_after) __threadfence();
    last[0] = atomicAdd(&arrivals, 1u) == kBlocks - 1;
    if (kFences != Fences::none_after) __threadfence();
  }
  __syncthreads();
  if (!last[0] || threadIdx.x != 7) return;
  out[0] = out[1] + out[2] + out[3];
  atomicExch(&arrivals, 0u);
}
constexpr auto last_block_sums = last_block<Fences::both>, missing_fence = last_block<Fences::none_before>,
               missing_second_fence = last_block<Fences::none_after>,
               fence_before_the_write = last_block<Fences::before_the_write>;

// ---- addresses

__global__ void beyond_the_end(const float* in, double* out) {
  const uint4 pack = reinterpret_cast<const uint4*>(in)[threadIdx.x];
  if (pack.w == 1) *out = 1.0;
}

__global__ void misaligned_pack(const float* in, double* out) {
  if (threadIdx.x == 0) *out = reinterpret_cast<const uint4*>(in + 1)->x;
}

__global__ void beyond_shared(const float*, double* out) {
  REFINE_EXT_SHARED(double, shared, [kThreads]);
  shared[threadIdx.x + 1] = 0.0;
  if (threadIdx.x == 0) *out = shared[0];
}

// Launched with dynamic memory for 64 floats.
template <int kBeyond>
__global__ void dynamic(const float* in, double* out) {
  REFINE_EXT_DYNAMIC_SHARED(float, tile);
  tile[threadIdx.x + kBeyond] = in[threadIdx.x];
  __syncthreads();
  if (threadIdx.x == 0) *out = static_cast<double>(tile[63]);
}
constexpr auto within_dynamic = dynamic<0>, beyond_dynamic = dynamic<1>;

// ---- what nobody wrote

template <int kWritten>
__global__ void sum_of_shared(const float*, double* out) {
  REFINE_EXT_SHARED(float, shared, [kThreads]);
  if (threadIdx.x < kWritten) shared[threadIdx.x] = 1.0f;
  __syncthreads();
  if (threadIdx.x != 0) return;
  double sum = 0.0;
  for (int i = 0; i < kThreads; ++i) sum += static_cast<double>(shared[i]);
  *out = sum;
}
constexpr auto written_shared = sum_of_shared<kThreads>, unwritten_shared = sum_of_shared<kThreads - 1>;

template <int kWritten>
__global__ void outputs(const float*, double* out) {
  if (threadIdx.x < kWritten) out[threadIdx.x] = 2.0;
}
constexpr auto all_outputs = outputs<kThreads>, unwritten_output = outputs<kThreads - 1>;

// ---- matrices; A is one everywhere, so is B, and every sum 16

enum class Mistake { none, no_barrier, misaligned, not_shared, half_a_warp };
template <Mistake kMistake>
__global__ void matrices(const float* in, double* out) {
  REFINE_EXT_SHARED(uint16_t, tile, [256]);
  for (int i = threadIdx.x; i < 256; i += kThreads) tile[i] = 0x3f80;
  if (kMistake != Mistake::no_barrier) __syncthreads();
  const int lane = threadIdx.x % kWarp;
  if (kMistake == Mistake::half_a_warp && lane >= 16) return;
  const uint16_t* row = tile + lane % 16 * 16 + lane / 16 * 8;
  if (kMistake == Mistake::misaligned) row += lane == 5;
  uint32_t a[4];
  load_matrices<false>(a, kMistake == Mistake::not_shared ? static_cast<const void*>(in) : row);
  const uint32_t b[2] = {0x3f803f80u, 0x3f803f80u};
  float sums[4] = {};
  multiply_add(sums, a, b);
  if (threadIdx.x == 0) *out = static_cast<double>(sums[3]);
}
constexpr auto matrix_product = matrices<Mistake::none>,
               matrix_before_barrier = matrices<Mistake::no_barrier>,
               misaligned_matrix = matrices<Mistake::misaligned>,
               matrix_outside_shared = matrices<Mistake::not_shared>,
               matrix_of_half_a_warp = matrices<Mistake::half_a_warp>;

// ---- copies to shared memory, in two slots by turns; all of `in` is a half, and so is every result

enum class Slip { none, no_wait, no_barrier, one_slot, misaligned, not_shared };
template <Slip kSlip>
__global__ void copies(const float* in, double* out) {
  REFINE_EXT_SHARED(uint4, slots, [2][8]);
  const int lane = threadIdx.x % kWarp;
  const auto fetch = [&](int slot) {
    if (threadIdx.x < 8) {
      void* to = &slots[kSlip == Slip::one_slot ? 0 : slot][threadIdx.x];
      if (kSlip == Slip::not_shared) to = out + 2 * threadIdx.x;
      copy_async(to, in + 4 * threadIdx.x + (kSlip == Slip::misaligned));
    }
    commit_copies();
  };
  double sum = 0.0;
  fetch(0);
  for (int turn = 0; turn < 3; ++turn) {
    fetch((turn + 1) % 2);
    if (kSlip != Slip::no_wait) wait_copies<1>();
    if (kSlip != Slip::no_barrier) __syncthreads();
    const float* slot = reinterpret_cast<const float*>(slots[kSlip == Slip::one_slot ? 0 : turn % 2]);
    sum += static_cast<double>(slot[31 - lane]);
    if (kSlip != Slip::no_barrier) __syncthreads();
  }
  if (threadIdx.x == 0) *out = sum;
}
constexpr auto copied = copies<Slip::none>, copy_not_waited_for = copies<Slip::no_wait>,
               copy_without_barrier = copies<Slip::no_barrier>,
               copy_over_what_is_read = copies<Slip::one_slot>, misaligned_copy = copies<Slip::misaligned>,
               copy_outside_shared = copies<Slip::not_shared>;

// ---- products by a warpgroup. A's bytes are all one, B's of column c are c, and so thread 0's sums of
// column 57 are 32 times that: twice, by two groups.

enum class Fault {
  none,
  no_wait,
  no_commit,
  no_fence,
  no_second_fence,
  no_proxy_fence,
  no_barrier,
  other_swizzle,
  other_stride,
  other_place,
  half_a_warpgroup,
  touched,
  overwritten,
  copied_over,
  unaligned
};
template <Fault kFault>
__global__ void products(const float* in, double* out) {
  constexpr int kColumns = 64, kRow = 128;
  REFINE_EXT_DYNAMIC_SHARED_ALIGNED(unsigned char, aligned, kFault == Fault::unaligned ? 16 : 1024);
  const int thread = static_cast<int>(threadIdx.x);
  for (int i = thread; i < kColumns * kRow; i += kWarpgroup) {
    const int column = i / kRow;
    // What other products than these would read is a hundred.
    const int pack = i % kRow / 16 ^ column % 8;
    aligned[i] = static_cast<unsigned char>(pack < 2 ? column : 100);
  }
  // One that arrives as it was.
  if (thread == 0) {
    copy_async(aligned + kColumns * kRow, in);
    commit_copies();
    wait_copies<0>();
  }
  if (kFault != Fault::no_proxy_fence) show_to_products();
  if (kFault != Fault::no_barrier) __syncthreads();
  if (kFault == Fault::half_a_warpgroup && thread >= kWarpgroup / 2) return;
  uint64_t b = matrix_at<kRow>(aligned);
  if (kFault == Fault::other_swizzle) b ^= uint64_t{3} << 62;
  if (kFault == Fault::other_stride) b ^= uint64_t{1024 >> 4} << 32;
  if (kFault == Fault::other_place) b += 1;
  // Its last columns are where the copy came.
  if (kFault == Fault::no_proxy_fence) b += 1024 / 16;
  const uint32_t a[4] = {0x01010101u, 0x01010101u, 0x01010101u, 0x01010101u};
  uint32_t sums[8][4] = {};
  for (int turn = 0; turn < 2; ++turn) {
    if (kFault != Fault::no_fence && (kFault != Fault::no_second_fence || turn == 0)) begin_products();
    multiply_add_async<false>(sums, a, b);
    if (kFault == Fault::touched) sums[3][2] += 1;
    if (kFault != Fault::no_commit) commit_products();
    if (kFault == Fault::overwritten) {
      __syncthreads();
      if (turn == 1) aligned[thread * kRow / 2] = 0;
      __syncthreads();
    }
    if (kFault == Fault::copied_over && turn == 1 && thread == 0) copy_async(aligned + 57 * kRow, in);
    if (kFault != Fault::no_wait || turn == 0) wait_products();
  }
  if (thread == 0) *out = static_cast<double>(sums[7][1]);
}
constexpr auto product_by_warpgroup = products<Fault::none>,
               product_not_waited_for = products<Fault::no_wait>,
               product_not_committed = products<Fault::no_commit>,
               product_without_fence = products<Fault::no_fence>,
               product_without_second_fence = products<Fault::no_second_fence>,
               product_without_proxy_fence = products<Fault::no_proxy_fence>,
               product_before_barrier = products<Fault::no_barrier>,
               product_of_another_swizzle = products<Fault::other_swizzle>,
               product_of_another_stride = products<Fault::other_stride>,
               product_of_another_place = products<Fault::other_place>,
               product_of_half_a_warpgroup = products<Fault::half_a_warpgroup>,
               product_with_touched_sums = products<Fault::touched>,
               product_of_what_is_overwritten = products<Fault::overwritten>,
               product_of_what_is_copied_over = products<Fault::copied_over>,
               product_of_unaligned_memory = products<Fault::unaligned>;

struct Free {
  void operator()(void* p) const { std::free(p); }
};

template <class T>
std::unique_ptr<T, Free> filled(int count, T value) {
  void* p = nullptr;
  if (posix_memalign(&p, 16, static_cast<size_t>(count) * sizeof(T)) != 0) std::abort();
  auto* data = static_cast<T*>(p);
  for (int i = 0; i < count; ++i) data[i] = value;
  return std::unique_ptr<T, Free>(data);
}

}  // namespace

int main(int, char** arguments) {
  const std::string wanted = arguments[1];
  // Four floats a thread, but one.
  const auto in = filled(4 * kThreads - 1, 0.5f);
  const double before = wanted.starts_with("blocks_") ? 0.0 : std::nan("");
  const auto out = filled(kThreads, before);
  bool found = false;
  const auto run = [&](const char* name, void (*kernel)(const float*, double*), int blocks) {
    if (wanted != name) return;
    found = true;
    const bool product = wanted.starts_with("product_");
    const int shared_bytes = product                       ? 64 * 128 + 1024
                             : wanted.ends_with("dynamic") ? kThreads * static_cast<int>(sizeof(float))
                                                           : 0;
    launch_with_shared(name, kernel, blocks, product ? kWarpgroup : kThreads, shared_bytes, nullptr,
                       static_cast<const float*>(in.get()), out.get());
  };
#define REFINE_EXT_RUN(kernel, blocks) run(#kernel, kernel, blocks)
  REFINE_EXT_RUN(reduction, 1);
  REFINE_EXT_RUN(missing_barrier, 1);
  REFINE_EXT_RUN(kept_tile, 1);
  REFINE_EXT_RUN(overwritten_tile, 1);
  REFINE_EXT_RUN(warp_barrier, 1);
  REFINE_EXT_RUN(shuffle_as_barrier, 1);
  REFINE_EXT_RUN(divergent_barrier, 1);
  REFINE_EXT_RUN(divergent_shuffle, 1);
  REFINE_EXT_RUN(blocks_share_a_sum, kBlocks);
  REFINE_EXT_RUN(blocks_add_integers, kBlocks);
  REFINE_EXT_RUN(blocks_add_in_any_order, kBlocks);
  REFINE_EXT_RUN(last_block_sums, kBlocks);
  REFINE_EXT_RUN(missing_fence, kBlocks);
  REFINE_EXT_RUN(missing_second_fence, kBlocks);
  REFINE_EXT_RUN(fence_before_the_write, kBlocks);
  REFINE_EXT_RUN(beyond_the_end, 1);
  REFINE_EXT_RUN(misaligned_pack, 1);
  REFINE_EXT_RUN(beyond_shared, 1);
  REFINE_EXT_RUN(within_dynamic, 1);
  REFINE_EXT_RUN(beyond_dynamic, 1);
  REFINE_EXT_RUN(written_shared, 1);
  REFINE_EXT_RUN(unwritten_shared, 1);
  REFINE_EXT_RUN(all_outputs, 1);
  REFINE_EXT_RUN(unwritten_output, 1);
  REFINE_EXT_RUN(matrix_product, 1);
  REFINE_EXT_RUN(matrix_before_barrier, 1);
  REFINE_EXT_RUN(misaligned_matrix, 1);
  REFINE_EXT_RUN(matrix_outside_shared, 1);
  REFINE_EXT_RUN(matrix_of_half_a_warp, 1);
  REFINE_EXT_RUN(copied, 1);
  REFINE_EXT_RUN(copy_not_waited_for, 1);
  REFINE_EXT_RUN(copy_without_barrier, 1);
  REFINE_EXT_RUN(copy_over_what_is_read, 1);
  REFINE_EXT_RUN(misaligned_copy, 1);
  REFINE_EXT_RUN(copy_outside_shared, 1);
  REFINE_EXT_RUN(product_by_warpgroup, 1);
  REFINE_EXT_RUN(product_not_waited_for, 1);
  REFINE_EXT_RUN(product_not_committed, 1);
  REFINE_EXT_RUN(product_without_fence, 1);
  REFINE_EXT_RUN(product_without_second_fence, 1);
  REFINE_EXT_RUN(product_without_proxy_fence, 1);
  REFINE_EXT_RUN(product_before_barrier, 1);
  REFINE_EXT_RUN(product_of_another_swizzle, 1);
  REFINE_EXT_RUN(product_of_another_stride, 1);
  REFINE_EXT_RUN(product_of_another_place, 1);
  REFINE_EXT_RUN(product_of_half_a_warpgroup, 1);
  REFINE_EXT_RUN(product_with_touched_sums, 1);
  REFINE_EXT_RUN(product_of_what_is_overwritten, 1);
  REFINE_EXT_RUN(product_of_what_is_copied_over, 1);
  REFINE_EXT_RUN(product_of_unaligned_memory, 1);
  if (!found) return 3;
  int untouched = 0;
  for (int i = 0; i < kThreads; ++i) untouched += std::isnan(out.get()[i]);
  std::printf("%g %d\n", out.get()[0], untouched);
  return 0;
}
