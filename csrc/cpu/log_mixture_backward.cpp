// CPU driver of the gradients of the Gaussian log-mixture: which thread takes which blocks, and what is left
// to do with their sums.
#include "log_mixture_backward.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <type_traits>
#include <vector>

#include "dispatch.h"
#include "log_mixture.h"
#include "log_mixture_blocks.h"
#include "log_mixture_wide.h"
#include "scratch.h"

#define REFINE_EXT_ISA isa_baseline
#include "simd_storage.h"

namespace refine_ext {

REFINE_EXT_KERNEL_TABLE(LogMixtureKernels, log_mixture_kernels)
REFINE_EXT_KERNEL_TABLE(LogMixtureBackwardKernels, log_mixture_backward_kernels)

namespace {

using isa_baseline::encode;
using isa_baseline::with_storage;

constexpr int64_t kGrain = 32768;  // elements, below which waking a thread costs more than it saves

// 1 / scale[i], finite.
double inverse_scale(const MixtureInputs& in, int64_t i) {
  const double scale = in.storage == Storage::float64 ? static_cast<const double*>(in.scale)[i]
                                                      : static_cast<const float*>(in.scale)[i];
  return std::min(1 / scale, std::numeric_limits<double>::max());
}

template <class T>
T written(double value) {
  if constexpr (sizeof(T) == 8) {
    return value;
  } else {
    return encode<T>(static_cast<float>(value));
  }
}

// One block of rows and its scratch memory.
struct TileBlocks {
  const MixtureBackwardPlan& plan;
  const LogMixtureBackwardKernels& kernels;
  Scratch<char> memory;

  TileBlocks(const MixtureBackwardPlan& p, const LogMixtureBackwardKernels& k)
      : plan(p), kernels(k), memory((k.scratch_bytes(p) + 63) / 64 * 64) {}
  void begin(int64_t rows) { kernels.begin(plan, rows, memory.data()); }
  void block(int64_t rows, int64_t centers) { kernels.block(plan, rows, centers, memory.data()); }
  void finish(int64_t rows) { kernels.finish(plan, rows, memory.data()); }
};

// What S sums to, in the place of T or elsewhere.
template <class T, class S>
void finish_sums(const MixtureBackwardPlan& plan) {
  const LogMixtureBackwardProblem& p = plan.problem;
  const MixtureInputs& in = p.in;
  using C = typename isa_baseline::ComputeOf<T>::type;
  const S* slopes = static_cast<const S*>(plan.slopes);
  const S* spreads = static_cast<const S*>(plan.spreads);
  const bool per_dimension = in.scale_kind == MixtureScale::per_dimension;
  // slope_of(s) = log2(e) / (2 s^2) is in the sums already where each centre has one.
  const bool shared = in.scale_kind == MixtureScale::shared;
  const double first = shared ? inverse_scale(in, 0) : 2 * kLn2, second = shared ? first : 1.0;
  parallel_for(0, slopes || spreads ? in.n * in.d : 0, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t e = begin; slopes && e < end; ++e) {
      const double inverse = per_dimension ? inverse_scale(in, e) : 1.0;
      const double sum = per_dimension ? slopes[e] * inverse * inverse : slopes[e] * first * second;
      static_cast<T*>(p.grad_centers)[e] = written<T>(sum);
    }
    for (int64_t e = begin; spreads && e < end; ++e) {
      const double inverse = inverse_scale(in, e);
      static_cast<C*>(p.grad_scale)[e] = static_cast<C>(spreads[e] * inverse * inverse * inverse);
    }
  });
  if (p.grad_scale && !spreads) {
    double all = 0.0;
    for (int64_t j = 0; j < in.n; ++j) {
      const double inverse = inverse_scale(in, shared ? 0 : j);
      const double sum = plan.squares[j] * inverse * inverse * inverse;
      all += sum;
      if (in.scale_kind == MixtureScale::per_center) static_cast<C*>(p.grad_scale)[j] = static_cast<C>(sum);
    }
    if (shared) *static_cast<C*>(p.grad_scale) = static_cast<C>(all);
  }
  for (int64_t j = 0; p.grad_log_weights && j < in.n; ++j) {
    static_cast<C*>(p.grad_log_weights)[j] = static_cast<C>(plan.weights[j]);
  }
}

template <class S>
S* zeros(std::optional<Scratch<char>>& memory, int64_t count) {
  memory.emplace(count * static_cast<int64_t>(sizeof(S)));
  S* all = reinterpret_cast<S*>(memory->data());
  std::fill(all, all + count, S(0));
  return all;
}

template <class T, class S>
void run(const LogMixtureBackwardProblem& p) {
  using C = typename isa_baseline::ComputeOf<T>::type;
  const MixtureInputs& in = p.in;
  const bool per_dimension = in.scale_kind == MixtureScale::per_dimension;
  const int64_t all = in.n * in.d;
  MixtureBackwardPlan plan{p, sizeof(S) != sizeof(C), 0, 0, nullptr, nullptr, nullptr, nullptr};
  std::optional<Scratch<char>> weights, squares, slopes, spreads;
  if (p.grad_log_weights) plan.weights = zeros<double>(weights, in.n);
  if (p.grad_scale && !per_dimension) plan.squares = zeros<double>(squares, in.n);
  // Where the result is to be, if it can hold the sums.
  const auto sums = [&](void* result, bool fits, std::optional<Scratch<char>>& memory) -> S* {
    if (!fits) return zeros<S>(memory, all);
    std::fill(static_cast<S*>(result), static_cast<S*>(result) + all, S(0));
    return static_cast<S*>(result);
  };
  if (p.grad_centers) plan.slopes = sums(p.grad_centers, sizeof(T) == sizeof(S), slopes);
  if (p.grad_scale && per_dimension) plan.spreads = sums(p.grad_scale, sizeof(C) == sizeof(S), spreads);
  if (in.m > 0 && (p.grad_x || plan.over_rows())) {
    if (std::is_same_v<S, float> && is_wide(in)) {
      log_mixture_wide_sums(plan);
    } else {
      const LogMixtureBackwardKernels& kernels = log_mixture_backward_kernels_table();
      kernels.choose(plan);
      run_blocks(plan, [&] { return TileBlocks(plan, kernels); });
    }
  }
  finish_sums<T, S>(plan);
}

template <class T>
double read(const void* values, int64_t i) {
  if constexpr (sizeof(T) == 2) {
    T padded[isa_baseline::Vec<float>::kWidth] = {static_cast<const T*>(values)[i]};
    return isa_baseline::load(padded).v[0];
  } else {
    return static_cast<const T*>(values)[i];
  }
}

// Beyond this a value does not say what the exponents summed to: its last place is 1e-4 of a nat.
constexpr double kLargestValue = 1e12;

// Gradients of the rows whose values are beyond that, from exponents and their sum made anew in float64.
// Added to those of the other rows.
template <class T>
void add_far_rows(const LogMixtureBackwardProblem& p, const std::vector<int64_t>& rows) {
  using C = typename isa_baseline::ComputeOf<T>::type;
  const MixtureInputs& in = p.in;
  const int64_t scales = in.scale_kind == MixtureScale::shared       ? 1
                         : in.scale_kind == MixtureScale::per_center ? in.n
                                                                     : in.n * in.d;
  const auto scale_at = [&](int64_t j, int64_t k) {
    return scales == 1 ? int64_t{0} : scales == in.n ? j : j * in.d + k;
  };
  std::vector<double> t(in.n), x(in.d), centers(in.n * in.d), spread(scales), weights(in.n);
  const auto difference = [&](int64_t i, int64_t j, int64_t k) {
    return read<T>(in.x, i * in.d + k) - read<T>(in.centers, j * in.d + k);
  };
  for (const int64_t i : rows) {
    double largest = -std::numeric_limits<double>::infinity(), sum = 0.0;
    for (int64_t j = 0; j < in.n; ++j) {
      t[j] = in.log_weights ? read<C>(in.log_weights, j) : 0.0;
      for (int64_t k = 0; k < in.d; ++k) {
        const double z = difference(i, j, k) / read<C>(in.scale, scale_at(j, k));
        t[j] -= 0.5 * z * z;
      }
      if (in.exclude && in.exclude[i] == j) t[j] = -std::numeric_limits<double>::infinity();
      largest = std::max(largest, t[j]);
    }
    for (int64_t j = 0; j < in.n; ++j) sum += t[j] = std::exp(t[j] - largest);
    std::fill(x.begin(), x.end(), 0.0);
    for (int64_t j = 0; j < in.n; ++j) {
      const double a = p.grad[i] * t[j] / sum;
      if (a == 0.0) continue;
      weights[j] += a;
      for (int64_t k = 0; k < in.d; ++k) {
        const double s = read<C>(in.scale, scale_at(j, k)), z = difference(i, j, k) / s;
        x[k] -= a * z / s;
        centers[j * in.d + k] += a * z / s;
        spread[scale_at(j, k)] += a * z * z / s;
      }
    }
    for (int64_t k = 0; p.grad_x && k < in.d; ++k) static_cast<T*>(p.grad_x)[i * in.d + k] = written<T>(x[k]);
  }
  const auto add = [](auto* to, const std::vector<double>& from) {
    using S = std::remove_pointer_t<decltype(to)>;
    for (size_t e = 0; to && e < from.size(); ++e) {
      if (from[e] != 0.0) to[e] = written<S>(read<S>(to, static_cast<int64_t>(e)) + from[e]);
    }
  };
  add(static_cast<T*>(p.grad_centers), centers);
  add(static_cast<C*>(p.grad_scale), spread);
  add(static_cast<C*>(p.grad_log_weights), weights);
}

std::vector<int64_t> far_rows(const double* value, int64_t m) {
  std::vector<int64_t> far;
  for (int64_t i = 0; i < m; ++i) {
    if (std::isfinite(value[i]) && std::abs(value[i]) > kLargestValue) far.push_back(i);
  }
  return far;
}

}  // namespace

void mend_far_scores_cpu(const LogMixtureProblem& problem) {
  const std::vector<int64_t> far = far_rows(problem.value, problem.in.m);
  if (far.empty()) return;
  LogMixtureBackwardProblem gradient{};
  gradient.in = problem.in;
  const std::vector<double> ones(problem.in.m, 1.0);
  gradient.grad = ones.data();
  gradient.grad_x = problem.score;
  with_storage(problem.in.storage, [&](auto tag) { add_far_rows<decltype(tag)>(gradient, far); });
}

void log_mixture_backward_cpu(const LogMixtureBackwardProblem& all) {
  const std::vector<int64_t> far = far_rows(all.value, all.in.m);
  LogMixtureBackwardProblem problem = all;
  std::vector<double> grad, value;
  if (!far.empty()) {
    grad.assign(all.grad, all.grad + all.in.m);
    value.assign(all.value, all.value + all.in.m);
    for (const int64_t i : far) {
      grad[i] = 0.0;
      value[i] = 1e30;  // beside which no centre has a weight
    }
    problem.grad = grad.data();
    problem.value = value.data();
  }
  with_storage(problem.in.storage, [&](auto tag) {
    using T = decltype(tag);
    if constexpr (sizeof(T) == 8) {
      run<T, double>(problem);
    } else {
      // Where the value was.
      const bool in_double = log_mixture_kernels_table().plan(problem.in, false).in_double;
      in_double ? run<T, double>(problem) : run<T, float>(problem);
    }
    if (!far.empty()) add_far_rows<T>(all, far);
  });
}

}  // namespace refine_ext
