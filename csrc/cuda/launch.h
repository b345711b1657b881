// The one way a kernel is launched: 64-bit sizes, empty input, the launch check. The device guard and the
// current stream belong to csrc/ops. The same source also runs on the host (tests/cuda_on_cpu), where
// REFINE_EXT_CUDA_ON_CPU brings a header that stands in for the CUDA runtime.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>

#if defined(REFINE_EXT_CUDA_ON_CPU)
#include "cuda_on_cpu.h"
#else
#include <cuda_runtime.h>
// Shared memory of a block: REFINE_EXT_SHARED(double, name, [32]).
#define REFINE_EXT_SHARED(type, name, dims) __shared__ type name dims
#endif

namespace refine_ext::cuda {

inline constexpr int kWarp = 32;
inline constexpr unsigned kFullMask = 0xffffffffu;

#if defined(REFINE_EXT_CUDA_ON_CPU)

inline int multiprocessors() { return cuda_on_cpu::multiprocessors(); }

template <class... P, class... A>
void launch(const char* op, void (*kernel)(P...), int64_t blocks, int threads, void*, A... arguments) {
  cuda_on_cpu::run(op, reinterpret_cast<const void*>(kernel), blocks, threads,
                   [&] { kernel(static_cast<P>(arguments)...); });
}

#else

inline void check(cudaError_t error, const char* op) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string(op) + ": CUDA error: " + cudaGetErrorString(error));
}

inline int multiprocessors() {
  int device = 0, count = 0;
  check(cudaGetDevice(&device), "refine_ext");
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "refine_ext");
  return count;
}

template <class... P, class... A>
void launch(const char* op, void (*kernel)(P...), int64_t blocks, int threads, void* stream, A... arguments) {
  if (blocks == 0) return;
  if (blocks > std::numeric_limits<int32_t>::max()) {
    throw std::runtime_error(std::string(op) + ": input too large for one launch, would take " +
                             std::to_string(blocks) + " blocks");
  }
  // clang-format off
  kernel<<<static_cast<unsigned>(blocks), static_cast<unsigned>(threads), 0, static_cast<cudaStream_t>(stream)>>>(
      static_cast<P>(arguments)...);
  // clang-format on
  check(cudaGetLastError(), op);
}

#endif

}  // namespace refine_ext::cuda
