#include "density_ratio_storage.cuh"

template struct refine_ext::cuda::DensityRatioLaunches<refine_ext::cuda::Half>;
