// The launcher of the random multipliers, apart from the sums: the normals' formula takes fused
// multiply-adds.
#include "rademacher.h"
#include "rademacher_signs.cuh"

namespace refine_ext::cuda {
namespace {

template <class T>
void launch_multipliers(const MultipliersProblem& p, void* stream) {
  const int64_t packs = ceil_div(p.n, kMultiplierWidth<T>),
                blocks = ceil_div(p.draws * packs, kMultiplierThreads);
  launch("multipliers", p.normal ? multipliers_kernel<T, true> : multipliers_kernel<T, false>, blocks,
         kMultiplierThreads, stream, p, packs);
}

}  // namespace

void multipliers(const MultipliersProblem& p, void* stream) {
  if (p.n == 0) return;
  switch (p.storage) {
    case Storage::float64:
      return launch_multipliers<double>(p, stream);
    case Storage::float32:
      return launch_multipliers<float>(p, stream);
    case Storage::float16:
      return launch_multipliers<Half>(p, stream);
    case Storage::bfloat16:
      return launch_multipliers<BFloat16>(p, stream);
  }
}

}  // namespace refine_ext::cuda
