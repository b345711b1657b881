// What the entry points of the resampling family share: the kernels in use, and rows on threads.
#pragma once

#include <algorithm>
#include <vector>

#include "dispatch.h"
#include "parallel.h"
#include "resampling.h"

namespace refine_ext {

REFINE_EXT_KERNEL_TABLE(ResamplingKernels, resampling_kernels)

inline constexpr int64_t kGrainChunks = 16;  // below this waking a thread costs more than it saves
inline constexpr int64_t kGrain = kGrainChunks * kDrawChunk;

// Rows side by side when they are short, threads inside one when it is long; the first row with an error is
// reported.
template <class F>
DrawReport for_drawn_rows(int64_t rows, int64_t work, F&& body) {
  std::vector<DrawError> errors(rows, DrawError::none);
  if (rows == 1 || work >= kGrain) {
    for (int64_t row = 0; row < rows; ++row) errors[row] = body(row, true);
  } else {
    const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(work, 1));
    parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) errors[row] = body(row, false);
    });
  }
  for (int64_t row = 0; row < rows; ++row) {
    if (errors[row] != DrawError::none) return {errors[row], row};
  }
  return {};
}

}  // namespace refine_ext
