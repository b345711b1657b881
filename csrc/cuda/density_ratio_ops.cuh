// What is done with one sample, and with a row between two passes over it.
#pragma once

#include "../math/density_ratio_problem.h"
#include "reduce.cuh"

namespace refine_ext::cuda {

// Form::power computes in float64 whatever the storage.
template <Form kForm, class T>
using Compute = std::conditional_t<kForm == Form::power, double, typename ComputeOf<T>::type>;

__device__ __forceinline__ bool is_finite(double x) { return x - x == 0.0; }

// The problem with what the CPU driver keeps in variables. A given shift of zero needs no memory: shift is
// nullptr then.
struct RowProblem : DensityRatioProblem {
  bool fixed;  // the shift is given
  double tolerance;
};

// ---- passes

// Largest output of positive weight, total weight, and whether a NaN, +inf or unusable weight was met.
template <class C, bool kWeighted>
struct ScanPass : Pass {
  C best = -std::numeric_limits<C>::infinity();
  double weight = 0.0;
  bool invalid = false;

  __device__ __forceinline__ C sample(const C* x) {
    const C infinity = std::numeric_limits<C>::infinity();
    invalid |= !(x[0] < infinity);
    bool counts = x[0] > best;
    if constexpr (kWeighted) {
      invalid |= !(x[1] >= C(0) && x[1] < infinity);
      counts = counts && x[1] > C(0);
      weight += static_cast<double>(x[1]);
    }
    best = counts ? x[0] : best;
    return best;
  }
};

// The same and the sums of w e^{h - best}, for rows that are read once. The sums are rescaled whenever a pack
// raises the maximum, which happens a few times a thread.
template <class C, bool kWeighted>
struct OnlineScanPass : Pass {
  ScanPass<C, kWeighted> scan;
  C reference = C(0), part = C(0), part_square = C(0);
  double sum = 0.0, square = 0.0, largest = kWeighted ? 0.0 : 1.0;

  __device__ __forceinline__ void inspect(const C* x) { scan.sample(x); }
  __device__ __forceinline__ void prepare() {
    if (!(scan.best > reference || sum == 0.0)) return;
    const C origin = scan.best > -std::numeric_limits<C>::infinity() ? scan.best : C(0);
    const double shrink = sum == 0.0 ? 0.0 : static_cast<double>(Arithmetic<C>::exp(reference - origin));
    sum *= shrink;
    square *= shrink * shrink;
    if constexpr (kWeighted) largest *= shrink;
    reference = origin;
  }
  __device__ __forceinline__ C sample(const C* x) {
    const C e = Arithmetic<C>::exp(x[0] - reference);
    if constexpr (kWeighted) {
      // Weights may span more than float32 does once they are squared.
      const double mass = x[1] > C(0) ? static_cast<double>(e) * static_cast<double>(x[1]) : 0.0;
      sum += mass;
      square += mass * mass;
      largest = mass > largest ? mass : largest;
    } else {
      part += e;
      part_square += e * e;
    }
    return e;
  }
  __device__ __forceinline__ void flush() {
    if constexpr (!kWeighted) {
      sum += static_cast<double>(part);
      square += static_cast<double>(part_square);
      part = part_square = C(0);
    }
  }
};

// Sums of w r and w times its moment at an anchor: a step of the search.
template <Form kForm, class C, bool kWeighted>
struct MeanPass : Pass {
  const RatioEvaluator<kForm, C> evaluate;
  const C high, low;
  C part = C(0), part_moment = C(0);
  double ratio = 0.0, moment = 0.0;

  __device__ __forceinline__ MeanPass(const Family& family, const Anchor& anchor)
      : evaluate(family, anchor), high(static_cast<C>(anchor.high)), low(static_cast<C>(anchor.low)) {}

  __device__ __forceinline__ C sample(const C* x) {
    const RatioPoint<C> point = evaluate((high - x[0]) + low);
    if constexpr (kWeighted) {
      // A sample of weight zero takes no part, even where its ratio overflows.
      const bool counts = x[1] > C(0);
      ratio += counts ? static_cast<double>(x[1]) * static_cast<double>(point.ratio) : 0.0;
      moment += counts ? static_cast<double>(x[1]) * static_cast<double>(point.moment) : 0.0;
    } else {
      part += point.ratio;
      part_moment += point.moment;
    }
    return point.ratio;
  }
  __device__ __forceinline__ void flush() {
    if constexpr (!kWeighted) {
      ratio += static_cast<double>(part);
      moment += static_cast<double>(part_moment);
      part = part_moment = C(0);
    }
  }
};

// The result, and its sums: w r, (w r)^2, largest w r, and with Output::none w f*, in float64 since squares
// leave float32 early. kEither: log r or r, as `log_ratio` says at run time.
template <Form kForm, class C, Output kOutput, bool kEither = false>
struct WritePass : Pass {
  const RatioEvaluator<kForm, C> evaluate;
  const C high, low, scale;
  bool log_ratio = kOutput == Output::log_ratio;
  double ratio = 0.0, square = 0.0, conjugate = 0.0, largest = 0.0;

  __device__ __forceinline__ WritePass(const Family& family, const Anchor& anchor, double factor)
      : evaluate(family, anchor),
        high(static_cast<C>(anchor.high)),
        low(static_cast<C>(anchor.low)),
        scale(static_cast<C>(factor)) {}

  __device__ __forceinline__ C sample(const C* x) {
    const RatioPoint<C> point = evaluate((high - x[0]) + low);
    const bool counts = x[1] > C(0);
    const double r = counts ? static_cast<double>(x[1]) * static_cast<double>(point.ratio) : 0.0;
    ratio += r;
    square += r * r;
    largest = r > largest ? r : largest;
    if constexpr (kOutput == Output::none) {
      conjugate += counts ? static_cast<double>(x[1]) * static_cast<double>(point.conjugate) : 0.0;
    }
    if constexpr (kEither) return log_ratio ? point.log_ratio : point.ratio;
    return kOutput == Output::log_ratio ? point.log_ratio : point.ratio * scale;
  }
};

// log r or r of the exponential form, whose sums the scan has taken already.
template <class C, Output kOutput>
struct ShiftPass : Pass {
  const C high, low, scale;

  __device__ __forceinline__ ShiftPass(const Anchor& anchor, double factor)
      : high(static_cast<C>(anchor.high)), low(static_cast<C>(anchor.low)), scale(static_cast<C>(factor)) {}

  __device__ __forceinline__ C sample(const C* x) {
    const C log_ratio = -((high - x[0]) + low);
    return kOutput == Output::log_ratio ? log_ratio : Arithmetic<C>::exp(log_ratio) * scale;
  }
};

// ---- a row between two passes

enum class Status : int {
  searching,
  deferred,  // searching where float32 cannot follow: settle_kernel goes on in float64
  settled,
  invalid,
};

// Whether g = e^{-c L} is too small for float32 in the forms that evaluate (g + c k d)^{-1/c} by g. Only base
// weights let L grow beyond log n.
template <Form kForm, class C>
inline constexpr bool kHoldsBase =
    sizeof(C) == 4 &&
    (kForm == Form::reciprocal || kForm == Form::inverse_square || kForm == Form::inverse_sqrt);
template <Form kForm, class C>
__device__ __forceinline__ bool base_underflows(const Family& family, const Anchor& anchor) {
  return kHoldsBase<kForm, C> && family.c * anchor.log_max > 80.0;
}

struct ScanTotals {
  double maximum, weight, invalid;
  double sum, square, largest;  // of w e^{h - maximum}
};

struct RowState {
  ShiftSearch search;
  Anchor anchor;
  RatioStats stats;  // exponential form: complete after the scan
  double maximum, weight, shift, best_error;
  Status status;
};

template <class C, bool kWeighted>
__device__ __forceinline__ ScanTotals scan_totals(const Team& team, const ScanPass<C, kWeighted>& pass,
                                                  int64_t count) {
  double maxima[2] = {static_cast<double>(pass.best), pass.invalid ? 1.0 : 0.0};
  double sums[1] = {kWeighted ? pass.weight : 0.0};
  reduce<Maximum>(team, maxima);
  if constexpr (kWeighted) reduce<Sum>(team, sums);
  return {maxima[0], kWeighted ? sums[0] : static_cast<double>(count), maxima[1], 0.0, 0.0, 0.0};
}

// Sums of exponentials that are relative to each thread's own reference, brought to the team's maximum.
__device__ __forceinline__ void merge_exponentials(const Team& team, double reference, double sum,
                                                   double square, double largest, ScanTotals& totals) {
  const double shrink = sum > 0.0 ? ::exp(reference - totals.maximum) : 0.0;
  double sums[2] = {sum * shrink, square * shrink * shrink}, maxima[1] = {sum > 0.0 ? largest * shrink : 0.0};
  reduce<Sum>(team, sums);
  reduce<Maximum>(team, maxima);
  totals.sum = sums[0];
  totals.square = sums[1];
  totals.largest = maxima[0];
}

// After the scan: the anchor of an exponential form or a given shift, or where the search begins.
template <Form kForm, class C>
__device__ __forceinline__ RowState begin_row(const RowProblem& problem, int64_t row,
                                              const ScanTotals& scan) {
  Family family = problem.family;
  family.form = kForm;
  const bool fixed = problem.fixed;
  RowState state;
  state.maximum = scan.maximum;
  state.weight = scan.weight;
  state.shift = problem.shift ? problem.shift[row * problem.shift_stride] : 0.0;
  state.best_error = std::numeric_limits<double>::infinity();
  state.search = begin_search(family, problem.n, problem.weights != nullptr);
  bool valid = !(scan.invalid > 0.0) && scan.weight > 0.0 && state.shift == state.shift;
  if (!fixed) valid = valid && is_finite(scan.maximum);

  if constexpr (kForm == Form::exponential) {
    // log r of the largest. With a solved shift it is taken from the sum, not from the shift: a large
    // maximum's rounding would swallow it.
    const double largest =
        fixed ? scan.maximum - (state.shift + family.tangent) : ::log(scan.weight) - ::log(scan.sum);
    if (!fixed) state.shift = (scan.maximum - largest) - family.tangent;
    state.anchor = fixed_anchor<C>(family, state.shift);
    if (!fixed) state.anchor.low = (scan.maximum - state.anchor.high) - largest;
    const double infinity = std::numeric_limits<double>::infinity();
    const bool empty =
        scan.maximum == -infinity;  // r = 0 for all at a given shift, and the sums hold nothing
    state.stats = {state.shift,
                   empty ? -infinity : largest + ::log(scan.sum),
                   empty ? -infinity : 2.0 * largest + ::log(scan.square),
                   empty ? -infinity : largest + ::log(scan.largest),
                   ::log(scan.weight),
                   state.anchor.log_max,
                   state.anchor.high,
                   state.anchor.low};
    state.status = Status::settled;
  } else if (fixed) {
    state.anchor = fixed_anchor<C>(family, state.shift);
    // The ratio falls with d, so that the largest output decides whether the shift leaves the domain.
    valid = valid && !(scan.maximum - state.shift > family.supremum);
    const C d =
        (static_cast<C>(state.anchor.high) - static_cast<C>(scan.maximum)) + static_cast<C>(state.anchor.low);
    const C ratio = RatioEvaluator<kForm, C>(family, state.anchor)(d).ratio;
    valid = valid && ratio == ratio;
    state.status = Status::settled;
  } else {
    state.anchor = solved_anchor(family, scan.maximum, state.search.log_max);
    state.status = Status::searching;
  }
  if (!valid) state.status = Status::invalid;
  return state;
}

inline constexpr double kLargestLogCount = 30.0;  // of 10^13 samples, more than any device holds

// One step of the search from the sums at state.anchor. Newton's error is quadratic near the root, the
// steeper the larger c is, so that a step from an error e is taken on trust once e^2 (1 + c^2) is far below
// the tolerance. Not so where L is beyond any log n: base weights have brought it there, and a few light
// samples with huge ratios hold the mass.
template <Form kForm>
__device__ __forceinline__ void advance(RowState& state, Family family, double ratio, double moment,
                                        double tolerance) {
  family.form = kForm;
  const double mean = ratio / state.weight, error = ::fabs(mean - 1.0);
  if (mean != mean) {
    state.status = Status::invalid;
    return;
  }
  if (error <= tolerance) {
    state.status = Status::settled;
    return;
  }
  state.best_error = error < state.best_error ? error : state.best_error;
  if (!state.search.step(family, mean, moment / state.weight)) {
    // The bracket is down to one float64: what is left is rounding in the storage type.
    state.status = state.best_error <= 100.0 * tolerance ? Status::settled : Status::invalid;
    return;
  }
  state.anchor = solved_anchor(family, state.maximum, state.search.log_max);
  const bool trusted = error * error * (1.0 + family.c * family.c) <= 0.1 * tolerance;
  if (trusted && state.anchor.log_max <= kLargestLogCount) state.status = Status::settled;
}

__device__ __forceinline__ RatioStats invalid_stats() {
  const double nan = std::numeric_limits<double>::quiet_NaN();
  return {nan, nan, nan, nan, nan, nan, nan, nan};
}

__device__ __forceinline__ RatioStats finish_row(const RowState& state, const Family& family, bool fixed,
                                                 double ratio, double square, double largest) {
  if (state.status != Status::settled || ratio != ratio) return invalid_stats();
  if (family.form == Form::exponential) return state.stats;
  const double shift = fixed ? state.shift : state.maximum - dual_output(family, state.search.log_max);
  return {shift,
          ::log(ratio),
          ::log(square),
          ::log(largest),
          ::log(state.weight),
          state.anchor.log_max,
          state.anchor.high,
          state.anchor.low};
}

// A row's state while a block works on it: in shared memory, one slot a team, written by the team's first
// thread.
template <int kTeams>
__device__ __forceinline__ RowState& shared_state(const Team& team) {
  // Bytes, since shared memory takes no type with initialisers.
  REFINE_EXT_SHARED(double, bytes, [kTeams][(sizeof(RowState) + 7) / 8]);
  return *reinterpret_cast<RowState*>(bytes[kTeams == 1 ? 0 : team.index]);
}

template <class T>
__device__ __forceinline__ void fill_nan(T* out, int64_t n, const Team& team) {
  T nan;
  narrow(std::numeric_limits<float>::quiet_NaN(), nan);
  for (int64_t i = team.first; i < n; i += team.stride) out[i] = nan;
}
}  // namespace refine_ext::cuda
