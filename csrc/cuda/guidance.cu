// Entry points of the guidance family.
#include "../math/guidance.h"
#include "guidance.h"
#include "guidance_launch.cuh"

namespace refine_ext::cuda {

// A thread a sample: a batch is small beside the states that its factors are for.
// budget: registers 40, occupancy 75%
__global__ void __launch_bounds__(kStepThreads) guidance_factor_kernel(const GuidanceFactorProblem problem) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kStepThreads + static_cast<int>(threadIdx.x);
  if (row < problem.rows) problem.out[row] = refine_ext::guidance_factor(problem, row);
}

void guided_step(const GuidedStepProblem& problem, void* stream) {
  if (problem.rows == 0 || problem.n == 0) return;
  switch (problem.x.storage) {
    case Storage::float64:
      return GuidedStepLaunches<double>::run(problem, stream);
    case Storage::float32:
      return GuidedStepLaunches<float>::run(problem, stream);
    case Storage::float16:
      return GuidedStepLaunches<Half>::run(problem, stream);
    case Storage::bfloat16:
      return GuidedStepLaunches<BFloat16>::run(problem, stream);
  }
}

void guidance_factor(const GuidanceFactorProblem& problem, void* stream) {
  launch("guidance_factor", guidance_factor_kernel, ceil_div(problem.rows, kStepThreads), kStepThreads,
         stream, problem);
}

}  // namespace refine_ext::cuda
