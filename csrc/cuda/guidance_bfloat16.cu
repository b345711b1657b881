#include "guidance_launch.cuh"

template struct refine_ext::cuda::GuidedStepLaunches<refine_ext::cuda::BFloat16>;
