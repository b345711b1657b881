// Rejection sampling and independent Metropolis-Hastings; what is decided is defined in
// csrc/math/resampling.h. Bytes moved a float32 sample: rejection 4 (largest) + 5 (decisions).
#pragma once

#include "density_ratio_ops.cuh"
#include "resampling.cuh"

namespace refine_ext::cuda {

// One part's share of a row: its largest log-ratio, NaN where one is NaN or +inf.
// budget: registers 40 (float64 48), shared 256, occupancy 75% (float64 62%), inputs 1,
//   instructions/sample 5 (float64 11),
//   special/sample 0,
//   float64/sample 0 (float64 2)
template <class T>
__global__ void __launch_bounds__(kDrawThreads)
    largest_kernel(const T* log_ratio, const int64_t n, const Layout layout, double* largest) {
  using C = typename ComputeOf<T>::type;
  const Team team = my_team(layout);
  const T* const inputs[1] = {log_ratio + team.row * n};
  ScanPass<C, false> pass;
  for_samples<2, false, 1, C>(inputs, static_cast<T*>(nullptr), n, team, pass);
  const ScanTotals totals = scan_totals(team, pass, 0);
  if (team.rank != 0) return;
  largest[team.row * layout.parts + team.part] =
      totals.invalid > 0.0 ? std::numeric_limits<double>::quiet_NaN() : totals.maximum;
}

// The parts' largest together, by a whole block; NaN if one is.
__device__ __forceinline__ double gather_largest(const Team& team, const double* largest, int64_t parts) {
  double values[2] = {-std::numeric_limits<double>::infinity(), 0.0};
  for (int64_t part = team.rank; part < parts; part += team.size) {
    const double value = largest[part];
    values[0] = Maximum::merge(values[0], value);
    values[1] = value != value ? 1.0 : values[1];
  }
  reduce<Maximum>(team, values);
  return values[1] > 0.0 ? std::numeric_limits<double>::quiet_NaN() : values[0];
}

// Device memory with a value for every `each` rows, as the tensors come.
struct RejectionRows {
  int64_t bound_each, gamma_each;
};

// budget: registers 64, shared 384, occupancy 50%
template <class T>
__global__ void __launch_bounds__(kDrawThreads)
    rejection_kernel(const RejectionProblem problem, const RejectionRows rows, const Layout layout,
                     const double* largest, int64_t* counts) {
  const Team team = my_team(layout);
  double bound = gather_largest(team, largest + team.row * layout.parts, layout.parts);
  if (problem.log_bound) {
    const double given = problem.log_bound[team.row / rows.bound_each];
    // NaN stays, and +inf becomes it: neither is a bound.
    bound = given < std::numeric_limits<double>::infinity() ? (bound < given ? given : bound) : given - given;
  }
  const double gamma = problem.gamma ? problem.gamma[team.row / rows.gamma_each] : 0.0;
  const bool valid = bound == bound && is_finite(gamma);
  const Acceptance accepts =
      problem.gamma ? Acceptance::shifted(bound, gamma, problem.epsilon) : Acceptance::plain(bound);
  const PhiloxSequence sequence = problem.seeds.sequence(team.row, Stream::rejection);
  const int64_t begin = team.row * problem.n;
  int64_t kept[1] = {0};
  // A block of the sequence holds two numbers: a thread takes both.
  const uint64_t offset = problem.seeds.offset, first = offset >> 1;
  const int64_t pairs =
      static_cast<int64_t>(((offset + static_cast<uint64_t>(problem.n) - 1) >> 1) - first) + 1;
  for (int64_t pair = team.first; pair < pairs; pair += team.stride) {
    const PhiloxBlock<uint32_t> block = sequence.block(first + static_cast<uint64_t>(pair));
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t i = 2 * pair + half - static_cast<int64_t>(offset & 1);
      if (i < 0 || i >= problem.n) continue;
      const double log_ratio = wide_at<T>(problem.log_ratio, begin + i);
      const bool keep = valid && accepts(log_ratio, half ? high_half(block) : low_half(block));
      problem.keep[begin + i] = keep;
      kept[0] += keep;
    }
  }
  reduce<Sum>(team, kept);
  if (team.rank != 0) return;
  counts[team.row * layout.parts + team.part] = kept[0];
  if (team.part == 0) problem.new_bound[team.row] = valid ? bound : std::numeric_limits<double>::quiet_NaN();
}

// budget: registers 32, shared 128, occupancy 100%
__global__ void __launch_bounds__(kDrawThreads)
    count_kernel(const int64_t* counts, const int64_t parts, int64_t* accepted) {
  const Team team = my_team({kDrawThreads, 1});
  int64_t sum[1] = {0};
  for (int64_t part = team.rank; part < parts; part += team.size) sum[0] += counts[team.row * parts + part];
  reduce<Sum>(team, sum);
  if (team.rank == 0) accepted[team.row] = sum[0];
}

// What is a number on the CPU comes as device memory.
struct MetropolisStart {
  const int64_t* seed;
  int64_t initial_each;  // chains that share a value of `initial`
};

// A thread a chain: a chain's steps follow each other. Invalid log-ratios make every draw index 0.
// budget: registers 56, shared 256, occupancy 50%
template <class T>
__global__ void __launch_bounds__(kDrawThreads)
    metropolis_kernel(const MetropolisProblem problem, const MetropolisStart start, const double* largest,
                      const int64_t parts) {
  const Team team = my_team({kDrawThreads, 1});
  const double bound = gather_largest(team, largest, parts);
  const int64_t chain = static_cast<int64_t>(blockIdx.x) * kDrawThreads + threadIdx.x;
  if (chain >= problem.chains) return;
  int64_t* out = problem.out + chain * problem.num;
  double current = problem.initial ? problem.initial[chain / start.initial_each] : 0.0;
  if (bound != bound || !(current < std::numeric_limits<double>::infinity())) {
    for (int64_t m = 0; m < problem.num; ++m) out[m] = 0;
    problem.accepted[chain] = 0;
    return;
  }
  const PhiloxSequence sequence{static_cast<uint64_t>(*start.seed), static_cast<uint64_t>(chain),
                                Stream::metropolis};
  const int64_t steps = metropolis_steps(problem.num, problem.burn_in, problem.thin);
  int64_t state = -1, accepted = 0, drawn = 0, due = problem.burn_in;
  for (int64_t step = 0; step < steps; ++step) {
    const PhiloxBlock<uint32_t> block = sequence.block(static_cast<uint64_t>(step));
    const int64_t proposal =
        problem.in_order ? chain * steps + step
                         : static_cast<int64_t>(mulhi(low_half(block), static_cast<uint64_t>(problem.n)));
    const double proposed = wide_at<T>(problem.log_ratio, proposal);
    const double log_unit = reproducible_log(unit_to_one(high_half(block)));
    const bool first = step == 0 && !problem.initial;
    const bool take = first || metropolis_accepts(log_unit, proposed, current);
    accepted += take && !first;
    if (take || (step == due && state < 0)) {
      state = proposal;
      current = proposed;
    }
    if (step == due) {
      out[drawn++] = state;
      due += problem.thin;
    }
  }
  problem.accepted[chain] = accepted;
}

}  // namespace refine_ext::cuda
