// Launches of the guided step, divided among files that the build compiles side by side: one per storage of
// the state.
#pragma once

#include "guidance.cuh"

namespace refine_ext::cuda {

// Enough blocks that the last ones to finish do not matter, and a few groups of elements a thread at least
// where there are so many.
inline Layout step_layout(int64_t rows, int64_t n) {
  const int64_t groups = ceil_div(n, 8);
  if (groups < kStepThreads) {
    int team = 1;
    while (team < groups) team *= 2;
    return {team, 1};
  }
  const int64_t useful = ceil_div(groups, kStepThreads),
                wanted = ceil_div(int64_t{64} * multiprocessors(), rows);
  return {kStepThreads, useful < wanted ? useful : wanted};
}

template <class T>
struct GuidedStepLaunches {
  static void run(const GuidedStepProblem&, void* stream);
};

template <class T, class U>
void launch_step(const GuidedStepProblem& problem, void* stream) {
  const Layout layout = step_layout(problem.rows, problem.n);
  const int64_t blocks = ceil_div(problem.rows * layout.parts, kStepThreads / layout.team);
  const auto go = [&](auto kernel) {
    launch("guided_step", kernel, blocks, kStepThreads, stream, problem, layout);
  };
  const bool many = problem.terms > kFewTerms;
  if (problem.noisy) {
    go(many ? guided_step_kernel<T, U, true, true> : guided_step_kernel<T, U, true, false>);
  } else {
    go(many ? guided_step_kernel<T, U, false, true> : guided_step_kernel<T, U, false, false>);
  }
}

// The kernel for the storage of most of the terms that are not of the state's.
template <class T>
void GuidedStepLaunches<T>::run(const GuidedStepProblem& problem, void* stream) {
  Storage other = kStorageOf<T>;
  for (int k = 0; k < problem.terms; ++k) {
    if (problem.term[k].storage != kStorageOf<T>) other = problem.term[k].storage;
  }
  if constexpr (kStorageOf<T> == Storage::float64) {
    if (other != kStorageOf<T>) return launch_step<T, float>(problem, stream);
  } else if constexpr (kStorageOf<T> == Storage::float32) {
    if (other == Storage::float16) return launch_step<T, Half>(problem, stream);
    if (other == Storage::bfloat16) return launch_step<T, BFloat16>(problem, stream);
  }
  launch_step<T, T>(problem, stream);
}

}  // namespace refine_ext::cuda
