// Rademacher sums on the CPU: the entry points that csrc/ops calls.
#pragma once

#include "../math/rademacher_problem.h"

namespace refine_ext {

void rademacher_suprema_cpu(const RademacherProblem&);

void rademacher_sums_cpu(const RademacherSumsProblem&);

void rademacher_backward_cpu(const RademacherBackwardProblem&);

void multipliers_cpu(const MultipliersProblem&);

}  // namespace refine_ext
