// What the compute type cannot hold, once more in float64 and one by one. Rows whose sums are not finite:
// scales that it cannot square, differences that overflow; and rows without any centre, or with NaN, which
// stay so. Gradients where float32 would square a scale below kLeastScale, or a row's value is extreme.
#pragma once

#include "log_mixture_tile.cuh"
#include "reduce.cuh"

namespace refine_ext::cuda {

inline constexpr double kLeastScale = 1e-12, kMostValue = 1e12;
inline constexpr int kExtremeBlocks = 128;

// A logarithm that, multiplied by log2(e) and rounded, says nothing exact any more of a sum of weights.
__device__ __forceinline__ bool is_extreme(double value) {
  return (value > kMostValue || value < -kMostValue) && value - value == 0.0;
}

__device__ __forceinline__ double exact_exponent(const MixtureInputs& in, int64_t row, int64_t j) {
  if (in.exclude && in.exclude[row] == j) return -kInfinity<double>;
  double sum = 0.0;
  const bool per_dimension = in.scale_kind == MixtureScale::per_dimension;
  double scale = per_dimension ? 1.0 : scale_of<double>(in, j);
  for (int64_t k = 0; k < in.d; ++k) {
    if (per_dimension) scale = compute_element<double>(in.scale, in.storage, j * in.d + k);
    // An infinite distance, from a row at infinity too.
    const double y = finite_or(element<double>(in.centers, in.storage, j * in.d + k), kFar<double>);
    const double z = (element<double>(in.x, in.storage, row * in.d + k) - y) / scale;
    sum += z * z;
  }
  return log2_weight_of<double>(in, j) - 0.5 * kLog2E * sum;
}

// Of a row, by the whole block: a thread has a run of the centres, and these are merged in their order.
__device__ __forceinline__ MixtureState exact_state(const MixtureInputs& in, int64_t row,
                                                    MixtureState (&parts)[kMixtureThreads]) {
  const int own = static_cast<int>(threadIdx.x);
  const int64_t each = (in.n + kMixtureThreads - 1) / kMixtureThreads;
  MixtureState state;
  for (int64_t j = own * each; j < (own + 1) * each && j < in.n; ++j) {
    MixtureState one;
    one.largest = exact_exponent(in, row, j);
    one.index = one.largest == one.reference ? -1 : j;
    one.reference = one.largest;
    one.sum = one.squares = one.index < 0 ? 0.0 : 1.0;
    if (one.largest != one.largest) one.sum = one.squares = one.largest;
    state = merged(state, one);
    if (state.sum != state.sum) break;
  }
  __syncthreads();
  parts[own] = state;
  __syncthreads();
  MixtureState all = parts[0];
  for (int t = 1; t < kMixtureThreads; ++t) all = merged(all, parts[t]);
  return all;
}

// A block: kMixtureThreads rows, of which it works on those that need it. What is kept across divisions and
// powers is in local memory.
// budget: registers 64, local 8, shared 7232, occupancy 50%
__global__ void __launch_bounds__(kMixtureThreads) mixture_exact_kernel(const LogMixtureProblem p) {
  REFINE_EXT_SHARED(int64_t, wanted, [kMixtureThreads]);
  REFINE_EXT_SHARED(MixtureState, parts, [kMixtureThreads]);
  REFINE_EXT_SHARED(double, weights, [kMixtureThreads]);
  const MixtureInputs& in = p.in;
  const Team team = my_team({kMixtureThreads, 1});
  const int own = team.rank;
  const int64_t mine = team.row * kMixtureThreads + own;
  const double value = mine < in.m ? p.value[mine] : 0.0;
  const bool bad = !(value - value == 0.0) || is_extreme(value);
  int count;
  const int place = running_sum(team, bad ? 1 : 0, count) - 1;
  if (bad) wanted[place] = mine;
  __syncthreads();
  for (int w = 0; w < count; ++w) {
    const int64_t row = wanted[w];
    const MixtureState all = exact_state(in, row, parts);
    const bool some = all.sum > 0.0;
    const double nan = std::numeric_limits<double>::quiet_NaN();
    if (own == 0) {
      p.value[row] = mixture_value(all);
      if (p.stats) {
        p.stats[2 * row] = some ? mixture_top_weight(all) : nan;
        p.stats[2 * row + 1] = some ? mixture_effective(all) : nan;
        p.top[row] = all.index;
      }
    }
    for (int64_t k0 = 0; p.mean && k0 < in.d; k0 += kMixtureThreads) {
      const int64_t k = k0 + own;
      double mean = some ? 0.0 : nan;
      for (int64_t first = 0; some && first < in.n; first += kMixtureThreads) {
        const int64_t j = first + own;
        __syncthreads();
        weights[own] =
            j < in.n ? power_of_difference(exact_exponent(in, row, j), all.reference) / all.sum : 0.0;
        __syncthreads();
        for (int o = 0; k < in.d && o < kMixtureThreads && first + o < in.n; ++o) {
          if (weights[o] != 0.0)
            mean += weights[o] * element<double>(in.centers, in.storage, (first + o) * in.d + k);
        }
      }
      const Storage storage = in.storage == Storage::float64 ? Storage::float64 : Storage::float32;
      if (k < in.d) store_element(mean, p.mean, storage, row * in.d + k);
    }
    __syncthreads();
  }
}

// For each block whether it found a scale, and a value, that gradients in float32 cannot do with.
// budget: registers 40, shared 128, occupancy 75%
__global__ void __launch_bounds__(kMixtureThreads)
    mixture_extremes_kernel(const LogMixtureBackwardProblem p, int* extremes) {
  const MixtureInputs& in = p.in;
  const Team team = my_team({kMixtureThreads, 1});
  const int64_t scales = in.scale_kind == MixtureScale::shared       ? 1
                         : in.scale_kind == MixtureScale::per_center ? in.n
                                                                     : in.n * in.d;
  int found[2] = {0, 0};
  const int64_t first = team.row * kMixtureThreads + team.rank;
  for (int64_t i = first; i < scales; i += kExtremeBlocks * kMixtureThreads)
    found[0] |=
        in.storage != Storage::float64 && compute_element<double>(in.scale, in.storage, i) < kLeastScale;
  for (int64_t i = first; i < in.m; i += kExtremeBlocks * kMixtureThreads) found[1] |= is_extreme(p.value[i]);
  reduce<Sum>(team, found);
  if (team.rank < 2) extremes[2 * team.row + team.rank] = team.rank == 0 ? found[0] : found[1];
}

struct RowReference {
  double reference, rest;
};

__device__ __forceinline__ bool any_extreme(const Team& team, const int* extremes, bool& any_scale) {
  int found[2] = {extremes[2 * team.rank], extremes[2 * team.rank + 1]};
  reduce<Sum>(team, found);
  any_scale = found[0] > 0;
  return found[0] + found[1] > 0;
}

// Every row's logarithm, where any extreme was found: its reference and what that leaves, since their sum is
// rounded by many powers of two.
// budget: registers 64, shared 5248, occupancy 50%
__global__ void __launch_bounds__(kMixtureThreads)
    mixture_exact_values_kernel(const MixtureInputs in, const int* extremes, RowReference* rows) {
  REFINE_EXT_SHARED(MixtureState, parts, [kMixtureThreads]);
  const Team team = my_team({kMixtureThreads, 1});
  bool any_scale;
  if (!any_extreme(team, extremes, any_scale)) return;
  for (int64_t row = team.row; row < in.m; row += kExtremeBlocks) {
    const MixtureState state = exact_state(in, row, parts);
    if (team.rank == 0) rows[row] = {state.reference, ::log2(state.sum)};
  }
}

__device__ __forceinline__ double exact_weight(const LogMixtureBackwardProblem& p, const RowReference* rows,
                                               int64_t row, int64_t j) {
  if (p.grad[row] == 0.0 || rows[row].reference == -kInfinity<double>) return 0.0;
  return p.grad[row] * ::exp2((exact_exponent(p.in, row, j) - rows[row].reference) - rows[row].rest);
}

__device__ __forceinline__ double exact_scale(const MixtureInputs& in, int64_t j, int64_t k) {
  return in.scale_kind == MixtureScale::per_dimension
             ? compute_element<double>(in.scale, in.storage, j * in.d + k)
             : scale_of<double>(in, j);
}

// A block an owner at a time: a row, or a centre. Gradients of those that need it take the place of
// float32's; of a scale that all share, a centre's part.
// budget: registers 72 (centers 80), shared 1152 (centers 1280), occupancy 43% (centers 37%)
template <bool kCenters>
__global__ void __launch_bounds__(kMixtureThreads)
    mixture_exact_gradient_kernel(const LogMixtureBackwardProblem p, const int* extremes,
                                  const RowReference* rows, double* scale_parts) {
  REFINE_EXT_SHARED(double, weights, [kMixtureThreads]);
  const MixtureInputs& in = p.in;
  const Team team = my_team({kMixtureThreads, 1});
  bool any_scale;
  if (!any_extreme(team, extremes, any_scale)) return;
  const int64_t owners = kCenters ? in.n : in.m, others = kCenters ? in.m : in.n;
  const Storage compute = in.storage == Storage::float64 ? Storage::float64 : Storage::float32;
  for (int64_t o = team.row; o < owners; o += kExtremeBlocks) {
    if (!kCenters && !any_scale && !is_extreme(p.value[o])) continue;
    double squares[1] = {0.0}, total[1] = {0.0};
    for (int64_t k0 = 0; k0 < in.d; k0 += kMixtureThreads) {
      const int64_t k = k0 + team.rank;
      double sum = 0.0, square = 0.0;
      for (int64_t first = 0; first < others; first += kMixtureThreads) {
        const int64_t other = first + team.rank;
        __syncthreads();
        weights[team.rank] =
            other < others ? exact_weight(p, rows, kCenters ? other : o, kCenters ? o : other) : 0.0;
        if (k0 == 0) total[0] += weights[team.rank];
        __syncthreads();
        for (int i = 0; k < in.d && i < kMixtureThreads; ++i) {
          if (weights[i] == 0.0) continue;
          const int64_t row = kCenters ? first + i : o, j = kCenters ? o : first + i;
          const double scale = exact_scale(in, j, k);
          const double z = (element<double>(in.x, in.storage, row * in.d + k) -
                            element<double>(in.centers, in.storage, j * in.d + k)) /
                           scale;
          sum += weights[i] * z / scale;
          square += weights[i] * z * z / scale;
        }
      }
      if (k < in.d) {
        const int64_t at = o * in.d + k;
        if (!kCenters) store_element(-sum, p.grad_x, in.storage, at);
        if (kCenters && p.grad_centers) store_element(sum, p.grad_centers, in.storage, at);
        if (kCenters && p.grad_scale && in.scale_kind == MixtureScale::per_dimension)
          store_element(square, p.grad_scale, compute, at);
        squares[0] += square;
      }
    }
    if constexpr (kCenters) {
      reduce<Sum>(team, squares);
      reduce<Sum>(team, total);
      if (team.rank > 0) continue;
      if (p.grad_log_weights) store_element(total[0], p.grad_log_weights, compute, o);
      if (p.grad_scale && in.scale_kind == MixtureScale::per_center)
        store_element(squares[0], p.grad_scale, compute, o);
      if (p.grad_scale && in.scale_kind == MixtureScale::shared) scale_parts[o] = squares[0];
    }
  }
}

}  // namespace refine_ext::cuda
