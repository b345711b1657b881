// Long rows: many blocks a row, a fixed sequence of launches and nothing read back by the host.
//
//   scan                 largest output, weight; for the exponential form the sums of exponentials too
//   guess                one block: takes a given shift, or solves for a subsample's
//   evaluate x kEvaluations   sums at the current shift; the blocks return at once when it is found (solved
//   only) settle               one block: ends the search where those were not enough (solved only) write the
//   result and its sums finish               one block: statistics from those sums
//
// A launch leaves one partial sum a block. The next launch begins with every block adding these up and taking
// the same step from them, so that the edge between two launches is the only synchronisation: no atomics, no
// fences, the same bits on every run. Partial sums and states alternate between two buffers, one read and one
// written by a launch.
//
// Bytes moved a float32 sample: exponential form, or a given shift, 4 (scan) + 8 (write); solved shift 4 + 2
// x 4 + 8, two evaluations being what Newton takes from a subsample's guess.
#pragma once

#include "density_ratio_rows.cuh"

namespace refine_ext::cuda {

inline constexpr int kThreads = 256;
inline constexpr int kEvaluations = 5;
inline constexpr int kPartials = 6;
// Where the search leaves the state: the slot of the first guess, so that a given shift can skip what is
// between.
inline constexpr int kFinalSlot = 0;
static_assert((kEvaluations + 1) % 2 == kFinalSlot);
inline constexpr int kGuessThreads = kMaxThreads;
inline constexpr int kGuessRun = 16;  // consecutive samples of one thread
inline constexpr int kSubsample = kGuessThreads * kGuessRun;

// Scratch memory of one call, carved from one allocation.
struct Workspace {
  RowState* states;  // [2][rows]
  double* partials;  // [2][rows][parts][kPartials]
  double* maxima;    // [rows][parts * kThreads]: each thread's largest output, for the guess
  double* real;      // [rows][real_parts]: sums over the real outputs of a bound
  int64_t rows, parts, real_parts;

  __device__ __forceinline__ RowState& state(int slot, int64_t row) const {
    return states[slot * rows + row];
  }
  __device__ __forceinline__ double* partial(int slot, int64_t row, int64_t part) const {
    return partials + ((slot * rows + row) * parts + part) * kPartials;
  }
};

// Packs on their way to a thread at a time. A pass that only reads one input needs 32 bytes in flight to keep
// the memory busy; two inputs, or reads that share it with writes, do with a pack each, and so do the forms
// that wait for their arithmetic.
template <class T, Form kForm = Form::exponential>
inline constexpr int kReadAhead = sizeof(T) >= 4 && kForm != Form::power && kForm != Form::lambert ? 2 : 1;

// Blocks that share a multiprocessor, which sets the registers of a thread: 64; 80 for the eight samples of a
// 16-bit pack and for the lambert form, which waits for its arithmetic anyway; 128 for float64.
template <class T, class C, Form kForm = Form::exponential>
inline constexpr int kResidentBlocks = sizeof(C) == 8                             ? 2
                                       : sizeof(T) == 2 || kForm == Form::lambert ? 3
                                                                                  : 4;

// budget: registers 48 (exponential 56, weighted 64, 16-bit 72, float64 72), shared 256 (weighted 384,
//     exponential 640, weighted exponential 768), occupancy 62% (exponential 50%, weighted 50%, 16-bit 37%,
//     float64 37%), inputs 1 (weighted 2),
//   instructions/sample 5 (float64 11, weighted 18, 16-bit weighted 19, float64 weighted 23, exponential
//     18, 16-bit exponential 19, float64 exponential 72, weighted exponential 42, float64 weighted
//     exponential 120),
//   special/sample 0 (exponential 1.2, weighted exponential 1.3, float64 exponential 0),
//   float64/sample 0 (float64 2, weighted 2, float64 weighted 6, exponential 1, float64 exponential 29.3,
//     weighted exponential 8.3, 16-bit weighted exponential 7.7, float64 weighted exponential 41.5)
template <class T, bool kWeighted, bool kExponential>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<T, typename ComputeOf<T>::type>)
    scan_kernel(const RowProblem problem, const Layout layout, const Workspace work) {
  using S = typename ComputeOf<T>::type;
  constexpr int kInputs = kWeighted ? 2 : 1;
  const Team team = my_team(layout);
  const RowPointers<T> row = row_pointers<T>(problem, team.row);
  const T* inputs[kInputs];
  inputs[0] = row.h;
  if constexpr (kWeighted) inputs[1] = row.weights;
  double* partial = work.partial(0, team.row, team.part);
  ScanTotals totals;
  if constexpr (kExponential) {
    OnlineScanPass<S, kWeighted> pass;
    for_samples<kWeighted ? 1 : kReadAhead<T>, false, kInputs, S>(inputs, row.out, problem.n, team, pass);
    totals = scan_totals(team, pass.scan, 0);
    merge_exponentials(team, static_cast<double>(pass.reference), pass.sum, pass.square, pass.largest,
                       totals);
  } else {
    ScanPass<S, kWeighted> pass;
    for_samples<kWeighted ? 1 : kReadAhead<T>, false, kInputs, S>(inputs, row.out, problem.n, team, pass);
    if (work.maxima) {
      work.maxima[(team.row * work.parts + team.part) * kThreads + team.rank] =
          static_cast<double>(pass.best);
    }
    totals = scan_totals(team, pass, 0);
  }
  if (team.rank != 0) return;
  partial[0] = totals.maximum;
  partial[1] = totals.weight;
  partial[2] = totals.invalid;
  partial[3] = totals.sum;
  partial[4] = totals.square;
  partial[5] = totals.largest;
}

// The parts of a row put together, by a whole block.
template <bool kExponential>
__device__ __forceinline__ ScanTotals gather_scan(const RowProblem& problem, const Workspace& work,
                                                  const Team& team) {
  double maxima[2] = {-std::numeric_limits<double>::infinity(), 0.0}, weight[1] = {0.0};
  for (int64_t part = team.rank; part < work.parts; part += team.size) {
    const double* partial = work.partial(0, team.row, part);
    maxima[0] = Maximum::merge(maxima[0], partial[0]);
    maxima[1] = Maximum::merge(maxima[1], partial[2]);
    weight[0] += partial[1];
  }
  reduce<Maximum>(team, maxima);
  reduce<Sum>(team, weight);
  ScanTotals totals{
      maxima[0], problem.weights ? weight[0] : static_cast<double>(problem.n), maxima[1], 0.0, 0.0, 0.0};
  if constexpr (kExponential) {
    double sums[2] = {0.0, 0.0}, largest[1] = {0.0};
    for (int64_t part = team.rank; part < work.parts; part += team.size) {
      const double* partial = work.partial(0, team.row, part);
      if (!(partial[3] > 0.0)) continue;
      const double shrink = ::exp(partial[0] - totals.maximum);
      sums[0] += partial[3] * shrink;
      sums[1] += partial[4] * shrink * shrink;
      largest[0] = Maximum::merge(largest[0], partial[5] * shrink);
    }
    reduce<Sum>(team, sums);
    reduce<Maximum>(team, largest);
    totals.sum = sums[0];
    totals.square = sums[1];
    totals.largest = largest[0];
  }
  return totals;
}

template <Form kForm, class C>
__device__ __forceinline__ RowState& gather_row(const RowProblem& problem, const Workspace& work,
                                                const Team& team) {
  const ScanTotals totals = gather_scan<kForm == Form::exponential>(problem, work, team);
  RowState& state = shared_state<1>(team);
  if (team.rank == 0) state = begin_row<kForm, C>(problem, team.row, totals);
  __syncthreads();
  return state;
}

// One sample of any storage type; for the kernels that read few.
template <class C>
__device__ __forceinline__ C sample_at(const void* data, Storage storage, int64_t i) {
  switch (storage) {
    case Storage::float64:
      return static_cast<C>(static_cast<const double*>(data)[i]);
    case Storage::float16:
      return static_cast<C>(widen(static_cast<const Half*>(data)[i]));
    case Storage::bfloat16:
      return static_cast<C>(widen(static_cast<const BFloat16*>(data)[i]));
    default:
      return static_cast<C>(static_cast<const float*>(data)[i]);
  }
}

// Moves the search to the shift of a subsample, which stays in registers. The ratios' mass can lie in a
// handful of extreme samples that a subsample misses: those beyond its maximum are taken from the threads'
// maxima of the scan, where nearly each has a thread to itself. Each thread packs its share of them in place.
// Some of that goes to local memory in float64, where it is read once a step of the search.
// budget: registers 128, local 0 (C=float64 48), shared 816, occupancy 25%
template <Form kForm, class C>
__global__ void __launch_bounds__(kGuessThreads, 1)
    guess_kernel(const RowProblem problem, const Workspace work) {
  const Team team = my_team({kGuessThreads, 1});
  RowState& state = gather_row<kForm, C>(problem, work, team);
  RowState& result = work.state(0, team.row);
  if (team.rank == 0) result = state;
  if (state.status != Status::searching || problem.n < 2 * kSubsample) return;

  const int64_t offset = team.row * problem.n, from = problem.n / kGuessThreads * team.rank;
  C x[kGuessRun][2], y[kGuessRun];
  ScanPass<C, true> scan;
#pragma unroll
  for (int j = 0; j < kGuessRun; ++j) {
    x[j][0] = sample_at<C>(problem.h, problem.storage, offset + from + j);
    x[j][1] = problem.weights ? sample_at<C>(problem.weights, problem.storage,
                                             team.row * problem.weight_stride + from + j)
                              : C(1);
  }
  scan.run(x, y);
  const ScanTotals sampled = scan_totals(team, scan, 0);
  if (!(sampled.weight > 0.0)) return;

  double* extremes = work.maxima + team.row * work.parts * kThreads;
  const int64_t candidates = work.parts * kThreads;
  int64_t mine = 0;
  for (int64_t i = team.rank; i < candidates; i += team.size) {
    const double value = extremes[i];
    if (value > sampled.maximum) extremes[team.rank + team.size * mine++] = value;
  }
  double found[1] = {static_cast<double>(mine)};
  reduce<Sum>(team, found);
  const double mean_weight = sampled.weight / kSubsample;  // the extremes' own weights were not kept
  const double share = (static_cast<double>(problem.n) - found[0]) / kSubsample;
  if (team.rank == 0) state.weight = share * sampled.weight + mean_weight * found[0];

  for (int step = 0; step < kMaxSteps && state.status == Status::searching; ++step) {
    MeanPass<kForm, C, true> bulk(problem.family, state.anchor);
    MeanPass<kForm, C, false> rare(problem.family, state.anchor);
    bulk.run(x, y);
    for (int64_t i = 0; i < mine; ++i) {
      const C extreme[1][1] = {{static_cast<C>(extremes[team.rank + team.size * i])}};
      C ratio[1];
      rare.run(extreme, ratio);
      rare.flush();
    }
    double sums[2] = {share * bulk.ratio + mean_weight * rare.ratio,
                      share * bulk.moment + mean_weight * rare.moment};
    reduce<Sum>(team, sums);
    __syncthreads();
    if (team.rank == 0) advance<kForm>(state, problem.family, sums[0], sums[1], 1e-6);
    __syncthreads();
  }
  // Only the place is taken over: the brackets of a subsample do not hold for the row.
  if (team.rank == 0 && state.status == Status::settled && is_finite(state.search.log_max)) {
    result.search.log_max = state.search.log_max;
    result.anchor = state.anchor;
  }
}

// The state at launch `index` of the search: what the last one left, one step on.
template <Form kForm>
__device__ __forceinline__ RowState& next_state(const RowProblem& problem, const Workspace& work,
                                                const Team& team, int index) {
  RowState& state = shared_state<1>(team);
  if (team.rank == 0) state = work.state(index % 2, team.row);
  __syncthreads();
  if (index == 0 || state.status != Status::searching) return state;
  double sums[2] = {0.0, 0.0};
  for (int64_t part = team.rank; part < work.parts; part += team.size) {
    const double* partial = work.partial(index % 2, team.row, part);
    sums[0] += partial[0];
    sums[1] += partial[1];
  }
  reduce<Sum>(team, sums);
  if (team.rank == 0) advance<kForm>(state, problem.family, sums[0], sums[1], problem.tolerance);
  __syncthreads();
  return state;
}

// On sm_80 a value is parked in local memory before the loop rather than lose a resident block.
// budget: registers 64 (weighted 72, 16-bit 80, power 96, float64 88), local 0 (weighted inverse_sqrt 8),
//     shared 432, occupancy 50% (weighted 37%, 16-bit 37%, power 25%, float64 25%), inputs 1 (weighted 2),
//   instructions/sample 13 (float64 reciprocal 32, inverse_square 14, float64 inverse_square 33, float64
//     inverse_sqrt 60, float64 linear 18, power 338, float64 power 344, logistic 30, float64 logistic 159,
//     lambert 129, float64 lambert 499, weighted reciprocal 26, 16-bit weighted reciprocal 27, float64
//     weighted reciprocal 45, weighted inverse_square 27, float64 weighted inverse_square 46, weighted
//     inverse_sqrt 25, float64 weighted inverse_sqrt 69, weighted linear 25, float64 weighted linear 33,
//     weighted power 350, float64 weighted power 360, weighted logistic 43, 16-bit weighted logistic 44,
//     float64 weighted logistic 174, weighted lambert 144, float64 weighted lambert 520),
//   special/sample 1 (linear 0, power 3, lambert 12.2, float64 inverse_sqrt 2, float64 lambert 7),
//   float64/sample 1 (weighted 7, 16-bit 7, power 133.8, weighted power 137.3, float64 reciprocal 16,
//     float64 inverse_square 17, float64 inverse_sqrt 25, float64 linear 10, float64 power 135.5, float64
//     logistic 53, float64 lambert 188)
template <Form kForm, class T, bool kWeighted>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<T, Compute<kForm, T>, kForm>)
    evaluate_kernel(const RowProblem problem, const Layout layout, const Workspace work, const int index) {
  using C = Compute<kForm, T>;
  constexpr int kInputs = kWeighted ? 2 : 1;
  const Team team = my_team(layout);
  const RowState& state = next_state<kForm>(problem, work, team, index);
  const bool deferred =
      state.status == Status::searching && base_underflows<kForm, C>(problem.family, state.anchor);
  if (team.part == 0 && team.rank == 0) {
    RowState& next = work.state((index + 1) % 2, team.row);
    next = state;
    if (deferred) next.status = Status::deferred;
  }
  if (deferred || state.status != Status::searching) return;
  const RowPointers<T> row = row_pointers<T>(problem, team.row);
  const T* inputs[kInputs];
  inputs[0] = row.h;
  if constexpr (kWeighted) inputs[1] = row.weights;
  MeanPass<kForm, C, kWeighted> pass(problem.family, state.anchor);
  for_samples<kWeighted ? 1 : kReadAhead<T, kForm>, false, kInputs, C>(inputs, row.out, problem.n, team,
                                                                       pass);
  double sums[2] = {pass.ratio, pass.moment};
  reduce<Sum>(team, sums);
  if (team.rank != 0) return;
  double* partial = work.partial((index + 1) % 2, team.row, team.part);
  partial[0] = sums[0];
  partial[1] = sums[1];
}

// In float64 for every storage type: it seldom has anything to do, and is compiled once.
// budget: registers 96, shared 432, occupancy 25%
template <Form kForm>
__global__ void __launch_bounds__(kMaxThreads, 1)
    settle_kernel(const RowProblem problem, const Workspace work) {
  const Team team = my_team({kMaxThreads, 1});
  RowState& state = next_state<kForm>(problem, work, team, kEvaluations);
  if (team.rank == 0 && state.status == Status::deferred) state.status = Status::searching;
  __syncthreads();
  for (int step = 0; step < kMaxSteps && state.status == Status::searching; ++step) {
    MeanPass<kForm, double, true> pass(problem.family, state.anchor);
    for (int64_t i = team.rank; i < problem.n; i += team.size) {
      const double x[1][2] = {{sample_at<double>(problem.h, problem.storage, team.row * problem.n + i),
                               problem.weights ? sample_at<double>(problem.weights, problem.storage,
                                                                   team.row * problem.weight_stride + i)
                                               : 1.0}};
      double ratio[1];
      pass.run(x, ratio);
    }
    double sums[2] = {pass.ratio, pass.moment};
    reduce<Sum>(team, sums);
    __syncthreads();
    if (team.rank == 0) advance<kForm>(state, problem.family, sums[0], sums[1], problem.tolerance);
    __syncthreads();
  }
  if (team.rank == 0) {
    if (state.status == Status::searching) state.status = Status::invalid;
    work.state(kFinalSlot, team.row) = state;
  }
}

// What begins the pass that writes: the settled state, or for the exponential form, which needs no search,
// the scan's.
template <Form kForm, class C>
__device__ __forceinline__ RowState& final_state(const RowProblem& problem, const Workspace& work,
                                                 const Team& team) {
  if constexpr (kForm == Form::exponential) return gather_row<kForm, C>(problem, work, team);
  return work.state(kFinalSlot, team.row);
}

// N is what the formula is evaluated in: of a form that holds g, weighted rows where float32 cannot are left
// to the kernel with N = double, and the other way round. kWeighted: the sums in float64, which a given shift
// needs too, since its ratios may be anything.
// budget: registers 64 (lambert 80, 16-bit 80, N=float64 104), shared 512 (exponential 944), occupancy 50%
//     (lambert 37%, 16-bit 37%, N=float64 25%), inputs 1 (weighted 2), outputs 1 (none 0),
//   instructions/sample 27 (inverse_square 19, 16-bit inverse_square 20, logistic 35, 16-bit logistic 36,
//     lambert 132, log_ratio exponential 10, log_ratio reciprocal 30, log_ratio inverse_square 31,
//     log_ratio inverse_sqrt 28, log_ratio linear 28, log_ratio logistic 48, none logistic 58, weighted
//     reciprocal 42, weighted inverse_square 43, weighted inverse_sqrt 40, weighted linear 41, weighted
//     logistic 59, weighted lambert 143, weighted none inverse_square 31, 16-bit weighted none
//     inverse_square 33, weighted none linear 30, 16-bit weighted none linear 31, weighted none logistic
//     73, weighted none lambert 145, N=float64 exponential 64, N=float64 reciprocal 144, N=float64
//     inverse_square 146, N=float64 inverse_sqrt 168, N=float64 linear 126, N=float64 power 331, N=float64
//     logistic 271, N=float64 lambert 510, N=float64 none inverse_square 50, N=float64 none inverse_sqrt
//     79, N=float64 none linear 34, N=float64 none power 396, N=float64 none logistic 319),
//   special/sample 2 (N=float64 exponential 0, reciprocal 3, inverse_square 3, inverse_sqrt 3, N=float64
//     power 3, logistic 3, lambert 11.2, N=float64 lambert 6, log_ratio exponential 0, none inverse_square
//     1, N=float64 none inverse_sqrt 2, none linear 0, none logistic 4),
//   float64/sample 1 (exponential 0, 16-bit 1.5, none 1.5, 16-bit none 0.8, weighted 7, weighted none 9,
//     N=float64 exponential 21, N=float64 reciprocal 51, N=float64 inverse_square 52, N=float64
//     inverse_sqrt 59, N=float64 linear 40, N=float64 power 118.2, N=float64 logistic 84, N=float64 lambert
//     176, N=float64 none inverse_square 20, N=float64 none inverse_sqrt 28, N=float64 none linear 13,
//     N=float64 none power 142.3, N=float64 none logistic 109, N=float64 none lambert 180)
template <Form kForm, class T, Output kOutput, bool kWeighted, class N>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<T, N, kForm>)
    write_kernel(const RowProblem problem, const Layout layout, const Workspace work, RatioStats* stats) {
  using S = typename ComputeOf<T>::type;
  using C = Compute<kForm, T>;
  const Team team = my_team(layout);
  const RowState& state = final_state<kForm, C>(problem, work, team);
  const RowPointers<T> row = row_pointers<T>(problem, team.row);
  constexpr bool kWide = sizeof(N) > sizeof(C);
  if (base_underflows<kForm, C>(problem.family, state.anchor) != kWide) return;
  if (kForm == Form::exponential && team.part == 0 && team.rank == 0) {
    stats[team.row] = state.status == Status::settled ? state.stats : invalid_stats();
  }
  if (state.status != Status::settled) {
    if (row.out) fill_nan(row.out, problem.n, team);
    return;
  }
  if constexpr (kForm == Form::exponential) {
    ShiftPass<S, kOutput> pass(state.anchor, 1.0);
    for_samples<1, true, 1, S>({row.h}, row.out, problem.n, team, pass);
  } else {
    constexpr bool kWrite = kOutput != Output::none;
    // Weighted, log r or r is a choice at run time, beside which reading the weights costs more.
    WritePass<kForm, N, kOutput, kWeighted, kWeighted && kWrite> pass(problem.family, state.anchor, 1.0);
    if constexpr (kWeighted) {
      pass.log_ratio = problem.output == Output::log_ratio;
      for_samples<1, kWrite, 2, N>({row.h, row.weights}, row.out, problem.n, team, pass);
    } else {
      for_samples<kWrite ? 1 : kReadAhead<T, kForm>, kWrite, 1, N>({row.h}, row.out, problem.n, team, pass);
    }
    const RowSums sums = row_sums(team, pass);
    if (team.rank != 0) return;
    double* partial = work.partial(1, team.row, team.part);
    partial[0] = sums.ratio;
    partial[1] = sums.square;
    partial[2] = sums.conjugate;
    partial[3] = sums.largest;
  }
}

// Sums over real outputs, for finish_kernel.
// budget: registers 48, shared 128, occupancy 62%, inputs 1,
//   instructions/sample 5 (float64 9),
//   special/sample 0,
//   float64/sample 0.3 (float64 1.3)
template <class T>
__global__ void __launch_bounds__(kThreads, 4)
    real_sum_kernel(const BoundArguments bound, const Layout layout, const int64_t rows, double* sums) {
  using S = typename ComputeOf<T>::type;
  const Team team = my_team(layout);
  if (team.row >= rows) return;
  const T* const inputs[1] = {static_cast<const T*>(bound.real) + team.row * bound.real_n};
  SumPass<S> pass;
  for_samples<kReadAhead<T>, false, 1, S>(inputs, static_cast<T*>(nullptr), bound.real_n, team, pass);
  double total[1] = {pass.total};
  reduce<Sum>(team, total);
  if (team.rank == 0) sums[team.row * layout.parts + team.part] = total[0];
}

// One block a row; C only says where the given shift of an exponential form was rounded.
// budget: registers 48, shared 1456, occupancy 62%
template <class C>
__global__ void __launch_bounds__(kThreads) finish_kernel(const RowProblem problem, const Workspace work,
                                                          RatioStats* stats, const BoundArguments bound) {
  const Team team = my_team({kThreads, 1});
  const bool exponential = problem.family.form == Form::exponential;
  const RowState& state =
      exponential ? gather_row<Form::exponential, C>(problem, work, team) : work.state(kFinalSlot, team.row);
  double sums[4] = {0.0, 0.0, 0.0, 0.0}, largest[1] = {0.0};
  for (int64_t part = team.rank; part < work.parts && !exponential; part += team.size) {
    const double* partial = work.partial(1, team.row, part);
    for (int k = 0; k < 3; ++k) sums[k] += partial[k];
    largest[0] = Maximum::merge(largest[0], partial[3]);
  }
  for (int64_t part = team.rank; part < work.real_parts; part += team.size) {
    sums[3] += work.real[team.row * work.real_parts + part];
  }
  reduce<Sum>(team, sums);
  reduce<Maximum>(team, largest);
  if (team.rank != 0) return;
  const RatioStats result = finish_row(state, problem.family, problem.fixed, sums[0], sums[1], largest[0]);
  stats[team.row] = result;
  if (bound.values) {
    write_bound(bound, result, team.row, sums[3], mean_conjugate(state, result, problem.family, sums[2]));
  }
}

}  // namespace refine_ext::cuda
