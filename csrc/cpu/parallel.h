// Threads for csrc/cpu: torch's own pool, reached through one function that csrc/ops defines.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace refine_ext {

// Calls body(begin, end, context) on disjoint ranges that cover [begin, end), each at least `grain` long.
void parallel_for_c(int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, void*),
                    void* context);

int64_t num_threads();

template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
  // Waking the pool costs microseconds, milliseconds on a busy host; a single range is run here.
  if (end - begin <= grain) {
    if (begin < end) f(begin, end);
    return;
  }
  parallel_for_c(
      begin, end, grain, [](int64_t b, int64_t e, void* context) { (*static_cast<const F*>(context))(b, e); },
      const_cast<void*>(static_cast<const void*>(&f)));
}

// work(next) on some threads at once, at most `threads`: next() is each of 0, 1, ... count - 1 for one of
// them, in this order, then -1. For tasks of unequal length, or threads that are not alike at work.
template <class F>
void share(int64_t count, int64_t threads, const F& work) {
  std::atomic<int64_t> taken = 0;
  const auto next = [&] {
    const int64_t task = taken++;
    return task < count ? task : -1;
  };
  parallel_for(0, std::min(threads, count), 1, [&](int64_t, int64_t) { work(next); });
}

}  // namespace refine_ext
