// The fibers behind cuda_on_cpu.h. With -DCUDA_ON_CPU_TSAN this file itself is compiled without the sanitizer
// and tells it about fibers and barriers instead: then a race between two CUDA threads is one between two
// fibers, although a single OS thread runs them. With -DCUDA_ON_CPU_ASAN it tells that sanitizer which stack
// is in use.
#include "runtime.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "fiber_switch.h"

namespace cuda_on_cpu {

Fiber* current = nullptr;
Block* block = nullptr;

namespace {

Fiber host;
const std::function<void()>* kernel = nullptr;
const char* kernel_name = "";
size_t dynamic_bytes = 0;
char dynamic_key = 0;
std::string failure;  // of the thread that ended the launch
std::set<const void*> launched, recent;
std::mutex one_launch;
std::vector<int> turn;  // fibers that are still running, in the order of their turns
size_t at = 0;
uint64_t progress = 0, seen = 0;
size_t idle = 0;
char launch_order = 0;
#if defined(CUDA_ON_CPU_ASAN)
const void* host_stack = nullptr;
size_t host_stack_bytes = 0;
#endif

// Stacks and sanitizer fibers are reused by every second block: two consecutive ones must not look ordered.
std::vector<char*> stacks[2];
#if defined(CUDA_ON_CPU_TSAN)
std::vector<void*> tsan_fibers[2];
#endif

void switch_to(Fiber* next) {
  Fiber* last = current;
  if (next == last) return;
  current = next;
#if defined(CUDA_ON_CPU_TSAN)
  __tsan_switch_to_fiber(next->tsan, 1);  // 1: without making an order
#endif
#if defined(CUDA_ON_CPU_ASAN)
  __sanitizer_start_switch_fiber(last->done ? nullptr : &last->fake_stack,
                                 next->stack ? next->stack : host_stack,
                                 next->stack ? kStackBytes : host_stack_bytes);
#endif
#if defined(__x86_64__)
  cuda_on_cpu_switch(&last->stack_pointer, next->stack_pointer);
#else
  swapcontext(&last->context, &next->context);
#endif
#if defined(CUDA_ON_CPU_ASAN)
  __sanitizer_finish_switch_fiber(current->fake_stack, nullptr, nullptr);
#endif
}

void yield() {
  if (progress != seen) {
    seen = progress;
    idle = 0;
  } else if (++idle > 2 * turn.size() + 2) {
    for (int i : turn) {
      const Fiber& other = block->fibers[i];
      if (other.waits_at != current->waits_at) {
        failure += "; thread " + std::to_string(other.position.thread.x) + " waits at " + other.waits_in +
                   ":" + std::to_string(other.waits_at);
      }
    }
    die("deadlock: not every thread reaches this barrier or shuffle", current->waits_in, current->waits_at);
  }
  at = (at + 1) % turn.size();
  switch_to(&block->fibers[turn[at]]);
}

void open(Barrier& barrier) {
  barrier.arrived = 0;
  ++barrier.generation;
}

}  // namespace

void wait(Barrier& barrier, int expected, bool orders, const char* file, int line) {
  current->waits_in = file;
  current->waits_at = line;
  if (barrier.arrived == 0) {
    barrier.file = file;
    barrier.line = line;
  } else if (barrier.line != line || std::strcmp(barrier.file, file) != 0) {
    die("threads wait at different barriers", file, line);
  }
  const unsigned generation = barrier.generation;
  ++progress;
  if (orders) release(&barrier.order[generation & 1]);
  if (++barrier.arrived == expected) {
    open(barrier);
  } else {
    while (barrier.generation == generation) yield();
  }
  if (orders) acquire(&barrier.order[generation & 1]);
  current->waits_in = nullptr;
  current->waits_at = 0;
  ++progress;
}

Warp& my_warp() { return block->warps[current->position.thread.x / kLanes]; }

namespace {

void entry() {
#if defined(CUDA_ON_CPU_ASAN)
  __sanitizer_finish_switch_fiber(nullptr, &host_stack, &host_stack_bytes);
#endif
  acquire(&launch_order);
  (*kernel)();
  release(&block->finished);
  current->done = true;
  ++progress;
  --block->alive;
  if (block->alive > 0 && block->barrier.arrived == block->alive) open(block->barrier);
  // By hand: the sanitizer would see a library's memmove, as an access of this fiber.
  volatile int* order = turn.data();
  for (size_t i = at; i + 1 < turn.size(); ++i) order[i] = order[i + 1];
  turn.pop_back();
  if (turn.empty()) {
    switch_to(&host);
  } else {
    at %= turn.size();
    switch_to(&block->fibers[turn[at]]);
  }
  std::abort();
}

char* new_stack() {
  void* memory = mmap(nullptr, kStackBytes + kGuardBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, kGuardBytes, PROT_NONE) != 0)
    die("no memory for stacks", "", 0);
  return static_cast<char*>(memory) + kGuardBytes;
}

void prepare(Fiber& fiber, int index, int64_t block_index, int threads, int set) {
  while (static_cast<int>(stacks[set].size()) <= index) stacks[set].push_back(new_stack());
  fiber.stack = stacks[set][static_cast<size_t>(index)];
  fiber.position = {
      {static_cast<unsigned>(index)}, {static_cast<unsigned>(block_index)}, {static_cast<unsigned>(threads)}};
#if defined(CUDA_ON_CPU_TSAN)
  while (static_cast<int>(tsan_fibers[set].size()) <= index)
    tsan_fibers[set].push_back(__tsan_create_fiber(0));
  fiber.tsan = tsan_fibers[set][static_cast<size_t>(index)];
#endif
#if defined(__x86_64__)
  void** top = reinterpret_cast<void**>(fiber.stack + kStackBytes);
  *--top = nullptr;  // a return address: the stack is aligned as after a call
  *--top = reinterpret_cast<void*>(&entry);
  for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
  fiber.stack_pointer = top;
#else
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, entry, 0);
#endif
}

std::vector<int64_t> order_of(int64_t count, unsigned seed) {
  std::vector<int64_t> order(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) order[static_cast<size_t>(i)] = i;
  const char* wanted = std::getenv("CUDA_ON_CPU_ORDER");
  const std::string kind = wanted ? wanted : "forward";
  if (kind == "reverse") std::reverse(order.begin(), order.end());
  if (kind == "shuffled") std::shuffle(order.begin(), order.end(), std::mt19937(seed));
  return order;
}

}  // namespace

Position& position() { return current->position; }

void* shared_memory(const void* key, size_t bytes, size_t alignment) {
  for (const Block::Shared& array : block->shared) {
    if (array.key == key) return array.memory;
  }
  const size_t address = (block->used + alignment - 1) / alignment * alignment;
  block->used = address + (bytes + 15) / 16 * 16;
  const size_t most = dynamic_bytes ? kSharedBytes : kStaticSharedBytes;
  if (block->used > most) die("too much shared memory", kernel_name, static_cast<int>(block->used));
#if defined(CUDA_ON_CPU_TSAN)
  unsigned char* memory = block->arena + address;
#else
  void* fresh = nullptr;
  if (posix_memalign(&fresh, alignment, bytes) != 0) die("no memory", "", 0);
  auto* memory = static_cast<unsigned char*>(fresh);
#endif
  volatile unsigned char* fill = memory;
  for (size_t i = 0; i < bytes; ++i) fill[i] = 0xff;
  if (block->shared.size() == block->shared.capacity()) die("too many shared arrays", "", 0);
  block->shared.push_back({key, memory, bytes, address,
                           std::unique_ptr<Block::Arrival[]>(new Block::Arrival[(bytes + 15) / 16]())});
  return memory;
}

void* dynamic_shared_memory(size_t alignment) {
  if (dynamic_bytes == 0) die("launched without dynamic shared memory", kernel_name, 0);
  return shared_memory(&dynamic_key, dynamic_bytes, alignment);
}

Block::Shared* shared_array(const void* pointer) {
  const auto* address = static_cast<const unsigned char*>(pointer);
  for (Block::Shared& array : block->shared) {
    if (address >= array.memory && address < array.memory + array.bytes) return &array;
  }
  return nullptr;
}

void check_matrix_row(const void* row, const char* file, int line) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) die("misaligned row of a matrix", file, line);
  if (!shared_array(row)) die("a row of a matrix is not in shared memory", file, line);
}

void check_copy(const void* shared, const void* global, const char* file, int line) {
  for (const void* pointer : {shared, global}) {
    if (reinterpret_cast<uintptr_t>(pointer) % 16 != 0) die("misaligned copy", file, line);
  }
  if (!shared_array(shared)) die("a copy not to shared memory", file, line);
  if (shared_array(global)) die("a copy from shared memory", file, line);
}

void remember(const Copy& copy) { current->copies.back().push_back(copy); }

void commit_copies() { current->copies.emplace_back(); }

bool next_copy(int pending, Copy& copy) {
  auto& groups = current->copies;
  while (groups.size() > static_cast<size_t>(pending) + 1) {
    auto& oldest = groups.front();
    if (!oldest.empty()) {
      copy = oldest.back();
      oldest.pop_back();
      const Block::Shared& array = *shared_array(copy.to);
      array.arrivals[(reinterpret_cast<unsigned char*>(copy.to) - array.memory) / 16] = {
          current->position.thread.x, ++current->arrived};
      return true;
    }
    groups.pop_front();
  }
  return false;
}

bool pending_copy(size_t index, Copy& copy) {
  for (const auto& group : current->copies) {
    if (index < group.size()) {
      copy = group[index];
      return true;
    }
    index -= group.size();
  }
  return false;
}

void mma_bytes(uint32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bool is_signed,
               const char* file, int line) {
  struct {
    uint32_t a[4], b[2];
  } own;
  std::memcpy(own.a, a, sizeof(a));
  std::memcpy(own.b, b, sizeof(b));
  const unsigned char* slots = exchange(&own, sizeof(own), file, line);
  // The bytes of one register of four lanes, which are 16 of a row or column.
  const auto bytes_of = [&](int lane, size_t index, unsigned char* bytes) {
    for (int i = 0; i < 4; ++i) std::memcpy(bytes + 4 * i, slots + (lane + i) * kSlotBytes + 4 * index, 4);
  };
  const int lane = static_cast<int>(current->position.thread.x % kLanes), group = lane / 4,
            pair = lane % 4 * 2;
  unsigned char rows[2][32], columns[2][32];
  for (size_t half = 0; half < 2; ++half) {
    for (size_t r = 0; r < 2; ++r) {
      bytes_of(4 * group, 2 * half + r, rows[r] + 16 * half);
      bytes_of(4 * (pair + static_cast<int>(r)), 4 + half, columns[r] + 16 * half);
    }
  }
  for (int i = 0; i < 4; ++i) {
    int32_t sum = 0;
    for (int k = 0; k < 32; ++k) {
      const int column = columns[i % 2][k];
      sum += rows[i / 2][k] * (is_signed && column > 127 ? column - 256 : column);
    }
    d[i] += static_cast<uint32_t>(sum);
  }
}

void fence() {
  acquire(&current->seen);
  release(&current->fenced);
}

// An atomic hands on what its thread has fenced, and no later write of the thread: a fiber of the sanitizer's
// own does so, which knows nothing else but what the host knew.
void order_atomic([[maybe_unused]] void* variable) {
#if defined(CUDA_ON_CPU_TSAN)
  __tsan_switch_to_fiber(host.tsan, 1);
  void* messenger = __tsan_create_fiber(0);
  __tsan_switch_to_fiber(messenger, 1);
  acquire(variable);
  release(&current->seen);
  acquire(&current->fenced);
  release(variable);
  __tsan_switch_to_fiber(current->tsan, 1);
  __tsan_destroy_fiber(messenger);
#endif
}

// Ends the launch: run() throws what happened. The other fibers are left as they are.
void die(const char* message, const char* file, int line) {
  const bool in_kernel = current && current != &host;
  std::string text = std::string("cuda_on_cpu: ") + message + ": " + file + ":" + std::to_string(line);
  if (in_kernel) {
    text += ", block " + std::to_string(current->position.block.x) + " thread " +
            std::to_string(current->position.thread.x) + " of " + kernel_name;
  }
  if (!in_kernel) throw std::runtime_error(text);
  failure = text + failure;
  switch_to(&host);
  std::abort();
}

void barrier(const char* file, int line) { wait(block->barrier, block->alive, true, file, line); }

void warp_barrier(const char* file, int line) { wait(my_warp().barrier, kLanes, true, file, line); }

const unsigned char* exchange(const void* value, size_t bytes, const char* file, int line) {
  Warp& warp = my_warp();
  const unsigned parity = current->shuffles++ & 1;
  volatile unsigned char* slot = warp.slots[parity][current->position.thread.x % kLanes];
  for (size_t i = 0; i < bytes; ++i) slot[i] = static_cast<const unsigned char*>(value)[i];
  // A shuffle moves registers; it orders no memory.
  wait(warp.shuffle, kLanes, false, file, line);
  return warp.slots[parity][0];
}

void run(const char* name, const void* function, int64_t blocks, int threads,
         const std::function<void()>& body, size_t shared_bytes) {
  const std::lock_guard<std::mutex> alone(one_launch);
  if (threads % kLanes != 0 || threads > kMaxBlock || threads <= 0) die("unusable block size", name, threads);
  if (blocks > 0) {
    launched.insert(function);
    recent.insert(function);
  }
  failure.clear();
  kernel = &body;
  kernel_name = name;
  dynamic_bytes = shared_bytes;
  // Blocks are kept to the end: their memory must not be reused by another, which would look like an order or
  // a race.
  std::vector<std::unique_ptr<Block>> finished;
  int set = 0;
  for (int64_t index : order_of(blocks, 1)) {
    finished.push_back(std::make_unique<Block>());
    block = finished.back().get();
    block->fibers = std::vector<Fiber>(static_cast<size_t>(threads));
    block->warps = std::vector<Warp>(static_cast<size_t>(threads / kLanes));
    block->warpgroups = std::vector<Barrier>(static_cast<size_t>(threads / kWarpgroup));
    block->alive = threads;
    block->shared.reserve(64);
    turn.clear();
    for (int64_t thread : order_of(threads, static_cast<unsigned>(index) + 7))
      turn.push_back(static_cast<int>(thread));
    for (int thread = 0; thread < threads; ++thread) {
      prepare(block->fibers[static_cast<size_t>(thread)], thread, index, threads, set);
    }
#if defined(CUDA_ON_CPU_TSAN)
    host.tsan = __tsan_get_current_fiber();
    set ^= 1;
#endif
    release(&launch_order);
    at = 0;
    idle = 0;
    current = &host;
    switch_to(&block->fibers[static_cast<size_t>(turn[0])]);
    current = nullptr;
    if (!failure.empty()) {
      block = nullptr;
      throw std::runtime_error(failure);
    }
  }
  for (const auto& done : finished) acquire(&done->finished);
  block = nullptr;
}

int multiprocessors() {
  const char* count = std::getenv("CUDA_ON_CPU_MULTIPROCESSORS");
  return count ? std::atoi(count) : 2;
}

float half_to_float(uint16_t bits) {
  const int exponent = (bits >> 10) & 31, mantissa = bits & 1023;
  const float sign = bits & 0x8000 ? -1.0f : 1.0f;
  if (exponent == 31) return mantissa ? std::nanf("") : sign * INFINITY;
  if (exponent == 0) return sign * std::ldexp(static_cast<float>(mantissa), -24);
  return sign * std::ldexp(static_cast<float>(mantissa + 1024), exponent - 25);
}

uint16_t float_to_half(float value) {
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const float magnitude = std::fabs(value);
  if (std::isnan(value)) return 0x7fff;
  if (magnitude >= 65520.0f) return sign | 0x7c00;
  // The spacing of halves at this magnitude; nearbyint rounds to nearest even.
  const int exponent = magnitude < 6.103515625e-05f ? -14 : std::ilogb(magnitude);
  const auto units = static_cast<uint32_t>(std::nearbyint(std::ldexp(magnitude, 10 - exponent)));
  // A full mantissa carries into the exponent by itself.
  return static_cast<uint16_t>(sign | (static_cast<uint32_t>(exponent + 14) * 1024 + units));
}

}  // namespace cuda_on_cpu

namespace {

// As offsets in this file: `nm` knows their names.
void write_kernels(const std::set<const void*>& kernels, const char* path) {
  std::FILE* file = std::fopen(path, "w");
  if (!file) std::abort();
  for (const void* kernel : kernels) {
    Dl_info info;
    if (!dladdr(kernel, &info)) std::abort();
    std::fprintf(file, "%tx\n", static_cast<const char*>(kernel) - static_cast<const char*>(info.dli_fbase));
  }
  std::fclose(file);
}

// A program writes all that it launched when it ends.
struct AtExit {
  ~AtExit() {
    if (const char* path = std::getenv("CUDA_ON_CPU_LAUNCHED")) write_kernels(cuda_on_cpu::launched, path);
  }
} at_exit;

}  // namespace

// Writes the kernels launched since the last time.
extern "C" __attribute__((visibility("default"))) void cuda_on_cpu_write_launched(const char* path) {
  write_kernels(cuda_on_cpu::recent, path);
  cuda_on_cpu::recent.clear();
}
