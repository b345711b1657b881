// Which kernels a call launches, over how many blocks. Instantiated once per storage type (density_ratio_*.cu), which
// is what the build compiles side by side.
#pragma once

#include "density_ratio.h"
#include "density_ratio_dual.cuh"

namespace refine_ext::cuda {

// Rows up to this long are one team's work: their samples stay in the caches for the search.
inline constexpr int64_t kRowLimit = 16384;
inline constexpr int kBlocksPerMultiprocessor = 4;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Launch {
  Layout layout;
  int threads;
  int64_t blocks;
};

inline Launch make_launch(int team, int64_t parts, int threads, int64_t rows) {
  return {{team, parts}, threads, ceil_div(rows * parts, threads / team)};
}

// A team a row: a warp where rows are short and many, else a block.
inline Launch row_launch(int64_t rows, int64_t n) {
  if (n <= 128 || (n <= 2048 && rows >= int64_t{16} * multiprocessors())) return make_launch(kWarp, 1, kThreads, rows);
  const int threads = n <= 4096 ? kThreads : kMaxThreads;
  return make_launch(threads, 1, threads, rows);
}

// Enough blocks to fill the device, each with a few packs a thread at least.
inline Launch pass_launch(int64_t rows, int64_t n, Storage storage, int per_multiprocessor) {
  if (n <= 1024) return make_launch(kWarp, 1, kThreads, rows);
  const int64_t packs = n * size_of(storage) / 16;
  const int64_t useful = ceil_div(packs, 2 * kThreads), wanted = ceil_div(int64_t{per_multiprocessor} * multiprocessors(), rows);
  const int64_t parts = useful < wanted ? useful : wanted;
  return make_launch(kThreads, parts < 1 ? 1 : parts, kThreads, rows);
}
inline Launch reducing_launch(int64_t rows, int64_t n, Storage storage) {
  return pass_launch(rows, n, storage, kBlocksPerMultiprocessor);
}
inline Launch elementwise_launch(int64_t rows, int64_t n, Storage storage) {
  return pass_launch(rows, n, storage, 2 * kBlocksPerMultiprocessor);
}

struct WorkspacePlan {
  int64_t states, partials, maxima, real;  // in bytes
  int64_t total() const { return states + partials + maxima + real; }
};

inline WorkspacePlan plan_workspace(int64_t rows, int64_t parts, bool solved, int64_t real_parts) {
  const int64_t doubles = static_cast<int64_t>(sizeof(double));
  return {2 * rows * static_cast<int64_t>(sizeof(RowState)), 2 * rows * parts * kPartials * doubles,
          solved ? rows * parts * kThreads * doubles : 0, rows * real_parts * doubles};
}

inline Workspace carve(void* memory, const WorkspacePlan& plan, int64_t rows, int64_t parts, int64_t real_parts) {
  char* at = static_cast<char*>(memory);
  Workspace work;
  work.states = reinterpret_cast<RowState*>(at);
  at += plan.states;
  work.partials = reinterpret_cast<double*>(at);
  at += plan.partials;
  work.maxima = plan.maxima ? reinterpret_cast<double*>(at) : nullptr;
  at += plan.maxima;
  work.real = plan.real ? reinterpret_cast<double*>(at) : nullptr;
  work.rows = rows;
  work.parts = parts;
  work.real_parts = real_parts;
  return work;
}

inline bool is_searched(const RowProblem& problem) {
  return !problem.fixed && problem.family.form != Form::exponential;
}

template <Form kForm>
struct FormTag {
  static constexpr Form value = kForm;
};

template <class F>
void with_form(Form form, F&& f) {
  switch (form) {
    case Form::exponential: return f(FormTag<Form::exponential>{});
    case Form::reciprocal: return f(FormTag<Form::reciprocal>{});
    case Form::inverse_square: return f(FormTag<Form::inverse_square>{});
    case Form::inverse_sqrt: return f(FormTag<Form::inverse_sqrt>{});
    case Form::linear: return f(FormTag<Form::linear>{});
    case Form::logistic: return f(FormTag<Form::logistic>{});
    case Form::lambert: return f(FormTag<Form::lambert>{});
    default: return f(FormTag<Form::power>{});
  }
}

template <class F>
void with_dual_form(Form form, F&& f) {
  switch (dual_form(form)) {
    case Form::exponential: return f(FormTag<Form::exponential>{});
    case Form::reciprocal: return f(FormTag<Form::reciprocal>{});
    case Form::logistic: return f(FormTag<Form::logistic>{});
    case Form::lambert: return f(FormTag<Form::lambert>{});
    default: return f(FormTag<Form::power>{});
  }
}

// ---- the calls, for one storage type

// The kernels that depend on the compute type only, in density_ratio_search.cu.
template <class C>
struct SearchLaunches {
  static void guess(const RowProblem&, const Workspace&, void* stream);
  static void settle(const RowProblem&, const Workspace&, void* stream);
  static void finish(const RowProblem&, const Workspace&, RatioStats*, const BoundArguments&, void* stream);
};

template <Form kForm, class T>
void launch_search(const RowProblem& problem, const Launch& shape, const Workspace& work, void* stream) {
  using Search = SearchLaunches<Compute<kForm, T>>;
  Search::guess(problem, work, stream);
  if (problem.fixed) return;
  const auto evaluate = problem.weights ? evaluate_kernel<kForm, T, true> : evaluate_kernel<kForm, T, false>;
  for (int index = 0; index < kEvaluations; ++index) {
    launch("density_ratio", evaluate, shape.blocks, shape.threads, stream, problem, shape.layout, work, index);
  }
  Search::settle(problem, work, stream);
}

template <class T>
void launch_scan(const RowProblem& problem, const Launch& shape, const Workspace& work, void* stream) {
  const bool exponential = problem.family.form == Form::exponential;
  const auto kernel = problem.weights ? (exponential ? scan_kernel<T, true, true> : scan_kernel<T, true, false>)
                                      : (exponential ? scan_kernel<T, false, true> : scan_kernel<T, false, false>);
  launch("density_ratio", kernel, shape.blocks, shape.threads, stream, problem, shape.layout, work);
}

template <class T>
struct DensityRatioLaunches {
  static void run(const RowProblem& problem, RatioStats* stats, const BoundArguments& bound, void* workspace,
                  void* stream) {
    const char* op = "density_ratio";
    const int64_t longest = bound.values && bound.real_n > problem.n ? bound.real_n : problem.n;
    if (longest <= kRowLimit) {
      const Launch shape = row_launch(problem.rows, problem.n);
      with_form(problem.family.form, [&](auto form) {
        launch(op, density_ratio_rows_kernel<decltype(form)::value, T>, shape.blocks, shape.threads, stream, problem,
               shape.layout, stats, bound);
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
      launch(op, real_sum_kernel<T>, real.blocks, real.threads, stream, bound, real.layout, problem.rows, work.real);
    }
    launch_scan<T>(problem, shape, work, stream);
    with_form(problem.family.form, [&](auto tag) {
      constexpr Form kForm = decltype(tag)::value;
      if constexpr (kForm != Form::exponential) {
        launch_search<kForm, T>(problem, shape, work, stream);
      }
      const auto write = [&](auto kernel) {
        launch(op, kernel, shape.blocks, shape.threads, stream, problem, shape.layout, work, stats);
      };
      switch (problem.output) {
        case Output::log_ratio: write(write_kernel<kForm, T, Output::log_ratio>); break;
        case Output::ratio: write(write_kernel<kForm, T, Output::ratio>); break;
        default:
          if constexpr (kForm != Form::exponential) write(write_kernel<kForm, T, Output::none>);
      }
      if (kForm != Form::exponential || bound.values) {
        SearchLaunches<Compute<kForm, T>>::finish(problem, work, stats, bound, stream);
      }
    });
  }

  // Long rows take whole blocks, however short the row is beside the real outputs of its bound.
  static Launch long_row_launch(int64_t rows, int64_t n, Storage storage) {
    Launch shape = reducing_launch(rows, n, storage);
    if (shape.layout.team == kWarp) shape = make_launch(kThreads, 1, kThreads, rows);
    return shape;
  }

  static void bound_backward(const RowProblem& problem, const RatioStats* stats, const void* grad, bool wide,
                             void* stream) {
    const Launch shape = elementwise_launch(problem.rows, problem.n, problem.storage);
    with_form(problem.family.form, [&](auto tag) {
      launch("variational_bound_backward", bound_backward_kernel<decltype(tag)::value, T>, shape.blocks, shape.threads,
             stream, problem, shape.layout, stats, grad, wide);
    });
  }

  static void backward(const RowProblem& problem, const void* log_ratio, const void* grad, const RatioStats* stats,
                       const double* grad_stats, double* sums, void* stream) {
    const char* op = "density_ratio_backward";
    const Launch shape = reducing_launch(problem.rows, problem.n, problem.storage);
    const T* x = static_cast<const T*>(log_ratio);
    const T* g = static_cast<const T*>(grad);
    with_dual_form(problem.family.form, [&](auto tag) {
      constexpr Form kForm = decltype(tag)::value;
      if (sums) {
        launch(op, backward_sums_kernel<kForm, T>, shape.blocks, shape.threads, stream, problem, shape.layout, x, g,
               sums);
      }
      launch(op, backward_kernel<kForm, T>, shape.blocks, shape.threads, stream, problem, shape.layout, x, g, stats,
             grad_stats, static_cast<const double*>(sums));
    });
  }

  static void output(const void* x, void* out, int64_t n, const Family& family, Storage storage, void* stream) {
    const Launch shape = elementwise_launch(1, n, storage);
    with_dual_form(family.form, [&](auto tag) {
      launch("dual_output", dual_output_kernel<decltype(tag)::value, T>, shape.blocks, shape.threads, stream,
             static_cast<const T*>(x), static_cast<T*>(out), n, shape.layout, family);
    });
  }

  static void slope(const void* x, const void* grad, const void* row_grad, bool wide, void* out, int64_t rows,
                    int64_t n, const Family& family, bool conjugated, Storage storage, void* stream) {
    const Launch shape = elementwise_launch(rows, n, storage);
    with_dual_form(family.form, [&](auto tag) {
      constexpr Form kForm = decltype(tag)::value;
      launch("dual_slope", conjugated ? dual_slope_kernel<kForm, T, true> : dual_slope_kernel<kForm, T, false>,
             shape.blocks, shape.threads, stream, static_cast<const T*>(x), static_cast<const T*>(grad), row_grad, wide,
             static_cast<T*>(out), rows, n, shape.layout, family);
    });
  }

  static void sum(const void* x, int64_t rows, int64_t n, const Family& family, bool conjugated, Storage storage,
                  double* sums, void* stream) {
    const Launch shape = reducing_launch(rows, n, storage);
    with_dual_form(family.form, [&](auto tag) {
      constexpr Form kForm = decltype(tag)::value;
      launch("dual_bound", conjugated ? dual_sum_kernel<kForm, T, true> : dual_sum_kernel<kForm, T, false>,
             shape.blocks, shape.threads, stream, static_cast<const T*>(x), rows, n, shape.layout, family, sums);
    });
  }
};

extern template struct DensityRatioLaunches<float>;
extern template struct DensityRatioLaunches<double>;
extern template struct DensityRatioLaunches<Half>;
extern template struct DensityRatioLaunches<BFloat16>;

}  // namespace refine_ext::cuda
