// Launchers of the resampling family. Compiled without contraction into fused multiply-adds, as
// csrc/math/reproducible.h asks.
#include "acceptance.cuh"
#include "resampling.h"

namespace refine_ext::cuda {
namespace {

template <class F>
void with_storage(Storage storage, F&& f) {
  switch (storage) {
    case Storage::float64:
      return f(double{});
    case Storage::float16:
      return f(Half{});
    case Storage::bfloat16:
      return f(BFloat16{});
    default:
      return f(float{});
  }
}

int64_t chunks_of(const ResampleProblem& problem) { return ceil_div(problem.n, kDrawChunk); }

// Workspace arrays one after the other, each on a 16-byte boundary; without memory it only counts.
class Carver {
 public:
  explicit Carver(void* memory) : memory_(static_cast<char*>(memory)) {}
  template <class T>
  T* take(int64_t count) {
    T* taken = memory_ ? reinterpret_cast<T*>(memory_ + used_) : nullptr;
    used_ += ceil_div(count * static_cast<int64_t>(sizeof(T)), 16) * 16;
    return taken;
  }
  int64_t used() const { return used_; }

 private:
  char* memory_;
  int64_t used_ = 0;
};

DrawWorkspace carve(const ResampleProblem& problem, Carver& carver) {
  const int64_t chunks = chunks_of(problem), rows = problem.rows;
  const bool residual = problem.method == ResampleMethod::residual;
  DrawWorkspace work;
  work.masses = carver.take<ChunkMass>(rows * chunks);
  work.units = carver.take<RowUnit>(rows);
  work.bases = carver.take<uint64_t>(rows * (chunks + 1));
  work.table = carver.take<uint64_t>(rows * problem.n);
  work.certain = carver.take<uint64_t>(residual ? rows * (chunks + 1) : 0);
  work.settled = carver.take<uint64_t>(residual ? rows * problem.n : 0);
  work.chunks = chunks;
  return work;
}

// Whole blocks a row, enough of them to fill the device.
Layout rows_layout(int64_t rows, int64_t n) {
  const int64_t useful = ceil_div(n, 8 * kDrawThreads),
                wanted = ceil_div(int64_t{8} * multiprocessors(), rows > 1 ? rows : 1);
  const int64_t parts = useful < wanted ? useful : wanted;
  return {kDrawThreads, parts > 1 ? parts : 1};
}

}  // namespace

int64_t resample_workspace(const ResampleProblem& problem) {
  Carver carver(nullptr);
  carve(problem, carver);
  return carver.used();
}

void resample(const ResampleProblem& problem, void* workspace, void* stream) {
  const char* op = "resample";
  if (problem.rows == 0 || problem.num == 0) return;
  Carver carver(workspace);
  const DrawWorkspace work = carve(problem, carver);
  const int64_t blocks = problem.rows * work.chunks, blocks_a_row = ceil_div(problem.num, kDrawThreads);
  with_storage(problem.storage, [&](auto tag) {
    using T = decltype(tag);
    launch(op, measure_kernel<T>, blocks, kDrawThreads, stream, problem, work);
    launch(op, unit_kernel, problem.rows, kDrawThreads, stream, work);
    launch(op, table_kernel<T>, blocks, kDrawThreads, stream, problem, work);
  });
  if (problem.method == ResampleMethod::residual) {
    launch(op, copies_kernel<false>, blocks, kDrawThreads, stream, problem, work);
    launch(op, certain_kernel, problem.rows, kDrawThreads, stream, work);
    launch(op, copies_kernel<true>, blocks, kDrawThreads, stream, problem, work);
  }
  launch(op, draw_kernel, problem.rows * blocks_a_row, kDrawThreads, stream, problem, work, blocks_a_row);
}

int64_t rejection_workspace(const RejectionProblem& problem) {
  return 2 * problem.rows * rows_layout(problem.rows, problem.n).parts * static_cast<int64_t>(sizeof(double));
}

void rejection(const RejectionProblem& problem, int64_t bound_each, int64_t gamma_each, void* workspace,
               void* stream) {
  const char* op = "rejection";
  const Layout layout = rows_layout(problem.rows, problem.n);
  const int64_t blocks = problem.rows * layout.parts;
  double* largest = static_cast<double*>(workspace);
  int64_t* counts = reinterpret_cast<int64_t*>(largest + blocks);
  with_storage(problem.storage, [&](auto tag) {
    using T = decltype(tag);
    launch(op, largest_kernel<T>, blocks, kDrawThreads, stream, static_cast<const T*>(problem.log_ratio),
           problem.n, layout, largest);
    launch(op, rejection_kernel<T>, blocks, kDrawThreads, stream, problem,
           RejectionRows{bound_each, gamma_each}, layout, static_cast<const double*>(largest), counts);
  });
  launch(op, count_kernel, problem.rows, kDrawThreads, stream, static_cast<const int64_t*>(counts),
         layout.parts, problem.accepted);
}

int64_t metropolis_workspace(const MetropolisProblem& problem) {
  return rows_layout(1, problem.n).parts * static_cast<int64_t>(sizeof(double));
}

void metropolis(const MetropolisProblem& problem, const int64_t* seed, int64_t initial_each, void* workspace,
                void* stream) {
  const char* op = "metropolis";
  const Layout layout = rows_layout(1, problem.n);
  double* largest = static_cast<double*>(workspace);
  with_storage(problem.storage, [&](auto tag) {
    using T = decltype(tag);
    launch(op, largest_kernel<T>, layout.parts, kDrawThreads, stream,
           static_cast<const T*>(problem.log_ratio), problem.n, layout, largest);
    launch(op, metropolis_kernel<T>, ceil_div(problem.chains, kDrawThreads), kDrawThreads, stream, problem,
           MetropolisStart{seed, initial_each}, static_cast<const double*>(largest), layout.parts);
  });
}

}  // namespace refine_ext::cuda
