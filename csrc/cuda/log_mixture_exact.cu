// What the compute type of a log-mixture could not hold.
#include "log_mixture_exact.cuh"
#include "log_mixture_launch.cuh"

namespace refine_ext::cuda {
namespace {

struct ExactPlan {
  int* extremes;
  RowReference* rows;
  int64_t used;

  ExactPlan(const MixtureInputs& in, void* memory) {
    Arrays arrays{memory};
    extremes = arrays.take<int>(2 * kExtremeBlocks);
    rows = arrays.take<RowReference>(in.m);
    used = arrays.used;
  }
};

}  // namespace

void launch_exact(const LogMixtureProblem& p, void* stream) {
  launch("log_mixture", mixture_exact_kernel, ceil_div(p.in.m, kMixtureThreads), kMixtureThreads, stream, p);
}

int64_t exact_gradients_workspace(const MixtureInputs& in) { return ExactPlan(in, nullptr).used; }

void launch_exact_gradients(const LogMixtureBackwardProblem& p, double* scale_parts, void* memory,
                            void* stream) {
  const char* op = "log_mixture_backward";
  const ExactPlan plan(p.in, memory);
  const int* const extremes = plan.extremes;
  launch(op, mixture_extremes_kernel, kExtremeBlocks, kMixtureThreads, stream, p, plan.extremes);
  launch(op, mixture_exact_values_kernel, least(p.in.m, kExtremeBlocks), kMixtureThreads, stream, p.in,
         extremes, plan.rows);
  const auto exact = [&](auto kernel, int64_t owners) {
    launch(op, kernel, least(owners, kExtremeBlocks), kMixtureThreads, stream, p, extremes,
           static_cast<const RowReference*>(plan.rows), scale_parts);
  };
  if (p.grad_x) exact(mixture_exact_gradient_kernel<false>, p.in.m);
  if (p.grad_centers || p.grad_scale || p.grad_log_weights)
    exact(mixture_exact_gradient_kernel<true>, p.in.n);
}

}  // namespace refine_ext::cuda
