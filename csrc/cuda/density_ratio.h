// CUDA density ratios: the entry points that csrc/ops calls. Pointers are device memory, `stream` a
// cudaStream_t, and `workspace` scratch memory of the size that the function beside each entry point asks
// for. Nothing waits for the device, so invalid outputs cannot raise: their row's results and statistics are
// NaN.
#pragma once

#include "../math/density_ratio_problem.h"

namespace refine_ext::cuda {

// fixed: the shift is given, and is zero where problem.shift is nullptr.
int64_t density_ratio_workspace(const DensityRatioProblem&, bool fixed);
void density_ratio(const DensityRatioProblem&, bool fixed, RatioStats* stats, void* workspace, void* stream);

// problem.h are the fake outputs; values[rows] in float64 if wide, else float32.
struct RealOutputs {
  const void* h;
  int64_t n;
};
int64_t variational_bound_workspace(const DensityRatioProblem&, const RealOutputs&, bool tight);
void variational_bound(const DensityRatioProblem&, const RealOutputs&, bool tight, RatioStats* stats,
                       void* values, bool wide, void* workspace, void* stream);
void variational_bound_backward(const DensityRatioProblem&, bool tight, const RatioStats* stats,
                                const void* grad, bool wide, void* stream);

// The gradient of log r with respect to h, into problem.out; problem.h is not read. See
// density_ratio_backward_cpu.
int64_t density_ratio_backward_workspace(const DensityRatioProblem&, bool solved);
void density_ratio_backward(const DensityRatioProblem&, const void* log_ratio, const void* grad,
                            const RatioStats* stats, const double* grad_stats, bool solved, void* workspace,
                            void* stream);

void dual_output(Storage, const void* x, void* out, int64_t n, const Family&, void* stream);
// grad is like x, or nullptr where row_grad has one value a row, float64 if wide.
void dual_slope(Storage, const void* x, const void* grad, const void* row_grad, bool wide, void* out,
                int64_t rows, int64_t n, const Family&, bool conjugate, void* stream);
int64_t dual_bound_workspace(Storage, int64_t rows, int64_t real_n, int64_t fake_n);
void dual_bound(Storage, const void* real, const void* fake, int64_t rows, int64_t real_n, int64_t fake_n,
                const Family&, void* values, bool wide, void* workspace, void* stream);

}  // namespace refine_ext::cuda
