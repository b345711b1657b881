// The launches of one storage type; density_ratio_<type>.cu instantiates them.
#pragma once

#include "density_ratio_launch.cuh"

namespace refine_ext::cuda {

template <Form kForm, class T>
void launch_search(const RowProblem& problem, const Launch& shape, const Workspace& work, void* stream) {
  using Search = SearchLaunches<Compute<kForm, T>>;
  Search::guess(problem, work, stream);
  if (problem.fixed) return;
  const auto evaluate = problem.weights ? evaluate_kernel<kForm, T, true> : evaluate_kernel<kForm, T, false>;
  for (int index = 0; index < kEvaluations; ++index) {
    launch("density_ratio", evaluate, shape.blocks, shape.threads, stream, problem, shape.layout, work,
           index);
  }
  Search::settle(problem, work, stream);
}

template <class T>
void launch_scan(const RowProblem& problem, const Launch& shape, const Workspace& work, void* stream) {
  const bool exponential = problem.family.form == Form::exponential;
  const auto kernel = problem.weights
                          ? (exponential ? scan_kernel<T, true, true> : scan_kernel<T, true, false>)
                          : (exponential ? scan_kernel<T, false, true> : scan_kernel<T, false, false>);
  launch("density_ratio", kernel, shape.blocks, shape.threads, stream, problem, shape.layout, work);
}

template <class T>
void DensityRatioLaunches<T>::run(const RowProblem& problem, RatioStats* stats, const BoundArguments& bound,
                                  void* workspace, void* stream) {
  const char* op = "density_ratio";
  const int64_t longest = bound.values && bound.real_n > problem.n ? bound.real_n : problem.n;
  if (longest <= kRowLimit) {
    const Launch shape = row_launch(problem.rows, problem.n);
    with_form(problem.family.form, [&](auto form) {
      launch(op, density_ratio_rows_kernel<decltype(form)::value, T>, shape.blocks, shape.threads, stream,
             problem, shape.layout, stats, bound);
    });
    return;
  }
  const Launch shape = long_row_launch(problem.rows, problem.n, problem.storage);
  Launch real{};
  if (bound.values) real = reducing_launch(problem.rows, bound.real_n, problem.storage);
  const WorkspacePlan plan =
      plan_workspace(problem.rows, shape.layout.parts, is_searched(problem), real.layout.parts);
  const Workspace work = carve(workspace, plan, problem.rows, shape.layout.parts, real.layout.parts);
  if (bound.values) {
    launch(op, real_sum_kernel<T>, real.blocks, real.threads, stream, bound, real.layout, problem.rows,
           work.real);
  }
  launch_scan<T>(problem, shape, work, stream);
  with_form(problem.family.form, [&](auto tag) {
    constexpr Form kForm = decltype(tag)::value;
    if constexpr (kForm != Form::exponential) {
      launch_search<kForm, T>(problem, shape, work, stream);
    }
    using C = Compute<kForm, T>;
    const auto write = [&](auto kernel) {
      launch(op, kernel, shape.blocks, shape.threads, stream, problem, shape.layout, work, stats);
    };
    const bool ratio = problem.output == Output::ratio, none = problem.output == Output::none;
    if constexpr (kForm == Form::exponential) {
      if (!none) {
        write(ratio ? write_kernel<kForm, T, Output::ratio, false, C>
                    : write_kernel<kForm, T, Output::log_ratio, false, C>);
      }
    } else if (sizeof(C) == 8 || problem.weights || problem.fixed) {
      write(none ? write_kernel<kForm, T, Output::none, true, C>
                 : write_kernel<kForm, T, Output::ratio, true, C>);
      if constexpr (kHoldsBase<kForm, C>) {
        if (problem.weights && !none) write(write_kernel<kForm, T, Output::ratio, true, double>);
      }
    } else if constexpr (sizeof(C) == 4) {
      write(none    ? write_kernel<kForm, T, Output::none, false, C>
            : ratio ? write_kernel<kForm, T, Output::ratio, false, C>
                    : write_kernel<kForm, T, Output::log_ratio, false, C>);
    }
    if (kForm != Form::exponential || bound.values) {
      SearchLaunches<C>::finish(problem, work, stats, bound, stream);
    }
  });
}

template <class T>
void DensityRatioLaunches<T>::bound_backward(const RowProblem& problem, const RatioStats* stats,
                                             const void* grad, bool wide, void* stream) {
  const Launch shape = elementwise_launch(problem.rows, problem.n, problem.storage);
  with_form(problem.family.form, [&](auto tag) {
    launch("variational_bound_backward", bound_backward_kernel<decltype(tag)::value, T>, shape.blocks,
           shape.threads, stream, problem, shape.layout, stats, grad, wide);
  });
}

template <class T>
void DensityRatioLaunches<T>::backward(const RowProblem& problem, const void* log_ratio, const void* grad,
                                       const RatioStats* stats, const double* grad_stats, double* sums,
                                       void* stream) {
  const char* op = "density_ratio_backward";
  const Launch shape = reducing_launch(problem.rows, problem.n, problem.storage);
  const T* x = static_cast<const T*>(log_ratio);
  const T* g = static_cast<const T*>(grad);
  with_dual_form(problem.family.form, [&](auto tag) {
    constexpr Form kForm = decltype(tag)::value;
    if (sums) {
      launch(op, backward_sums_kernel<kForm, T>, shape.blocks, shape.threads, stream, problem, shape.layout,
             x, g, sums);
    }
    launch(op, backward_kernel<kForm, T>, shape.blocks, shape.threads, stream, problem, shape.layout, x, g,
           stats, grad_stats, static_cast<const double*>(sums));
  });
}

template <class T>
void DensityRatioLaunches<T>::output(const void* x, void* out, int64_t n, const Family& family,
                                     Storage storage, void* stream) {
  const Launch shape = elementwise_launch(1, n, storage);
  with_dual_form(family.form, [&](auto tag) {
    launch("dual_output", dual_output_kernel<decltype(tag)::value, T>, shape.blocks, shape.threads, stream,
           static_cast<const T*>(x), static_cast<T*>(out), n, shape.layout, family);
  });
}

template <class T>
void DensityRatioLaunches<T>::slope(const void* x, const void* grad, const void* row_grad, bool wide,
                                    void* out, int64_t rows, int64_t n, const Family& family, bool conjugated,
                                    Storage storage, void* stream) {
  const Launch shape = elementwise_launch(rows, n, storage);
  with_dual_form(family.form, [&](auto tag) {
    constexpr Form kForm = decltype(tag)::value;
    launch("dual_slope", conjugated ? dual_slope_kernel<kForm, T, true> : dual_slope_kernel<kForm, T, false>,
           shape.blocks, shape.threads, stream, static_cast<const T*>(x), static_cast<const T*>(grad),
           row_grad, wide, static_cast<T*>(out), rows, n, shape.layout, family);
  });
}

template <class T>
void DensityRatioLaunches<T>::sum(const void* x, int64_t rows, int64_t n, const Family& family,
                                  bool conjugated, Storage storage, double* sums, void* stream) {
  const Launch shape = reducing_launch(rows, n, storage);
  with_dual_form(family.form, [&](auto tag) {
    constexpr Form kForm = decltype(tag)::value;
    launch("dual_bound", conjugated ? dual_sum_kernel<kForm, T, true> : dual_sum_kernel<kForm, T, false>,
           shape.blocks, shape.threads, stream, static_cast<const T*>(x), rows, n, shape.layout, family,
           sums);
  });
}

}  // namespace refine_ext::cuda
