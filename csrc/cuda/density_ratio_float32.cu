#include "density_ratio_launch.cuh"

template struct refine_ext::cuda::DensityRatioLaunches<float>;
