// Rows of few dimensions: a kernel for each.
#include "log_mixture_launch.cuh"

namespace refine_ext::cuda {

void launch_small(const MixtureTask& task, void* stream) {
  const LogMixtureProblem& p = task.p;
  with_dimension(p.in.d, [&](auto dimension) {
    constexpr int kD = decltype(dimension)::value;
    if (p.stats) return launch_rows<float, kD, false, true, true, true>(task, stream);
    with_flag(p.in.log_weights, [&](auto weighted) {
      with_flag(p.mean, [&](auto mean) {
        launch_rows<float, kD, false, decltype(weighted)::value, decltype(mean)::value, false>(task, stream);
      });
    });
  });
}

}  // namespace refine_ext::cuda
