// Which elements of which sample each thread steps. Any element's result is its own, so that neither the
// batch nor the number of threads changes it.
#include "guidance.h"

#include <algorithm>
#include <limits>

#include "dispatch.h"
#include "parallel.h"

namespace refine_ext {

REFINE_EXT_KERNEL_TABLE(GuidanceKernels, guidance_kernels)
REFINE_EXT_KERNEL_TABLE(GuidanceFactorKernels, guidance_factor_kernels)

namespace {

constexpr int64_t kChunk = 32 * kStepBlock;  // elements of one task
// Below this waking a thread costs more than it saves.
constexpr int64_t kGrain = 32768, kGrainNoisy = 16384, kGrainShort = 8192;
constexpr int64_t kStreamBytes = int64_t{8} << 20;  // outputs beyond this do not stay in cache anyway
constexpr uintptr_t kVectorAlignment = 64;

// In the type of the arithmetic. NaN without a payload, which rounding to half precision might carry on.
double rounded(double coefficient, Storage state) {
  if (coefficient != coefficient) return std::numeric_limits<double>::quiet_NaN();
  return state == Storage::float64 ? coefficient : static_cast<float>(coefficient);
}

const char* sample(const StepTensor& tensor, int64_t row) {
  return static_cast<const char*>(tensor.data) + row * tensor.stride * size_of(tensor.storage);
}

// The row's part of a range: what counts, and where.
StepRange range_of(const GuidedStepProblem& problem, int64_t row) {
  StepRange range{};
  const Storage state = problem.x.storage;
  range.out = static_cast<char*>(problem.out) + row * problem.n * size_of(state);
  range.storage = state;
  for (int k = 0; k <= problem.terms; ++k) {
    const double coefficient = rounded(problem.coefficient(row, k), state);
    const StepTensor& tensor = k == 0 ? problem.x : problem.term[k - 1];
    if (coefficient != 0.0) range.term[range.terms++] = {sample(tensor, row), tensor.storage, coefficient};
  }
  if (problem.noisy) {
    range.noise = rounded(problem.coefficient(row, problem.terms + 1), state);
    range.sequence = problem.noise(row);
  }
  return range;
}

bool reads_output(const GuidedStepProblem& problem) {
  bool found = problem.x.data == problem.out;
  for (int k = 0; k < problem.terms; ++k) found = found || problem.term[k].data == problem.out;
  return found;
}

bool contiguous(const GuidedStepProblem& problem) {
  bool found = problem.rows == 1 || problem.x.stride == problem.n;
  for (int k = 0; k < problem.terms; ++k) {
    found = found && (problem.rows == 1 || problem.term[k].stride == problem.n);
  }
  return found;
}

}  // namespace

void guided_step_cpu(const GuidedStepProblem& given) {
  if (given.rows == 0 || given.n == 0) return;
  const auto& kernels = guidance_kernels_table();
  GuidedStepProblem problem = given;
  if (contiguous(problem)) {
    if (!problem.noisy && !problem.factor && problem.table_stride == 0) {
      // Nothing tells the samples apart.
      problem.n *= problem.rows;
      problem.rows = 1;
    } else if (problem.n <= kShortSample) {
      const int64_t grain = std::max<int64_t>(1, kGrainShort / problem.n);
      parallel_for(0, problem.rows, grain,
                   [&](int64_t first, int64_t last) { kernels.short_samples(problem, first, last); });
      return;
    }
  }
  const int64_t width = size_of(problem.x.storage);
  const bool large = problem.rows * problem.n * width > kStreamBytes && !reads_output(problem);
  const int64_t chunks = (problem.n + kChunk - 1) / kChunk;
  const int64_t length = std::min(problem.n, kChunk);
  const int64_t grain = std::max<int64_t>(1, (problem.noisy ? kGrainNoisy : kGrain) / length);
  parallel_for(0, problem.rows * chunks, grain, [&](int64_t first, int64_t last) {
    StepRange range{};
    for (int64_t task = first; task < last; ++task) {
      const int64_t row = task / chunks, chunk = task % chunks;
      if (task == first || chunk == 0) {
        range = range_of(problem, row);
        range.stream = large && reinterpret_cast<uintptr_t>(range.out) % kVectorAlignment == 0;
      }
      range.begin = chunk * kChunk;
      range.end = std::min(problem.n, range.begin + kChunk);
      kernels.step(range);
    }
  });
}

void guidance_factor_cpu(const GuidanceFactorProblem& problem) {
  const auto& kernels = guidance_factor_kernels_table();
  parallel_for(0, problem.rows, 16384,
               [&](int64_t first, int64_t last) { kernels.factors(problem, first, last); });
}

}  // namespace refine_ext
