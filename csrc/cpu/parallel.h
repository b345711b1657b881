// Threads for csrc/cpu: torch's own pool, reached through one function that csrc/ops defines.
#pragma once

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

}  // namespace refine_ext
