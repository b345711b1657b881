#include "density_ratio_launch.cuh"

namespace refine_ext::cuda {

template <class C>
void SearchLaunches<C>::guess(const RowProblem& problem, const Workspace& work, void* stream) {
  with_form(problem.family.form, [&](auto tag) {
    constexpr Form kForm = decltype(tag)::value;
    if constexpr (kForm != Form::exponential && (kForm != Form::power || sizeof(C) == 8)) {
      launch("density_ratio", guess_kernel<kForm, C>, problem.rows, kGuessThreads, stream, problem, work);
    }
  });
}

template <class C>
void SearchLaunches<C>::settle(const RowProblem& problem, const Workspace& work, void* stream) {
  with_form(problem.family.form, [&](auto tag) {
    constexpr Form kForm = decltype(tag)::value;
    if constexpr (kForm != Form::exponential) {
      launch("density_ratio", settle_kernel<kForm>, problem.rows, kMaxThreads, stream, problem, work);
    }
  });
}

template <class C>
void SearchLaunches<C>::finish(const RowProblem& problem, const Workspace& work, RatioStats* stats,
                               const BoundArguments& bound, void* stream) {
  launch("density_ratio", finish_kernel<C>, problem.rows, kThreads, stream, problem, work, stats, bound);
}

template struct SearchLaunches<float>;
template struct SearchLaunches<double>;

}  // namespace refine_ext::cuda
