// Kernels with one mistake each; test_cuda_on_cpu.py checks that the emulation reports every one of them, and
// that the first, which has none, passes.
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "../../csrc/cuda/reduce.cuh"

namespace {

using namespace refine_ext::cuda;

__global__ void none(const float*, double* out) {
  const Team team = my_team({64, 1});
  double value[1] = {1.0};
  reduce<Sum>(team, value);
  if (team.rank == 0) *out = value[0];
}

__global__ void missing_barrier(const float*, double* out) {
  REFINE_EXT_SHARED(double, shared, [64]);
  shared[threadIdx.x] = threadIdx.x;
  if (threadIdx.x == 0) *out = shared[63];
}

__global__ void overwritten_tile(const float* in, double* out) {
  REFINE_EXT_SHARED(float, tile, [64]);
  double sum = 0.0;
  for (int k = 0; k < 4; ++k) {
    tile[threadIdx.x] = in[threadIdx.x];
    __syncthreads();
    sum += static_cast<double>(tile[63 - threadIdx.x]);  // a second barrier is missing
  }
  if (threadIdx.x == 0) *out = sum;
}

__global__ void shuffle_as_barrier(const float*, double* out) {
  REFINE_EXT_SHARED(double, shared, [32]);
  if (threadIdx.x >= 32) return;
  shared[threadIdx.x] = threadIdx.x;
  const int zero = __shfl_xor_sync(kFullMask, 0, 1);
  if (threadIdx.x == 0) *out = shared[31 - zero];
}

__global__ void blocks_share_a_sum(const float*, double* out) {
  if (threadIdx.x == 0) *out += 1.0;
}

__global__ void divergent_barrier(const float*, double*) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void divergent_shuffle(const float*, double* out) {
  if (threadIdx.x < 16) out[0] = __shfl_xor_sync(kFullMask, 1.0, 1);
}

__global__ void beyond_the_end(const float* in, double* out) {
  const uint4 pack = reinterpret_cast<const uint4*>(in)[threadIdx.x];
  if (pack.w == 1) *out = 1.0;
}

__global__ void misaligned_pack(const float* in, double* out) {
  if (threadIdx.x == 0) *out = reinterpret_cast<const uint4*>(in + 1)->x;
}

__global__ void beyond_shared(const float*, double* out) {
  REFINE_EXT_SHARED(double, shared, [64]);
  shared[threadIdx.x + 1] = 0.0;
  if (threadIdx.x == 0) *out = shared[0];
}

}  // namespace

int main(int, char** arguments) {
  const std::string wanted = arguments[1];
  void* in = nullptr;
  if (posix_memalign(&in, 16, 255 * sizeof(float)) != 0) return 2;
  std::memset(in, 0, 255 * sizeof(float));
  std::vector<double> out(1);
#define REFINE_EXT_RUN(kernel, blocks) \
  if (wanted == #kernel)               \
    launch(#kernel, kernel, blocks, 64, nullptr, static_cast<const float*>(in), out.data());
  REFINE_EXT_RUN(none, 1)
  REFINE_EXT_RUN(missing_barrier, 1)
  REFINE_EXT_RUN(overwritten_tile, 1)
  REFINE_EXT_RUN(shuffle_as_barrier, 1)
  REFINE_EXT_RUN(blocks_share_a_sum, 2)
  REFINE_EXT_RUN(divergent_barrier, 1)
  REFINE_EXT_RUN(divergent_shuffle, 1)
  REFINE_EXT_RUN(beyond_the_end, 1)
  REFINE_EXT_RUN(misaligned_pack, 1)
  REFINE_EXT_RUN(beyond_shared, 1)
  std::free(in);
  std::printf("%g\n", out[0]);
  return 0;
}
