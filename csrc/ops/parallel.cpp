#include "../cpu/parallel.h"

#include <torch/csrc/stable/ops.h>

namespace refine_ext {

void parallel_for_c(int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, void*),
                    void* context) {
  torch::stable::parallel_for(begin, end, grain, [&](int64_t b, int64_t e) { body(b, e, context); });
}

int64_t num_threads() { return torch::stable::get_num_threads(); }

}  // namespace refine_ext
