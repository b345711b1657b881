// CUDA Rademacher sums: the entry points that csrc/ops calls. Pointers are device memory, `stream` a
// cudaStream_t, workspaces as many bytes as the functions beside say. Nothing waits for the device.
#pragma once

#include "../math/rademacher_problem.h"

namespace refine_ext::cuda {

int64_t rademacher_suprema_workspace(const RademacherProblem&);
void rademacher_suprema(const RademacherProblem&, void* workspace, void* stream);

int64_t rademacher_sums_workspace(const RademacherSumsProblem&);
void rademacher_sums(const RademacherSumsProblem&, void* workspace, void* stream);

void rademacher_backward(const RademacherBackwardProblem&, void* stream);
void multipliers(const MultipliersProblem&, void* stream);

}  // namespace refine_ext::cuda
