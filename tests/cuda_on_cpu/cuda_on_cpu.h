// Runs CUDA kernels on the host, for tests: the very same .cuh files, compiled by a host compiler and its
// sanitizers. Each CUDA thread is a fiber; the fibers of a block take turns on one OS thread and blocks run
// one after another, so a run is deterministic. What a GPU would leave undefined is reported: barriers that
// not every thread reaches and shuffles across lanes that are not there by an exception of the launch, and,
// by the sanitizers, accesses out of bounds or out of order.
//
// Covers what csrc/cuda uses: one-dimensional grids, __syncthreads, __syncwarp, full-mask xor and up
// shuffles, static shared memory (REFINE_EXT_SHARED), 16-byte packs.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

// Loads and stores of a pack, with the default caching.
inline uint4 __ldca(const uint4* p) { return *p; }
inline void __stwb(uint4* p, const uint4& value) { *p = value; }

namespace cuda_on_cpu {

struct Index {
  unsigned x;
};

struct Position {
  Index thread, block, block_size;
};

// Of the fiber that runs now.
Position& position();

// The block's shared array that belongs to `key`; fresh memory, filled with NaN, for each block.
void* shared_memory(const void* key, size_t bytes);

void barrier(const char* file, int line);
void warp_barrier(const char* file, int line);
// Publishes this lane's value and returns the warp's: 32 slots of kSlotBytes.
inline constexpr int kSlotBytes = 16;
const unsigned char* exchange(const void* value, size_t bytes, const char* file, int line);

// Runs `body`, which calls `kernel`, once for every thread of every block. The order of the blocks, and of a
// block's threads, follows CUDA_ON_CPU_ORDER: forward, reverse or shuffled. The kernel is remembered as
// launched (cuda_on_cpu_write_launched in runtime.cpp).
void run(const char* name, const void* kernel, int64_t blocks, int threads,
         const std::function<void()>& body);
int multiprocessors();  // CUDA_ON_CPU_MULTIPROCESSORS, 2 unless told

float half_to_float(uint16_t bits);
uint16_t float_to_half(float value);

template <class T>
T shuffle(unsigned mask, T value, int source, const char* file, int line);

}  // namespace cuda_on_cpu

#define threadIdx (cuda_on_cpu::position().thread)
#define blockIdx (cuda_on_cpu::position().block)
#define blockDim (cuda_on_cpu::position().block_size)
#define __syncthreads() cuda_on_cpu::barrier(__FILE__, __LINE__)
#define __syncwarp() cuda_on_cpu::warp_barrier(__FILE__, __LINE__)
#define REFINE_EXT_LANE (static_cast<int>(threadIdx.x % 32))
#define __shfl_xor_sync(mask, value, distance) \
  cuda_on_cpu::shuffle(mask, value, REFINE_EXT_LANE ^ (distance), __FILE__, __LINE__)
#define __shfl_up_sync(mask, value, distance)                                                         \
  cuda_on_cpu::shuffle(mask, value,                                                                   \
                       REFINE_EXT_LANE < (distance) ? REFINE_EXT_LANE : REFINE_EXT_LANE - (distance), \
                       __FILE__, __LINE__)

#define REFINE_EXT_SHARED(type, name, dims) \
  static char name##_key;                   \
  using name##_type = type dims;            \
  name##_type& name = *static_cast<name##_type*>(cuda_on_cpu::shared_memory(&name##_key, sizeof(name##_type)))

namespace cuda_on_cpu {

[[noreturn]] void die(const char* message, const char* file, int line);

template <class T>
T shuffle(unsigned mask, T value, int source, const char* file, int line) {
  static_assert(sizeof(T) <= kSlotBytes);
  if (mask != 0xffffffffu) die("only full-mask shuffles are modelled", file, line);
  const unsigned char* slots = exchange(&value, sizeof(T), file, line);
  T result;
  std::memcpy(&result, slots + source * kSlotBytes, sizeof(T));
  return result;
}

}  // namespace cuda_on_cpu
