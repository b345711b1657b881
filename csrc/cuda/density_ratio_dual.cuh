// The elementwise functions of log-ratios, their sums, and the gradients. Bytes moved a float32 sample:
// dual_output and the bound's backward 8, dual_slope 8 (12 with an elementwise gradient), dual_bound 4, the
// backward of log r 12, and 8 more for the sums of a solved shift.
#pragma once

#include "density_ratio_passes.cuh"

namespace refine_ext::cuda {

// Only these forms have code of their own in csrc/math/divergence.h; the other powers share Form::power's.
constexpr Form dual_form(Form form) {
  switch (form) {
    case Form::exponential:
    case Form::reciprocal:
    case Form::logistic:
    case Form::lambert:
      return form;
    default:
      return Form::power;
  }
}

template <Form kForm, class C>
struct DualOutputPass : Pass {
  Family family;
  __device__ __forceinline__ C sample(const C* x) {
    family.form = kForm;
    return dual_output(family, x[0]);
  }
};

// x[1] is the upstream gradient, or one.
template <Form kForm, class C, bool kConjugate>
struct DualSlopePass : Pass {
  Family family;
  C scale;
  __device__ __forceinline__ C sample(const C* x) {
    family.form = kForm;
    return x[1] * scale * (kConjugate ? conjugate_slope(family, x[0]) : dual_slope(family, x[0]));
  }
};

template <Form kForm, class C, bool kConjugate>
struct DualSumPass : Pass {
  Family family;
  C part = C(0);
  double total = 0.0;
  template <int N>
  __device__ __forceinline__ void run(const C (&x)[N][1], C (&)[N]) {
    family.form = kForm;
    part += pairwise_sum<N>(
        [&](int i) { return kConjugate ? conjugate(family, x[i][0]) : dual_output(family, x[i][0]); });
  }
  __device__ __forceinline__ void flush() {
    total += static_cast<double>(part);
    part = C(0);
  }
};

template <Form kForm, class C>
__device__ __forceinline__ C factor_at(Family family, C log_ratio) {
  family.form = kForm;
  const C factor = score_factor(family, log_ratio);
  // Where the ratio is clipped to zero it does not move: c = 0, not k 0^c.
  return family.c < 0.0 && log_ratio == -std::numeric_limits<C>::infinity() ? C(0) : factor;
}

// Inputs: upstream gradient, log r, weight.
template <Form kForm, class C>
struct BackwardSumsPass : Pass {
  Family family;
  C part_through = C(0), part_slope = C(0);
  double through = 0.0, slope = 0.0;
  __device__ __forceinline__ C sample(const C* x) {
    const C c = factor_at<kForm>(family, x[1]), ratio = Arithmetic<C>::exp(x[1]);
    const C share = ratio == C(0) ? C(0) : ratio * c;
    // A clipped sample passes nothing on, whatever its upstream gradient (inf * 0); neither does one of
    // weight zero outside the domain, whose log r is NaN, unless it is asked for.
    part_slope += x[2] > C(0) ? share * x[2] : C(0);
    part_through += c == C(0) || x[0] == C(0) ? C(0) : c * x[0];
    return share;
  }
  __device__ __forceinline__ void flush() {
    through += static_cast<double>(part_through);
    slope += static_cast<double>(part_slope);
    part_through = part_slope = C(0);
  }
};

template <Form kForm, class C>
struct BackwardPass : Pass {
  Family family;
  C through_ratio;
  __device__ __forceinline__ C sample(const C* x) {
    const C c = factor_at<kForm>(family, x[1]);
    const C share = x[2] > C(0) ? Arithmetic<C>::exp(x[1]) * through_ratio * x[2] : C(0);
    const C total = x[0] + share;
    return c == C(0) || total == C(0) ? C(0) : c * total;
  }
};

// budget: registers 48 (16-bit 56, float64 80), shared 0, occupancy 62% (16-bit 50%, float64 37%), inputs
//     1, outputs 1,
//   instructions/sample 47 (float64 89, exponential 10, float64 exponential 16, reciprocal 20, float64
//     reciprocal 68, float64 logistic 227, lambert 41, float64 lambert 90),
//   special/sample 1 (exponential 0, float64 reciprocal 0, logistic 4, float64 logistic 2, float64 lambert
//     0),
//   float64/sample 0 (16-bit 1, float64 24, float64 exponential 1, float64 reciprocal 21, float64 logistic
//     79)
template <Form kForm, class T>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<T, typename ComputeOf<T>::type>)
    dual_output_kernel(const T* x, T* out, const int64_t n, const Layout layout, const Family family) {
  using C = typename ComputeOf<T>::type;
  const Team team = my_team(layout);
  if (team.row > 0) return;  // there is one row; a block of warps has teams for more
  DualOutputPass<kForm, C> pass{{}, family};
  for_samples<1, true, 1, C>({x}, out, n, team, pass);
}

// grad: like x; or row_grad, one value a row, float64 if wide.
// budget: registers 56 (float64 96), shared 0, occupancy 50% (float64 25%), inputs 2 (exponential 1,
//     exponential conjugate 2), outputs 1,
//   instructions/sample 22 (16-bit 24, float64 78, exponential 9, 16-bit exponential 10, float64
//     exponential 18, float64 logistic 106, conjugate exponential 22, 16-bit conjugate exponential 24,
//     float64 conjugate exponential 75, float64 conjugate logistic 107),
//   special/sample 1 (exponential 0, float64 reciprocal 0, logistic 2, float64 logistic 1, float64 lambert
//     0, conjugate exponential 1, float64 conjugate exponential 0),
//   float64/sample 0 (16-bit 1, float64 23, float64 logistic 28)
template <Form kForm, class T, bool kConjugate>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<T, typename ComputeOf<T>::type>)
    dual_slope_kernel(const T* x, const T* grad, const void* row_grad, const bool wide, T* out,
                      const int64_t rows, const int64_t n, const Layout layout, const Family family) {
  using C = typename ComputeOf<T>::type;
  const Team team = my_team(layout);
  if (team.row >= rows) return;
  double scale = 1.0;
  if (row_grad) {
    scale =
        wide ? static_cast<const double*>(row_grad)[team.row] : static_cast<const float*>(row_grad)[team.row];
  }
  const int64_t offset = team.row * n;
  DualSlopePass<kForm, C, kConjugate> pass{{}, family, static_cast<C>(scale)};
  const T* const inputs[2] = {x + offset, grad ? grad + offset : nullptr};
  for_samples<1, true, 2, C>(inputs, out + offset, n, team, pass);
}

// budget: registers 64 (float64 72), shared 128, occupancy 50% (float64 37%), inputs 1,
//   instructions/sample 44 (float64 83, exponential 6, float64 exponential 9, reciprocal 16, float64
//     reciprocal 50, float64 logistic 220, lambert 37, float64 lambert 85, float64 conjugate 84, conjugate
//     exponential 36, float64 conjugate exponential 84, conjugate reciprocal 6, float64 conjugate
//     reciprocal 9, float64 conjugate logistic 218, 16-bit conjugate lambert 34),
//   special/sample 1 (exponential 0, float64 reciprocal 0, logistic 4, float64 logistic 2, float64 lambert
//     0, conjugate exponential 1, float64 conjugate exponential 0, conjugate reciprocal 0),
//   float64/sample 0.4 (float64 24.3, float64 reciprocal 21.3, float64 logistic 82.3, float64 lambert 25.3)
template <Form kForm, class T, bool kConjugate>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<T, typename ComputeOf<T>::type>)
    dual_sum_kernel(const T* x, const int64_t rows, const int64_t n, const Layout layout, const Family family,
                    double* sums) {
  using C = typename ComputeOf<T>::type;
  const Team team = my_team(layout);
  if (team.row >= rows) return;
  DualSumPass<kForm, C, kConjugate> pass{{}, family};
  for_samples<kReadAhead<T>, false, 1, C>({x + team.row * n}, static_cast<T*>(nullptr), n, team, pass);
  double total[1] = {pass.total};
  reduce<Sum>(team, total);
  if (team.rank == 0) sums[team.row * layout.parts + team.part] = total[0];
}

// values[row] = mean of the real sums - mean of the fake ones; one warp a row.
struct MeanSums {
  const double* sums;
  int64_t parts, n;
};
__device__ __forceinline__ double mean_of(const MeanSums& mean, const Team& team) {
  double total[1] = {0.0};
  for (int64_t part = team.rank; part < mean.parts; part += team.size)
    total[0] += mean.sums[team.row * mean.parts + part];
  reduce<Sum>(team, total);
  return total[0] / static_cast<double>(mean.n);
}
// budget: registers 32, shared 0, occupancy 100%
template <class V>
__global__ void __launch_bounds__(kThreads)
    dual_bound_kernel(const MeanSums real, const MeanSums fake, V* values, const int64_t rows) {
  const Team team = my_team({kWarp, 1});
  if (team.row >= rows) return;
  const double bound = mean_of(real, team) - mean_of(fake, team);
  if (team.rank == 0) values[team.row] = static_cast<V>(bound);
}

// -grad r / n, the gradient of a bound with respect to the fake outputs: the envelope theorem, the shift's
// own movement does not count.
// budget: registers 48 (lambert 64, power 72, 16-bit 80, float64 88), shared 0, occupancy 62% (lambert 50%,
//     power 37%, 16-bit 37%, float64 25%), inputs 1, outputs 1,
//   instructions/sample 19 (16-bit exponential 20, float64 exponential 67, reciprocal 15, float64
//     reciprocal 38, inverse_square 16, float64 inverse_square 40, inverse_sqrt 12, 16-bit inverse_sqrt 13,
//     float64 inverse_sqrt 62, linear 13, 16-bit linear 14, float64 linear 22, power 300, 16-bit power 302,
//     float64 power 306, logistic 32, float64 logistic 162, lambert 128, float64 lambert 485),
//   special/sample 1 (float64 exponential 0, float64 inverse_sqrt 2, linear 0, power 3, lambert 11, float64
//     lambert 6),
//   float64/sample 0 (16-bit 0.5, float64 exponential 22, float64 reciprocal 11, float64 inverse_square 12,
//     float64 inverse_sqrt 19, float64 linear 5, float64 logistic 48, float64 lambert 173, power 113.2)
template <Form kForm, class T>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<T, Compute<kForm, T>, kForm>)
    bound_backward_kernel(const RowProblem problem, const Layout layout, const RatioStats* stats,
                          const void* grad, const bool wide) {
  using C = Compute<kForm, T>;
  const Team team = my_team(layout);
  if (team.row >= problem.rows) return;
  Family family = problem.family;
  family.form = kForm;
  const RowPointers<T> row = row_pointers<T>(problem, team.row);
  const double upstream = wide ? static_cast<const double*>(grad)[team.row]
                               : static_cast<double>(static_cast<const float*>(grad)[team.row]);
  const double scale = -upstream / static_cast<double>(problem.n);
  const RatioStats found = stats[team.row];
  if constexpr (kForm == Form::exponential) {
    Anchor anchor = fixed_anchor<C>(family, found.shift);
    anchor.low = found.anchor_low;
    ShiftPass<C, Output::ratio> pass(anchor, scale);
    for_samples<1, true, 1, C>({row.h}, row.out, problem.n, team, pass);
  } else {
    const Anchor anchor = problem.fixed ? fixed_anchor<C>(family, found.shift)
                                        : solved_anchor(family, found.anchor, found.log_max);
    WritePass<kForm, C, Output::ratio, false> pass(family, anchor, scale);
    for_samples<1, true, 1, C>({row.h}, row.out, problem.n, team, pass);
  }
}

template <class T>
struct BackwardRow {
  const T* inputs[3];
};
template <class T>
__device__ __forceinline__ BackwardRow<T> backward_row(const RowProblem& problem, const T* log_ratio,
                                                       const T* grad, int64_t row) {
  const T* weights = static_cast<const T*>(problem.weights);
  return {{grad + row * problem.n, log_ratio + row * problem.n,
           weights ? weights + row * problem.weight_stride : nullptr}};
}

// Three inputs and two sums take 80 registers.
// budget: registers 64 (16-bit 72, float64 88), shared 256, occupancy 50% (16-bit 37%, float64 25%), inputs
//     3,
//   instructions/sample 42 (16-bit 43, float64 124, exponential 30, 16-bit exponential 31, float64
//     exponential 85, logistic 32, 16-bit logistic 33, float64 logistic 88, float64 lambert 165),
//   special/sample 2 (exponential 1, float64 exponential 0, float64 reciprocal 0, logistic 1, float64
//     logistic 0, lambert 3, float64 lambert 1),
//   float64/sample 1 (float64 49.5, float64 exponential 27.5, float64 logistic 29.5, float64 lambert 55)
template <Form kForm, class T>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<T, typename ComputeOf<T>::type, Form::lambert>)
    backward_sums_kernel(const RowProblem problem, const Layout layout, const T* log_ratio, const T* grad,
                         double* sums) {
  using C = typename ComputeOf<T>::type;
  const Team team = my_team(layout);
  if (team.row >= problem.rows) return;
  const BackwardRow<T> row = backward_row(problem, log_ratio, grad, team.row);
  BackwardSumsPass<kForm, C> pass{{}, problem.family};
  for_samples<1, false, 3, C>(row.inputs, static_cast<T*>(nullptr), problem.n, team, pass);
  double totals[2] = {pass.through, pass.slope};
  reduce<Sum>(team, totals);
  if (team.rank != 0) return;
  double* mine = sums + 2 * (team.row * layout.parts + team.part);
  mine[0] = totals[0];
  mine[1] = totals[1];
}

// The derivation of through_ratio is beside the CPU's backward (csrc/cpu/density_ratio.cpp). sums == nullptr:
// the shift was given.
// budget: registers 64 (16-bit 80, float64 88), shared 256, occupancy 50% (16-bit 37%, float64 25%), inputs
//     3, outputs 1,
//   instructions/sample 49 (float64 129, exponential 35, 16-bit exponential 39, float64 exponential 105,
//     logistic 33, 16-bit logistic 34, float64 logistic 113, float64 lambert 183),
//   special/sample 2 (exponential 1, float64 exponential 0, float64 reciprocal 0, logistic 1, float64
//     logistic 0, lambert 3, float64 lambert 1),
//   float64/sample 0.8 (16-bit 1.3, float64 47, float64 exponential 25.5, float64 logistic 31, float64
//     lambert 53)
template <Form kForm, class T>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<T, typename ComputeOf<T>::type>)
    backward_kernel(const RowProblem problem, const Layout layout, const T* log_ratio, const T* grad,
                    const RatioStats* stats, const double* grad_stats, const double* sums) {
  using C = typename ComputeOf<T>::type;
  const Team team = my_team(layout);
  if (team.row >= problem.rows) return;
  const double* upstream = grad_stats + team.row * kStats;
  double through_ratio;
  if (sums) {
    double totals[2] = {0.0, 0.0};
    for (int64_t part = team.rank; part < layout.parts; part += team.size) {
      totals[0] += sums[2 * (team.row * layout.parts + part)];
      totals[1] += sums[2 * (team.row * layout.parts + part) + 1];
    }
    reduce<Sum>(team, totals);
    through_ratio = (upstream[0] - totals[0]) / totals[1];
  } else {
    through_ratio = upstream[1] * ::exp(-stats[team.row].log_sum);
  }
  const BackwardRow<T> row = backward_row(problem, log_ratio, grad, team.row);
  BackwardPass<kForm, C> pass{{}, problem.family, static_cast<C>(through_ratio)};
  T* out = static_cast<T*>(problem.out) + team.row * problem.n;
  for_samples<1, true, 3, C>(row.inputs, out, problem.n, team, pass);
}

}  // namespace refine_ext::cuda
