// What a launch consists of while runtime.cpp runs it, for the files that model what its threads do.
#pragma once

#include <sys/mman.h>

#include <deque>
#include <memory>
#include <string>
#include <vector>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#include "cuda_on_cpu.h"
#include "wgmma.h"

namespace cuda_on_cpu {

inline constexpr size_t kStackBytes = size_t{256} << 10, kGuardBytes = 4096;
inline constexpr size_t kStaticSharedBytes = size_t{48} << 10, kSharedBytes = size_t{227} << 10,
                        kArenaBytes = size_t{232} << 10;
inline constexpr int kLanes = 32, kWarpgroup = 128, kMaxBlock = 1024;
// Where a block's shared memory begins: nothing in it is aligned to more than was asked for by chance.
inline constexpr size_t kFirstShared = 16;

// Threads wait here until all of a group have come. Its two objects carry the order that it makes, by
// generation: a thread that leaves late must not take over what was released for the next time.
struct Barrier {
  int arrived = 0;
  unsigned generation = 0;
  const char* file = nullptr;
  int line = 0;
  char order[2] = {};
};

struct Warp {
  Barrier barrier, shuffle;
  alignas(16) unsigned char slots[2][kLanes][kSlotBytes];
  ProductOperands operands;
};

struct Fiber {
  Position position{};
#if defined(__x86_64__)
  void* stack_pointer = nullptr;
#else
  ucontext_t context;
#endif
  char* stack = nullptr;
  void* fake_stack = nullptr;
  void* tsan = nullptr;
  char fenced = 0, seen = 0;  // carry what came before its last fence, and what its atomics have seen since
  unsigned shuffles = 0;
  std::deque<std::vector<Copy>> copies{1};  // groups, the last of which is open
  uint64_t arrived = 0, shown = 0;          // of its copies; and how many had when it last fenced the proxies
  ProductQueue products;
  bool done = false;
  const char* waits_in = nullptr;
  int waits_at = 0;
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<Barrier> warpgroups;
  Barrier barrier;
  int alive = 0;
  char finished = 0;
  // Of 16 bytes: the thread whose copy was the last to arrive there, and which of its copies that was.
  struct Arrival {
    unsigned thread;
    uint64_t number;
  };
  struct Shared {
    const void* key;
    unsigned char* memory;
    size_t bytes, address;
    std::unique_ptr<Arrival[]> arrivals;
  };
  std::vector<Shared> shared;
  size_t used = kFirstShared;
#if defined(CUDA_ON_CPU_TSAN)
  // Mapped by the host before the block starts: the sanitizer takes the mapping for a write of whoever does
  // it.
  unsigned char* arena = static_cast<unsigned char*>(
      mmap(nullptr, kArenaBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  ~Block() { munmap(arena, kArenaBytes); }
#else
  ~Block() {
    for (const Shared& array : shared) std::free(array.memory);
  }
#endif
};

extern Fiber* current;
extern Block* block;

// Until `expected` threads have come; without `orders` their memory accesses stay unordered.
void wait(Barrier& barrier, int expected, bool orders, const char* file, int line);
Warp& my_warp();
// The shared array that has this byte, or nullptr.
Block::Shared* shared_array(const void* pointer);

}  // namespace cuda_on_cpu
