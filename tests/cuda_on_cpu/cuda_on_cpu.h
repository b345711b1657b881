// Runs CUDA kernels on the host, for tests: the very same .cuh files, compiled by a host compiler and its
// sanitizers. Each CUDA thread is a fiber; the fibers of a block take turns on one OS thread and blocks run
// one after another, so a run is deterministic. What a GPU would leave undefined is reported: barriers that
// not every thread reaches and shuffles across lanes that are not there by an exception of the launch, and,
// by the sanitizers, accesses out of bounds or out of order.
//
// Covers what csrc/cuda uses: one-dimensional grids, __syncthreads, __syncwarp, full-mask xor and up
// shuffles, static shared memory (REFINE_EXT_SHARED), 16-byte packs; and what its next kernels will: dynamic
// shared memory, atomicAdd and atomicExch, __threadfence, the matrix instructions of csrc/cuda/mma.cuh and
// its copies to shared memory, the products by warpgroups of csrc/cuda/wgmma.cuh (wgmma.h). Not modelled:
// TMA, mbarrier, clusters.
//
// A copy of 16 bytes writes when it is asked for, NaN, and when it is waited for, what is to be there: the
// first and the last moment at which the hardware may. Between them nobody finds anything, and who still
// reads what was there before, or has not waited at a barrier since, races.
//
// What is made visible between blocks follows the PTX memory model: an atomicAdd orders nothing by itself;
// what a thread wrote before a __threadfence that precedes its atomicAdd is there for a thread whose later
// atomicAdd of the same variable is followed by a __threadfence. A plain write to a variable that others
// change by atomics is a race: a counter is set back by atomicExch, or by the host.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

// Loads and stores of a pack, with the default caching.
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
void* shared_memory(const void* key, size_t bytes, size_t alignment = 16);

void barrier(const char* file, int line);
void warp_barrier(const char* file, int line);
// The block's dynamic shared memory: as many bytes as its launch asked for.
void* dynamic_shared_memory(size_t alignment = 16);

void fence();
void order_atomic(void* variable);
// Publishes this lane's value and returns the warp's: 32 slots of kSlotBytes.
inline constexpr int kSlotBytes = 32;
const unsigned char* exchange(const void* value, size_t bytes, const char* file, int line);

// Runs `body`, which calls `kernel`, once for every thread of every block. The order of the blocks, and of a
// block's threads, follows CUDA_ON_CPU_ORDER: forward, reverse or shuffled. The kernel is remembered as
// launched (cuda_on_cpu_write_launched in runtime.cpp).
void run(const char* name, const void* kernel, int64_t blocks, int threads, const std::function<void()>& body,
         size_t shared_bytes = 0);
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

#define __threadfence() cuda_on_cpu::fence()

#define REFINE_EXT_DYNAMIC_SHARED(type, name) \
  type* const name = static_cast<type*>(cuda_on_cpu::dynamic_shared_memory())
#define REFINE_EXT_DYNAMIC_SHARED_ALIGNED(type, name, alignment) \
  type* const name = static_cast<type*>(cuda_on_cpu::dynamic_shared_memory(alignment))
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

// What the matrix instructions of csrc/cuda/mma.cuh do, from all lanes' registers (PTX ISA, "Matrix fragments
// for mma.m16n8k16"): d += a b. Products of bfloat16 are exact; the order of the sums is the hardware's own.
inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const char* file,
                     int line) {
  struct {
    uint32_t a[4], b[2];
  } registers;
  std::memcpy(registers.a, a, sizeof(a));
  std::memcpy(registers.b, b, sizeof(b));
  const unsigned char* slots = exchange(&registers, sizeof(registers), file, line);
  const auto number = [](uint32_t pair, int half) {
    const uint32_t bits = half ? pair & 0xffff0000u : pair << 16;
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return static_cast<double>(value);
  };
  double rows[16][16], columns[8][16];
  for (int lane = 0; lane < 32; ++lane) {
    std::memcpy(&registers, slots + lane * kSlotBytes, sizeof(registers));
    const int group = lane / 4, pair = lane % 4 * 2;
    for (int half = 0; half < 2; ++half) {
      rows[group][pair + half] = number(registers.a[0], half);
      rows[group + 8][pair + half] = number(registers.a[1], half);
      rows[group][pair + half + 8] = number(registers.a[2], half);
      rows[group + 8][pair + half + 8] = number(registers.a[3], half);
      columns[group][pair + half] = number(registers.b[0], half);
      columns[group][pair + half + 8] = number(registers.b[1], half);
    }
  }
  const int group = static_cast<int>(threadIdx.x % 32) / 4, pair = static_cast<int>(threadIdx.x % 4) * 2;
  for (int i = 0; i < 4; ++i) {
    double sum = static_cast<double>(d[i]);
    for (int k = 0; k < 16; ++k) sum += rows[group + i / 2 * 8][k] * columns[pair + i % 2][k];
    d[i] = static_cast<float>(sum);
  }
}

// The same for m16n8k32 and bytes: A's unsigned, B's signed or not.
void mma_bytes(uint32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bool is_signed,
               const char* file, int line);

// The copies that a thread has asked for, in groups.
struct Copy {
  uint4* to;
  const uint4* from;
};
void check_copy(const void* shared, const void* global, const char* file, int line);
void remember(const Copy& copy);
void commit_copies();
// The next copy of the groups before the last `pending`; false: none is left.
bool next_copy(int pending, Copy& copy);
// Copy `index` of all that are left.
bool pending_copy(size_t index, Copy& copy);

inline constexpr uint4 kNothing{~0u, ~0u, ~0u, ~0u};

inline void copy_async(void* shared, const void* global, const char* file, int line) {
  check_copy(shared, global, file, line);
  const Copy copy{static_cast<uint4*>(shared), static_cast<const uint4*>(global)};
  const volatile uint32_t read = copy.from->x;
  static_cast<void>(read);
  *copy.to = kNothing;
  remember(copy);
}

inline void wait_copies(int pending) {
  Copy copy;
  while (next_copy(pending, copy)) *copy.to = *copy.from;
  for (size_t i = 0; pending_copy(i, copy); ++i) *copy.to = kNothing;
}

// Lane l gives the address of row l % 8 of matrix l / 8.
void check_matrix_row(const void* row, const char* file, int line);
inline void load_matrices(uint32_t (&result)[4], const void* row, bool transposed, const char* file,
                          int line) {
  check_matrix_row(row, file, line);
  const unsigned char* slots = exchange(&row, sizeof(row), file, line);
  const int lane = static_cast<int>(threadIdx.x % 32);
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint16_t values[2];
    for (int half = 0; half < 2; ++half) {
      const int i = transposed ? lane % 4 * 2 + half : lane / 4,
                j = transposed ? lane / 4 : lane % 4 * 2 + half;
      const uint16_t* address;
      std::memcpy(&address, slots + (matrix * 8 + i) * kSlotBytes, sizeof(address));
      values[half] = address[j];
    }
    result[matrix] = values[0] | static_cast<uint32_t>(values[1]) << 16;
  }
}

}  // namespace cuda_on_cpu

template <class T>
T atomicExch(T* variable, std::type_identity_t<T> value) {
  cuda_on_cpu::order_atomic(variable);
  T before;
  __atomic_exchange(variable, &value, &before, __ATOMIC_RELAXED);
  return before;
}

template <class T>
T atomicAdd(T* variable, std::type_identity_t<T> value) {
  cuda_on_cpu::order_atomic(variable);
  T before, after;
  __atomic_load(variable, &before, __ATOMIC_RELAXED);
  after = before + value;
  // One OS thread runs all fibers: nobody comes between.
  __atomic_store(variable, &after, __ATOMIC_RELAXED);
  return before;
}
