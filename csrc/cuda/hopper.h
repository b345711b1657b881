// Which kernels run on Hopper's own instructions, compiled for sm_90a alone: those of csrc/cuda/*_hopper.cu,
// where the build has them (REFINE_EXT_HOPPER). No GPU has run them yet: they are launched only where the
// environment variable REFINE_EXT_WGMMA is 1.
#pragma once

#include <cstdlib>

#include "launch.h"

namespace refine_ext::cuda {

#if defined(REFINE_EXT_HOPPER)
inline constexpr bool kHopperIsBuilt = true;
#else
inline constexpr bool kHopperIsBuilt = false;
#endif

inline bool use_hopper() {
  const char* wanted = std::getenv("REFINE_EXT_WGMMA");
  if (!kHopperIsBuilt || !wanted || std::string(wanted) != "1") return false;
#if defined(REFINE_EXT_CUDA_ON_CPU)
  return true;
#else
  int device = 0, major = 0;
  check(cudaGetDevice(&device), "refine_ext");
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "refine_ext");
  return major == 9;
#endif
}

}  // namespace refine_ext::cuda
