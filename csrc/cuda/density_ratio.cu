// The entry points of density_ratio.h: from a storage type at run time to one at compile time.
#include "density_ratio_launch.cuh"

namespace refine_ext::cuda {
namespace {

template <class F>
void with_launches(Storage storage, F&& f) {
  switch (storage) {
    case Storage::float64:
      return f(DensityRatioLaunches<double>{});
    case Storage::float16:
      return f(DensityRatioLaunches<Half>{});
    case Storage::bfloat16:
      return f(DensityRatioLaunches<BFloat16>{});
    default:
      return f(DensityRatioLaunches<float>{});
  }
}

RowProblem row_problem(const DensityRatioProblem& problem, bool fixed) {
  return {problem, fixed, tolerance_of(problem.storage)};
}

int64_t workspace_of(const RowProblem& problem, int64_t real_n) {
  if (problem.n <= kRowLimit && real_n <= kRowLimit) return 0;
  const Launch shape = long_row_launch(problem.rows, problem.n, problem.storage);
  const int64_t real_parts = real_n ? reducing_launch(problem.rows, real_n, problem.storage).layout.parts : 0;
  return plan_workspace(problem.rows, shape.layout.parts, is_searched(problem), real_parts).total();
}

}  // namespace

int64_t density_ratio_workspace(const DensityRatioProblem& problem, bool fixed) {
  return workspace_of(row_problem(problem, fixed), 0);
}

void density_ratio(const DensityRatioProblem& problem, bool fixed, RatioStats* stats, void* workspace,
                   void* stream) {
  with_launches(problem.storage, [&](auto launches) {
    launches.run(row_problem(problem, fixed), stats, BoundArguments{}, workspace, stream);
  });
}

int64_t variational_bound_workspace(const DensityRatioProblem& problem, const RealOutputs& real, bool tight) {
  return workspace_of(row_problem(problem, !tight), real.n);
}

void variational_bound(const DensityRatioProblem& problem, const RealOutputs& real, bool tight,
                       RatioStats* stats, void* values, bool wide, void* workspace, void* stream) {
  RowProblem fake = row_problem(problem, !tight);
  fake.output = Output::none;
  fake.out = nullptr;
  with_launches(problem.storage, [&](auto launches) {
    launches.run(fake, stats, BoundArguments{real.h, real.n, values, wide, tight}, workspace, stream);
  });
}

void variational_bound_backward(const DensityRatioProblem& problem, bool tight, const RatioStats* stats,
                                const void* grad, bool wide, void* stream) {
  with_launches(problem.storage, [&](auto launches) {
    launches.bound_backward(row_problem(problem, !tight), stats, grad, wide, stream);
  });
}

int64_t density_ratio_backward_workspace(const DensityRatioProblem& problem, bool solved) {
  if (!solved) return 0;
  const Launch shape = reducing_launch(problem.rows, problem.n, problem.storage);
  return 2 * problem.rows * shape.layout.parts * static_cast<int64_t>(sizeof(double));
}

void density_ratio_backward(const DensityRatioProblem& problem, const void* log_ratio, const void* grad,
                            const RatioStats* stats, const double* grad_stats, bool solved, void* workspace,
                            void* stream) {
  with_launches(problem.storage, [&](auto launches) {
    launches.backward(row_problem(problem, !solved), log_ratio, grad, stats, grad_stats,
                      solved ? static_cast<double*>(workspace) : nullptr, stream);
  });
}

void dual_output(Storage storage, const void* x, void* out, int64_t n, const Family& family, void* stream) {
  with_launches(storage, [&](auto launches) { launches.output(x, out, n, family, storage, stream); });
}

void dual_slope(Storage storage, const void* x, const void* grad, const void* row_grad, bool wide, void* out,
                int64_t rows, int64_t n, const Family& family, bool conjugate, void* stream) {
  with_launches(storage, [&](auto launches) {
    launches.slope(x, grad, row_grad, wide, out, rows, n, family, conjugate, storage, stream);
  });
}

int64_t dual_bound_workspace(Storage storage, int64_t rows, int64_t real_n, int64_t fake_n) {
  const int64_t parts = reducing_launch(rows, real_n, storage).layout.parts +
                        reducing_launch(rows, fake_n, storage).layout.parts;
  return rows * parts * static_cast<int64_t>(sizeof(double));
}

void dual_bound(Storage storage, const void* real, const void* fake, int64_t rows, int64_t real_n,
                int64_t fake_n, const Family& family, void* values, bool wide, void* workspace,
                void* stream) {
  const int64_t real_parts = reducing_launch(rows, real_n, storage).layout.parts;
  const int64_t fake_parts = reducing_launch(rows, fake_n, storage).layout.parts;
  double* real_sums = static_cast<double*>(workspace);
  double* fake_sums = real_sums + rows * real_parts;
  with_launches(storage, [&](auto launches) {
    launches.sum(real, rows, real_n, family, false, storage, real_sums, stream);
    launches.sum(fake, rows, fake_n, family, true, storage, fake_sums, stream);
  });
  const MeanSums means[2] = {{real_sums, real_parts, real_n}, {fake_sums, fake_parts, fake_n}};
  const Launch shape = make_launch(kWarp, 1, kThreads, rows);
  if (wide) {
    launch("dual_bound", dual_bound_kernel<double>, shape.blocks, shape.threads, stream, means[0], means[1],
           static_cast<double*>(values), rows);
  } else {
    launch("dual_bound", dual_bound_kernel<float>, shape.blocks, shape.threads, stream, means[0], means[1],
           static_cast<float*>(values), rows);
  }
}

}  // namespace refine_ext::cuda
