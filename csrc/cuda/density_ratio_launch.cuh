// Over how many blocks a call's kernels are launched, and how the launches are divided among files that the
// build compiles side by side: one per storage type, and one for the kernels that serve several.
#pragma once

#include "density_ratio.h"
#include "density_ratio_dual.cuh"

namespace refine_ext::cuda {

// Rows up to this long are one team's work: their samples stay in the caches for the search.
inline constexpr int64_t kRowLimit = 16384;
inline constexpr int kBlocksPerMultiprocessor = 4;

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
  if (n <= 128 || (n <= 2048 && rows >= int64_t{16} * multiprocessors()))
    return make_launch(kWarp, 1, kThreads, rows);
  const int threads = n <= 4096 ? kThreads : kMaxThreads;
  return make_launch(threads, 1, threads, rows);
}

// Enough blocks to fill the device, each with a few packs a thread at least.
inline Launch pass_launch(int64_t rows, int64_t n, Storage storage, int per_multiprocessor) {
  if (n <= 1024) return make_launch(kWarp, 1, kThreads, rows);
  const int64_t packs = n * size_of(storage) / 16;
  const int64_t useful = ceil_div(packs, 2 * kThreads);
  const int64_t wanted = ceil_div(int64_t{per_multiprocessor} * multiprocessors(), rows > 1 ? rows : 1);
  const int64_t parts = useful < wanted ? useful : wanted;
  return make_launch(kThreads, parts < 1 ? 1 : parts, kThreads, rows);
}
inline Launch reducing_launch(int64_t rows, int64_t n, Storage storage) {
  return pass_launch(rows, n, storage, kBlocksPerMultiprocessor);
}
inline Launch elementwise_launch(int64_t rows, int64_t n, Storage storage) {
  return pass_launch(rows, n, storage, 2 * kBlocksPerMultiprocessor);
}

// Long rows take whole blocks, however short the row is beside the real outputs of its bound.
inline Launch long_row_launch(int64_t rows, int64_t n, Storage storage) {
  Launch shape = reducing_launch(rows, n, storage);
  if (shape.layout.team == kWarp) shape = make_launch(kThreads, 1, kThreads, rows);
  return shape;
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

inline Workspace carve(void* memory, const WorkspacePlan& plan, int64_t rows, int64_t parts,
                       int64_t real_parts) {
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
    case Form::exponential:
      return f(FormTag<Form::exponential>{});
    case Form::reciprocal:
      return f(FormTag<Form::reciprocal>{});
    case Form::inverse_square:
      return f(FormTag<Form::inverse_square>{});
    case Form::inverse_sqrt:
      return f(FormTag<Form::inverse_sqrt>{});
    case Form::linear:
      return f(FormTag<Form::linear>{});
    case Form::logistic:
      return f(FormTag<Form::logistic>{});
    case Form::lambert:
      return f(FormTag<Form::lambert>{});
    default:
      return f(FormTag<Form::power>{});
  }
}

template <class F>
void with_dual_form(Form form, F&& f) {
  switch (dual_form(form)) {
    case Form::exponential:
      return f(FormTag<Form::exponential>{});
    case Form::reciprocal:
      return f(FormTag<Form::reciprocal>{});
    case Form::logistic:
      return f(FormTag<Form::logistic>{});
    case Form::lambert:
      return f(FormTag<Form::lambert>{});
    default:
      return f(FormTag<Form::power>{});
  }
}

// The kernels that depend on the compute type only, in density_ratio_search.cu.
template <class C>
struct SearchLaunches {
  static void guess(const RowProblem&, const Workspace&, void* stream);
  static void settle(const RowProblem&, const Workspace&, void* stream);
  static void finish(const RowProblem&, const Workspace&, RatioStats*, const BoundArguments&, void* stream);
};

// All launches of one storage type; defined in density_ratio_storage.cuh.
template <class T>
struct DensityRatioLaunches {
  static void run(const RowProblem&, RatioStats*, const BoundArguments&, void* workspace, void* stream);
  static void bound_backward(const RowProblem&, const RatioStats*, const void* grad, bool wide, void* stream);
  static void backward(const RowProblem&, const void* log_ratio, const void* grad, const RatioStats*,
                       const double* grad_stats, double* sums, void* stream);
  static void output(const void* x, void* out, int64_t n, const Family&, Storage, void* stream);
  static void slope(const void* x, const void* grad, const void* row_grad, bool wide, void* out, int64_t rows,
                    int64_t n, const Family&, bool conjugated, Storage, void* stream);
  static void sum(const void* x, int64_t rows, int64_t n, const Family&, bool conjugated, Storage,
                  double* sums, void* stream);
};

}  // namespace refine_ext::cuda
