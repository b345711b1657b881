// CUDA guidance: the entry points that csrc/ops calls. Pointers are device memory, `stream` a cudaStream_t.
// Nothing waits for the device.
#pragma once

#include "../math/guidance_problem.h"

namespace refine_ext::cuda {

void guided_step(const GuidedStepProblem&, void* stream);
void guidance_factor(const GuidanceFactorProblem&, void* stream);

}  // namespace refine_ext::cuda
