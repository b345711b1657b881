// The one way a kernel is launched: 64-bit sizes, empty input, the launch check. The device guard and the
// current stream belong to csrc/ops. The same source also runs on the host (tests/cuda_on_cpu), where
// REFINE_EXT_CUDA_ON_CPU brings a header that stands in for the CUDA runtime.
//
// Above each kernel stands what its compiled code may have, for sm_80 and sm_90, and
// tests/test_cuda_binary.py holds it to that:
//
//   // budget: registers 64 (16-bit 80, float64 128), occupancy 50% (float64 25%), inputs 1 (weighted 2)
//
// A value, then the exceptions: template arguments (all of them) and the value for these; the last that fits
// counts. A form, an output, a flag that is set, the storage T (float32, float64, float16, bfloat16, or
// 16-bit), N=float64 for another type's name, and threads=64 for a number. The words:
//   registers, local, shared   of a thread, in eights; bytes of its local memory, 0 unless said, with the
//                              reason and never in a loop over samples; static bytes of a block
//   occupancy                  at least this share of a multiprocessor's threads
//   inputs, outputs            a loop over samples reads and writes so many packs of 16 bytes for as many
//                              samples as one holds; none unless said
//   instructions/sample        between the loop's ends, rare branches included, over the samples of one trip;
//                              of several loops the largest counts
//   special/sample             of these, on the unit of ex2, lg2, rcp and rsqrt, an eighth as fast
//   float64/sample             of these, float64 arithmetic and conversions: a 64th as fast on small GPUs
// `python tests/cuda_budgets.py` lists what the kernels have, and puts it into the budgets with --write.
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
// What launch_with_shared was asked for, as a pointer, aligned to 16 bytes; once a kernel.
#define REFINE_EXT_DYNAMIC_SHARED(type, name)                 \
  extern __shared__ uint4 refine_ext_dynamic_shared_memory[]; \
  type* const name = reinterpret_cast<type*>(refine_ext_dynamic_shared_memory)
#endif

namespace refine_ext::cuda {

inline constexpr int kWarp = 32;
inline constexpr unsigned kFullMask = 0xffffffffu;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

#if defined(REFINE_EXT_CUDA_ON_CPU)

inline int multiprocessors() { return cuda_on_cpu::multiprocessors(); }

template <class... P, class... A>
void launch_with_shared(const char* op, void (*kernel)(P...), int64_t blocks, int threads, int shared_bytes,
                        void*, A... arguments) {
  cuda_on_cpu::run(
      op, reinterpret_cast<const void*>(kernel), blocks, threads,
      [&] { kernel(static_cast<P>(arguments)...); }, static_cast<size_t>(shared_bytes));
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

// With `shared_bytes` of dynamic shared memory for each block.
template <class... P, class... A>
void launch_with_shared(const char* op, void (*kernel)(P...), int64_t blocks, int threads, int shared_bytes,
                        void* stream, A... arguments) {
  if (blocks == 0) return;
  if (blocks > std::numeric_limits<int32_t>::max()) {
    throw std::runtime_error(std::string(op) + ": input too large for one launch, would take " +
                             std::to_string(blocks) + " blocks");
  }
  if (shared_bytes > 48 * 1024) {  // what a kernel has without asking
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes), op);
  }
  // clang-format off
  kernel<<<static_cast<unsigned>(blocks), static_cast<unsigned>(threads), static_cast<size_t>(shared_bytes),
           static_cast<cudaStream_t>(stream)>>>(static_cast<P>(arguments)...);
  // clang-format on
  check(cudaGetLastError(), op);
}

#endif

template <class... P, class... A>
void launch(const char* op, void (*kernel)(P...), int64_t blocks, int threads, void* stream, A... arguments) {
  launch_with_shared(op, kernel, blocks, threads, 0, stream, arguments...);
}

}  // namespace refine_ext::cuda
