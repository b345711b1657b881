// CUDA draws: the entry points that csrc/ops calls. Pointers are device memory, `stream` a cudaStream_t;
// workspaces as in density_ratio.h. Indices are the CPU's for the same seed. Nothing waits for the device:
// rows whose weights or log-ratios are invalid draw index 0, and keep nothing.
#pragma once

#include "../math/resampling_problem.h"

namespace refine_ext::cuda {

int64_t resample_workspace(const ResampleProblem&);
void resample(const ResampleProblem&, void* workspace, void* stream);

// log_bound and gamma hold a value for every bound_each and gamma_each rows.
int64_t rejection_workspace(const RejectionProblem&);
void rejection(const RejectionProblem&, int64_t bound_each, int64_t gamma_each, void* workspace,
               void* stream);

// problem.seed is not read, `seed` is; initial holds a value for every initial_each chains.
int64_t metropolis_workspace(const MetropolisProblem&);
void metropolis(const MetropolisProblem&, const int64_t* seed, int64_t initial_each, void* workspace,
                void* stream);

}  // namespace refine_ext::cuda
