// The sums by Hopper's own instructions, for rademacher.cu: a kernel apart, as it is compiled for sm_90a.
#pragma once

#include "rademacher_sums.cuh"

namespace refine_ext::cuda {

inline constexpr int kHopperThreads = 256;
inline constexpr int kHopperDraws = 256;  // of a tile

void launch_hopper_sums(const char* op, const SumsTask& task, int64_t blocks, void* stream);

}  // namespace refine_ext::cuda
