// Which passes to run over a group of discriminator outputs, and in what order.
//
// exponential: one read gives maximum, sum and sum of squares, one write the result: 12 bytes a float32
// sample. Other forms: one read for the maximum; the shift is found on a subsample plus the blocks' extremes;
// one read at that shift gives the exact mean ratio and its derivative; the pass that verifies the next
// iterate also writes: 16 bytes.
#include "density_ratio.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <iterator>
#include <vector>

#include "dispatch.h"
#include "parallel.h"

namespace refine_ext {

REFINE_EXT_KERNEL_TABLE(DensityRatioKernels, density_ratio_kernels)
REFINE_EXT_KERNEL_TABLE(DualKernels, density_ratio_dual_kernels)

namespace {

constexpr int64_t kSubsample = 16 * kBlock;
constexpr int64_t kSubsampleRun = 32;               // consecutive samples, so that a cache line is used whole
constexpr int64_t kStreamBytes = int64_t{8} << 20;  // outputs beyond this do not stay in cache anyway

const void* offset(const void* p, int64_t elements, Storage storage) {
  return p ? static_cast<const char*>(p) + elements * size_of(storage) : nullptr;
}

void add(RatioSums& total, const RatioSums& part) {
  total.ratio += part.ratio;
  total.moment += part.moment;
  total.square += part.square;
  total.largest = std::max(total.largest, part.largest);
  total.conjugate += part.conjugate;
  total.not_a_number = total.not_a_number || part.not_a_number;
}

void add(ScanSums& total, const ScanSums& part) {
  const double maximum = std::max(total.maximum, part.maximum);
  if (std::isfinite(maximum)) {
    const double keep = std::exp(total.maximum - maximum), shrink = std::exp(part.maximum - maximum);
    total.exp_sum = total.exp_sum * keep + part.exp_sum * shrink;
    total.exp_square = total.exp_square * keep * keep + part.exp_square * shrink * shrink;
    total.exp_largest = std::max(total.exp_largest * keep, part.exp_largest * shrink);
  }
  total.maximum = maximum;
  total.weight += part.weight;
  total.invalid = total.invalid || part.invalid;
}

// One group: contiguous samples, and the passes over them. Chunks are fixed and their sums added in order, so
// that the result does not depend on how many threads there are.
class Group {
 public:
  Group(const DensityRatioProblem& problem, int64_t row, bool threaded)
      : problem_(problem),
        family_(problem.family),
        n_(problem.n),
        threaded_(threaded),
        kernels_(density_ratio_kernels_table()) {
    h_ = offset(problem.h, row * n_, problem.storage);
    weights_ = offset(problem.weights, row * problem.weight_stride, problem.storage);
    out_ = const_cast<void*>(offset(problem.out, row * n_, problem.storage));
    in_place_ = out_ == h_;
    // A streamed line is written whole: the first one must start where a vector does.
    stream_ = n_ * size_of(problem.storage) > kStreamBytes && reinterpret_cast<uintptr_t>(out_) % 64 == 0;
  }

  RatioError run(double fixed_shift, bool conjugated, RatioStats& stats, double* conjugate);
  void write_scaled_ratio(const RatioStats& stats, bool solved, double scale) const;
  void fill_nan() const;

 private:
  template <class Sums, class F>
  Sums over_chunks(Sums initial, F&& f) const {
    const int64_t chunks = (n_ + kChunk - 1) / kChunk;
    if (chunks <= 1) {
      add(initial, f(int64_t{0}, n_));
      return initial;
    }
    std::vector<Sums> parts(chunks);
    const auto body = [&](int64_t first, int64_t last) {
      for (int64_t c = first; c < last; ++c) parts[c] = f(c * kChunk, std::min(n_, (c + 1) * kChunk));
    };
    parallel_for(0, chunks, threaded_ ? 1 : chunks, body);
    for (const Sums& part : parts) add(initial, part);
    return initial;
  }

  ScanSums scan(std::vector<double>& block_maxima, bool exponential) const {
    return over_chunks(ScanSums{-HUGE_VAL, 0, 0, 0, 0, false}, [&](int64_t begin, int64_t end) {
      double* maxima = block_maxima.empty() ? nullptr : block_maxima.data() + begin / kBlock;
      return kernels_.scan(problem_.storage, {h_, weights_, nullptr, begin, end, maxima, false, 1.0},
                           exponential);
    });
  }

  RatioSums pass(const Anchor& anchor, Output output, bool conjugated, double scale = 1.0) const {
    return over_chunks(RatioSums{}, [&](int64_t begin, int64_t end) {
      return kernels_.pass(problem_.storage, {h_, weights_, out_, begin, end, nullptr, stream_, scale},
                           family_, anchor, output, conjugated);
    });
  }

  void first_guess(ShiftSearch& search, double maximum, const std::vector<double>& block_maxima) const;
  RatioError finish(const Anchor& anchor, const RatioSums& sums, double shift, double weight,
                    RatioStats& stats) const;

  const DensityRatioProblem& problem_;
  Family family_;
  const void* h_;
  const void* weights_;
  void* out_;
  int64_t n_;
  bool threaded_, in_place_, stream_;
  const DensityRatioKernels& kernels_;
};

Anchor fixed_anchor_for(Storage storage, const Family& family, double shift) {
  // Form::power computes in float64 whatever the storage.
  return storage == Storage::float64 || family.form == Form::power ? fixed_anchor<double>(family, shift)
                                                                   : fixed_anchor<float>(family, shift);
}

// Whether g = e^{-c L} is too small for float32; then r = (g + c k d)^{-1/c} takes the general form, which
// holds L itself. Only base weights let L grow beyond log n.
bool base_underflows(Storage storage, const Family& family, double log_max) {
  const bool holds_base = family.form == Form::reciprocal || family.form == Form::inverse_square ||
                          family.form == Form::inverse_sqrt;
  return storage != Storage::float64 && holds_base && family.c * log_max > 80.0;
}

// Moves the search to the shift of a subsample. The ratios' mass can lie in a handful of extreme samples that
// a subsample misses: those beyond its maximum are taken from the blocks' maxima, where nearly each has a
// block to itself.
void Group::first_guess(ShiftSearch& search, double maximum, const std::vector<double>& block_maxima) const {
  const int64_t runs = kSubsample / kSubsampleRun, stride = n_ / runs;
  const size_t size = static_cast<size_t>(size_of(problem_.storage));
  std::vector<char> h(kSubsample * size), w(weights_ ? kSubsample * size : 0);
  for (int64_t run = 0; run < runs; ++run) {
    const int64_t from = run * stride, to = run * kSubsampleRun;
    std::memcpy(h.data() + to * size, offset(h_, from, problem_.storage), kSubsampleRun * size);
    if (weights_)
      std::memcpy(w.data() + to * size, offset(weights_, from, problem_.storage), kSubsampleRun * size);
  }
  const RangeArguments sample{h.data(), weights_ ? w.data() : nullptr, nullptr, 0, kSubsample, nullptr, false,
                              1.0};
  const ScanSums scanned = kernels_.scan(problem_.storage, sample, false);
  if (!(scanned.weight > 0.0)) return;

  std::vector<double> extremes;
  std::copy_if(block_maxima.begin(), block_maxima.end(), std::back_inserter(extremes),
               [&](double value) { return value > scanned.maximum; });
  const double mean_weight = scanned.weight / kSubsample;  // the extremes' own weights were not kept
  const RangeArguments tail{extremes.data(), nullptr, nullptr, 0, static_cast<int64_t>(extremes.size()),
                            nullptr,         false,   1.0};
  const double share = static_cast<double>(n_ - tail.end) / kSubsample;
  const double total = share * scanned.weight + mean_weight * static_cast<double>(tail.end);
  ShiftSearch trial = search;
  for (int step = 0; step < kMaxSteps; ++step) {
    const Anchor anchor = solved_anchor(problem_.family, maximum, trial.log_max);
    const RatioSums bulk =
        kernels_.pass(problem_.storage, sample, problem_.family, anchor, Output::none, false);
    const RatioSums rare =
        kernels_.pass(Storage::float64, tail, problem_.family, anchor, Output::none, false);
    const double ratio = (share * bulk.ratio + mean_weight * rare.ratio) / total;
    const double moment = (share * bulk.moment + mean_weight * rare.moment) / total;
    if (std::fabs(ratio - 1.0) < 1e-6 || !trial.step(problem_.family, ratio, moment)) break;
  }
  if (std::isfinite(trial.log_max)) search.log_max = trial.log_max;
}

RatioError Group::finish(const Anchor& anchor, const RatioSums& sums, double shift, double weight,
                         RatioStats& stats) const {
  stats = {shift,
           std::log(sums.ratio),
           std::log(sums.square),
           std::log(sums.largest),
           std::log(weight),
           anchor.log_max,
           anchor.high,
           anchor.low};
  return RatioError::none;
}

RatioError Group::run(double fixed_shift, bool conjugated, RatioStats& stats, double* conjugate) {
  const Family& family = family_;
  const bool exponential = family.form == Form::exponential;
  const bool fixed = !std::isnan(fixed_shift);
  const Output output = problem_.output;
  const bool large = n_ >= 4 * kSubsample;
  std::vector<double> block_maxima(large && !exponential && !fixed ? (n_ + kBlock - 1) / kBlock : 0);

  ScanSums scanned{};
  if (!fixed || exponential) {
    scanned = scan(block_maxima, exponential);
    if (scanned.invalid || !(scanned.weight > 0.0)) return RatioError::invalid_input;
    if (!fixed && !std::isfinite(scanned.maximum)) return RatioError::invalid_input;
  }

  if (exponential) {
    // log r of the largest. With a solved shift it is taken from the sum, not from the shift: a large
    // maximum's rounding would swallow it.
    const double largest = fixed ? scanned.maximum - (fixed_shift + family.tangent)
                                 : std::log(scanned.weight) - std::log(scanned.exp_sum);
    const double shift = fixed ? fixed_shift : (scanned.maximum - largest) - family.tangent;
    Anchor anchor = fixed_anchor_for(problem_.storage, family, shift);
    if (!fixed) anchor.low = (scanned.maximum - anchor.high) - largest;
    if (output != Output::none) pass(anchor, output, false);
    const bool empty =
        scanned.maximum == -HUGE_VAL;  // r = 0 for all at a given shift, and the sums hold nothing
    stats = {shift,
             empty ? -HUGE_VAL : largest + std::log(scanned.exp_sum),
             empty ? -HUGE_VAL : 2.0 * largest + std::log(scanned.exp_square),
             empty ? -HUGE_VAL : largest + std::log(scanned.exp_largest),
             std::log(scanned.weight),
             anchor.log_max,
             anchor.high,
             anchor.low};
    if (conjugated) *conjugate = std::exp(stats.log_sum - stats.log_weight);
    return RatioError::none;
  }

  if (fixed) {
    std::vector<double> unused;
    scanned = scan(unused, false);
    if (scanned.invalid || !(scanned.weight > 0.0)) return RatioError::invalid_input;
    if (scanned.maximum - fixed_shift > family.supremum) return RatioError::outside_domain;
    const Anchor anchor = fixed_anchor_for(problem_.storage, family, fixed_shift);
    const RatioSums sums = pass(anchor, conjugated ? Output::none : output, conjugated);
    if (sums.not_a_number) return RatioError::outside_domain;
    if (conjugated) *conjugate = sums.conjugate / scanned.weight + family.conjugate_offset;
    return finish(anchor, sums, fixed_shift, scanned.weight, stats);
  }

  const double infinity = std::numeric_limits<double>::infinity();
  ShiftSearch search = begin_search(family, n_, weights_ != nullptr);
  if (large) first_guess(search, scanned.maximum, block_maxima);

  const double tolerance = tolerance_of(problem_.storage);
  // In place, the input must survive until the shift is final. A large output is written by the pass that is
  // expected to confirm the shift; a small one is in cache, where one more pass costs less than rewriting.
  bool write = false;
  double best_error = infinity;
  for (int step = 0; step < kMaxSteps; ++step) {
    if (base_underflows(problem_.storage, family, search.log_max)) family_.form = Form::power;
    const Anchor anchor = solved_anchor(family, scanned.maximum, search.log_max);
    const RatioSums sums = pass(anchor, write ? output : Output::none, conjugated);
    const double mean = sums.ratio / scanned.weight, error = std::fabs(mean - 1.0);
    const bool settled = error <= tolerance;
    if (settled && (write || output == Output::none)) {
      if (conjugated) *conjugate = sums.conjugate / scanned.weight + family.conjugate_offset;
      return finish(anchor, sums, scanned.maximum - dual_output(family, search.log_max), scanned.weight,
                    stats);
    }
    if (settled) {
      write = true;
      continue;
    }
    best_error = std::min(best_error, error);
    if (!search.step(family, mean, sums.moment / scanned.weight)) {
      // The bracket is down to one float64: what is left is rounding in the storage type.
      if (best_error > 100 * tolerance) return RatioError::not_converged;
      if (write || output == Output::none) {
        if (conjugated) *conjugate = sums.conjugate / scanned.weight + family.conjugate_offset;
        return finish(anchor, sums, scanned.maximum - dual_output(family, search.log_max), scanned.weight,
                      stats);
      }
      write = true;
      continue;
    }
    // Newton squares the error: from here the next pass is expected to confirm, and writes.
    write = large && !in_place_ && output != Output::none && error < 4e-4;
  }
  return RatioError::not_converged;
}

void Group::write_scaled_ratio(const RatioStats& stats, bool solved, double scale) const {
  const bool from_maximum = solved && problem_.family.form != Form::exponential;
  Anchor anchor = from_maximum ? solved_anchor(problem_.family, stats.anchor, stats.log_max)
                               : fixed_anchor_for(problem_.storage, problem_.family, stats.shift);
  anchor.low = stats.anchor_low;
  pass(anchor, Output::ratio, false, scale);
}

void Group::fill_nan() const {
  // All bits set is a NaN in each of the four storage types.
  if (out_) std::memset(out_, 0xff, static_cast<size_t>(n_ * size_of(problem_.storage)));
}

// Calls body(row, threaded) for every row: rows side by side when they are short, threads inside one when it
// is long.
template <class F>
void for_rows(int64_t rows, int64_t n, F&& body) {
  if (rows == 1 || n >= 4 * kChunk) {
    for (int64_t row = 0; row < rows; ++row) body(row, true);
    return;
  }
  const int64_t grain = std::max<int64_t>(1, kChunk / std::max<int64_t>(n, 1));
  parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) body(row, false);
  });
}

RatioReport run_rows(const DensityRatioProblem& problem, RatioStats* stats, double* conjugate) {
  std::atomic<int64_t> first_bad{problem.rows};
  std::vector<RatioError> errors(problem.rows > 1 ? problem.rows : 0);
  RatioError only = RatioError::none;
  const double nan = std::numeric_limits<double>::quiet_NaN();
  for_rows(problem.rows, problem.n, [&](int64_t row, bool threaded) {
    Group group(problem, row, threaded);
    const double shift = problem.shift ? problem.shift[row * problem.shift_stride] : nan;
    double unused = 0.0;
    const RatioError error =
        problem.shift && !std::isfinite(shift)
            ? RatioError::invalid_input
            : group.run(shift, conjugate != nullptr, stats[row], conjugate ? conjugate + row : &unused);
    if (error == RatioError::none) return;
    (errors.empty() ? only : errors[row]) = error;
    group.fill_nan();
    stats[row] = {nan, nan, nan, nan, nan, nan, nan, nan};
    if (conjugate) conjugate[row] = nan;
    int64_t seen = first_bad.load();
    while (row < seen && !first_bad.compare_exchange_weak(seen, row)) {
    }
  });
  const int64_t row = first_bad.load();
  if (row == problem.rows) return {};
  return {errors.empty() ? only : errors[row], row};
}

}  // namespace

RatioReport density_ratio_cpu(const DensityRatioProblem& problem, RatioStats* stats) {
  return run_rows(problem, stats, nullptr);
}

RatioReport conjugate_mean_cpu(const DensityRatioProblem& problem, RatioStats* stats, double* conjugate) {
  return run_rows(problem, stats, conjugate);
}

void scaled_ratio_cpu(const DensityRatioProblem& problem, const RatioStats* stats, bool solved,
                      double scale) {
  for_rows(problem.rows, problem.n, [&](int64_t row, bool threaded) {
    Group(problem, row, threaded).write_scaled_ratio(stats[row], solved, scale);
  });
}

// With c = d log r / dh at fixed shift and p_i = w_i r_i c_i / sum_j w_j r_j c_j = d nu / d h_i (the
// normalisation E r = 1 differentiated), upstream g for log r, g_nu for the shift and g_S for log sum w r:
//   solved  grad_i = c_i g_i + p_i (g_nu - sum_j c_j g_j)
//   fixed   grad_i = c_i g_i + c_i w_i r_i g_S / sum_j w_j r_j
// Both are c_i (g_i + w_i r_i T) with one number T for the group.
void density_ratio_backward_cpu(const DensityRatioProblem& problem, const void* log_ratio, const void* grad,
                                const RatioStats* stats, const double* grad_stats, bool solved) {
  const DualKernels& kernels = density_ratio_dual_kernels_table();
  for_rows(problem.rows, problem.n, [&](int64_t row, bool threaded) {
    const int64_t n = problem.n, chunks = (n + kChunk - 1) / kChunk;
    const void* g = offset(grad, row * n, problem.storage);
    const void* x = offset(log_ratio, row * n, problem.storage);
    const void* w = offset(problem.weights, row * problem.weight_stride, problem.storage);
    void* out = const_cast<void*>(offset(problem.out, row * n, problem.storage));
    const double* upstream = grad_stats + row * kStats;
    double through_ratio;
    if (solved) {
      std::vector<double> parts(2 * chunks);
      parallel_for(0, chunks, threaded ? 1 : chunks, [&](int64_t first, int64_t last) {
        for (int64_t c = first; c < last; ++c) {
          kernels.backward_sums(problem.storage, g, x, w, c * kChunk, std::min(n, (c + 1) * kChunk),
                                problem.family, parts.data() + 2 * c);
        }
      });
      double through = 0.0, slope = 0.0;
      for (int64_t c = 0; c < chunks; ++c) through += parts[2 * c], slope += parts[2 * c + 1];
      through_ratio = (upstream[0] - through) / slope;
    } else {
      through_ratio = upstream[1] * std::exp(-stats[row].log_sum);
    }
    parallel_for(0, chunks, threaded ? 1 : chunks, [&](int64_t first, int64_t last) {
      for (int64_t c = first; c < last; ++c) {
        kernels.backward(problem.storage, g, x, w, out, c * kChunk, std::min(n, (c + 1) * kChunk),
                         problem.family, through_ratio);
      }
    });
  });
}

void dual_output_cpu(Storage storage, const void* x, void* out, int64_t n, const Family& family) {
  const DualKernels& kernels = density_ratio_dual_kernels_table();
  parallel_for(0, n, kChunk,
               [&](int64_t begin, int64_t end) { kernels.dual_output(storage, x, out, begin, end, family); });
}

void dual_slope_cpu(Storage storage, const void* x, const void* grad, double scale, void* out, int64_t n,
                    const Family& family, bool conjugated) {
  const DualKernels& kernels = density_ratio_dual_kernels_table();
  parallel_for(0, n, kChunk, [&](int64_t begin, int64_t end) {
    kernels.dual_slope(storage, x, grad, scale, out, begin, end, family, conjugated);
  });
}

double dual_sum_cpu(Storage storage, const void* x, int64_t n, const Family& family, bool conjugated) {
  const DualKernels& kernels = density_ratio_dual_kernels_table();
  const int64_t chunks = (n + kChunk - 1) / kChunk;
  std::vector<double> parts(chunks);
  parallel_for(0, chunks, 1, [&](int64_t first, int64_t last) {
    for (int64_t c = first; c < last; ++c) {
      parts[c] = kernels.dual_sum(storage, x, c * kChunk, std::min(n, (c + 1) * kChunk), family, conjugated);
    }
  });
  double sum = 0.0;
  for (double part : parts) sum += part;
  return sum;
}

double mean_cpu(Storage storage, const void* x, int64_t n) {
  // f'(e^x) = x for the logit family: the plain sum by the same code.
  return dual_sum_cpu(storage, x, n, make_family(Divergence::logit, 0.0), false) / static_cast<double>(n);
}

}  // namespace refine_ext
