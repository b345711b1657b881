// Short rows: one launch, one team a row. The row is read again for every step of the search, from the
// caches: device memory sees each sample read once and each result written once, 8 bytes a float32 sample.
#pragma once

#include "density_ratio_ops.cuh"

namespace refine_ext::cuda {

// The other half of a variational bound; values == nullptr: none.
struct BoundArguments {
  const void* real;  // [rows, real_n]
  int64_t real_n;
  void* values;  // [rows], float64 if wide, else float32
  bool wide, tight;
};

template <class C>
struct SumPass : Pass {
  C part = C(0);
  double total = 0.0;
  template <int N>
  __device__ __forceinline__ void run(const C (&x)[N][1], C (&)[N]) {
    part += pairwise_sum<N>([&](int i) { return x[i][0]; });
  }
  __device__ __forceinline__ void flush() {
    total += static_cast<double>(part);
    part = C(0);
  }
};

__device__ __forceinline__ void write_bound(const BoundArguments& bound, const RatioStats& stats, int64_t row,
                                            double real_sum, double conjugate) {
  const double mean = real_sum / static_cast<double>(bound.real_n);
  const double value = mean - (bound.tight ? stats.shift : 0.0) - conjugate;
  // NaN statistics, of invalid outputs, make NaN here whether the shift counts or not.
  const double result = stats.shift == stats.shift ? value : stats.shift;
  if (bound.wide) {
    static_cast<double*>(bound.values)[row] = result;
  } else {
    static_cast<float*>(bound.values)[row] = static_cast<float>(result);
  }
}

__device__ __forceinline__ double mean_conjugate(const RowState& state, const RatioStats& stats,
                                                 const Family& family, double conjugate_sum) {
  if (family.form == Form::exponential) return ::exp(stats.log_sum - stats.log_weight);
  return conjugate_sum / state.weight + family.conjugate_offset;
}

template <class T>
struct RowPointers {
  const T* h;
  const T* weights;
  T* out;
};

template <class T>
__device__ __forceinline__ RowPointers<T> row_pointers(const RowProblem& problem, int64_t row) {
  const T* weights = static_cast<const T*>(problem.weights);
  T* out = static_cast<T*>(problem.out);
  return {static_cast<const T*>(problem.h) + row * problem.n,
          weights ? weights + row * problem.weight_stride : nullptr, out ? out + row * problem.n : nullptr};
}

// The sums of a pass over the row, by every thread of the team.
struct RowSums {
  double ratio, square, conjugate, largest;
};
template <class P>
__device__ __forceinline__ RowSums row_sums(const Team& team, const P& pass) {
  double sums[3] = {pass.ratio, pass.square, pass.conjugate}, largest[1] = {pass.largest_ratio()};
  reduce<Sum>(team, sums);
  reduce<Maximum>(team, largest);
  return {sums[0], sums[1], sums[2], largest[0]};
}

// Two values are parked in local memory between the loops of one kernel.
// budget: registers 128 (exponential 88, float64 120), local 0 (16-bit power 16), shared 3968 (exponential
//     3712), occupancy 25%, inputs 2, outputs 1,
//   instructions/sample 36 (float64 exponential 133, reciprocal 135, 16-bit reciprocal 137, float64
//     reciprocal 144, inverse_square 136, 16-bit inverse_square 137, float64 inverse_square 145,
//     inverse_sqrt 158, 16-bit inverse_sqrt 159, float64 inverse_sqrt 166, linear 38, 16-bit linear 41,
//     float64 linear 127, power 389, float64 power 395, logistic 74, float64 logistic 319, lambert 145,
//     16-bit lambert 146, float64 lambert 521),
//   special/sample 3 (linear 2, logistic 4, lambert 12.5, float64 exponential 0, float64 lambert 7),
//   float64/sample 6 (reciprocal 51, inverse_square 52, inverse_sqrt 59, linear 9, power 141.3, logistic 9,
//     lambert 9, float64 exponential 42, float64 inverse_square 48, float64 inverse_sqrt 55, float64 linear
//     40, float64 logistic 109, float64 lambert 188)
template <Form kForm, class T>
__global__ void __launch_bounds__(kMaxThreads)
    density_ratio_rows_kernel(const RowProblem problem, const Layout layout, RatioStats* stats,
                              const BoundArguments bound) {
  using S = typename ComputeOf<T>::type;
  using C = Compute<kForm, T>;
  const Team team = my_team(layout);
  if (team.row >= problem.rows) return;
  const RowPointers<T> row = row_pointers<T>(problem, team.row);
  const T* const inputs[2] = {row.h, row.weights};
  const int64_t n = problem.n;
  RowState& state = shared_state<kMaxWarps>(team);

  ScanPass<S, true> scan;
  for_samples<1, false, 2, S>(inputs, row.out, n, team, scan);
  ScanTotals totals = scan_totals(team, scan, n);
  if constexpr (kForm == Form::exponential) {
    const Anchor anchor = solved_anchor(problem.family, totals.maximum, 0.0);
    WritePass<kForm, S, Output::ratio, true> pass(problem.family, anchor, 1.0);
    for_samples<1, false, 2, S>(inputs, row.out, n, team, pass);
    const RowSums sums = row_sums(team, pass);
    totals.sum = sums.ratio;
    totals.square = sums.square;
    totals.largest = sums.largest;
  }
  if (team.rank == 0) state = begin_row<kForm, C>(problem, team.row, totals);
  synchronise(team);

  RowSums sums{0.0, 0.0, 0.0, 0.0};
  if constexpr (kForm != Form::exponential) {
    for (int step = 0; step < kMaxSteps && state.status == Status::searching; ++step) {
      double means[2];
      const auto mean_in = [&](auto number) {
        using N = decltype(number);
        MeanPass<kForm, N, true> pass(problem.family, state.anchor);
        for_samples<1, false, 2, N>(inputs, row.out, n, team, pass);
        means[0] = pass.ratio;
        means[1] = pass.moment;
      };
      if (base_underflows<kForm, C>(problem.family, state.anchor)) {
        if constexpr (kHoldsBase<kForm, C>) mean_in(double{});
      } else {
        mean_in(C{});
      }
      reduce<Sum>(team, means);
      // Every thread has read the state by now: it took the anchor before the reduction.
      synchronise(team);
      if (team.rank == 0) advance<kForm>(state, problem.family, means[0], means[1], problem.tolerance);
      synchronise(team);
    }
  }
  const bool valid = state.status == Status::settled;
  if (!valid) {
    if (row.out) fill_nan(row.out, n, team);
  } else if constexpr (kForm == Form::exponential) {
    if (problem.output == Output::log_ratio) {
      ShiftPass<S, Output::log_ratio> pass(state.anchor, 1.0);
      for_samples<1, true, 1, S>({row.h}, row.out, n, team, pass);
    } else if (problem.output == Output::ratio) {
      ShiftPass<S, Output::ratio> pass(state.anchor, 1.0);
      for_samples<1, true, 1, S>({row.h}, row.out, n, team, pass);
    }
  } else if (problem.output == Output::none) {
    WritePass<kForm, C, Output::none, true> pass(problem.family, state.anchor, 1.0);
    for_samples<1, false, 2, C>(inputs, row.out, n, team, pass);
    sums = row_sums(team, pass);
  } else {
    const auto write_in = [&](auto number) {
      using N = decltype(number);
      WritePass<kForm, N, Output::ratio, true, true> pass(problem.family, state.anchor, 1.0);
      pass.log_ratio = problem.output == Output::log_ratio;
      for_samples<1, true, 2, N>(inputs, row.out, n, team, pass);
      sums = row_sums(team, pass);
    };
    if (base_underflows<kForm, C>(problem.family, state.anchor)) {
      if constexpr (kHoldsBase<kForm, C>) write_in(double{});
    } else {
      write_in(C{});
    }
  }

  double real[1] = {0.0};
  if (bound.values) {
    SumPass<S> sum;
    for_samples<1, false, 1, S>({static_cast<const T*>(bound.real) + team.row * bound.real_n}, row.out,
                                bound.real_n, team, sum);
    real[0] = sum.total;
    reduce<Sum>(team, real);
  }
  if (team.rank != 0) return;
  const RatioStats result =
      finish_row(state, problem.family, problem.fixed, sums.ratio, sums.square, sums.largest);
  stats[team.row] = result;
  if (bound.values) {
    write_bound(bound, result, team.row, real[0],
                mean_conjugate(state, result, problem.family, sums.conjugate));
  }
}

}  // namespace refine_ext::cuda
