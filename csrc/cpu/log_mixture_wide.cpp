// Values and means of the Gaussian log-mixture in many dimensions (log_mixture_wide.h).
#include <algorithm>
#include <cmath>
#include <vector>

#include "log_mixture_wide_pairs.h"
#include "parallel.h"

namespace refine_ext {
namespace {

// What a thread needs for a block of rows.
struct Workspace {
  PairMemory pairs;
  KeptCenters kept[kRowBlock];
  Scratch<int32_t> index;
  Scratch<float> weight;
  Scratch<double> sums;  // [kRowBlock][stride]

  Workspace(const WidePairs& all, bool mean, int64_t stride)
      : pairs(all.memory(kChunk)),
        index((pairs.room + kPadding) * (mean ? kRowBlock : 1)),
        weight((pairs.room + kPadding) * (mean ? kRowBlock : 1)),
        sums(mean ? kRowBlock * stride : 0) {
    for (int64_t r = 0; r < kRowBlock; ++r) {
      const int64_t own = mean ? r * (pairs.room + kPadding) : 0;
      kept[r] = {index.data() + own, weight.data() + own, 0};
    }
  }
};

class Forward {
 public:
  explicit Forward(const LogMixtureProblem& p) : p_(p), kernels_(wide_kernels_of_cpu()), pairs_(p.in) {}
  void run() const;

 private:
  void chunk(Workspace& own, int64_t first_row, int64_t rows, int64_t first, MixtureState* states) const;
  void write(int64_t i, const MixtureState& state, const double* sum) const;

  const LogMixtureProblem& p_;
  const WideKernels& kernels_;
  const WidePairs pairs_;
};

// The states of rows [first_row, first_row + rows) for the chunk of centres from `first` on, and with means
// their weighted sums in own.sums.
void Forward::chunk(Workspace& own, int64_t first_row, int64_t rows, int64_t first,
                    MixtureState* states) const {
  const WideCenters& centers = pairs_.centers();
  int64_t row[kRowBlock] = {};
  for (int64_t r = 0; r < rows; ++r) row[r] = first_row + r;
  pairs_.visit(own.pairs, row, rows, first, std::min(kChunk, centers.n - first), nullptr,
               [&](int64_t r, const float* distances, const int32_t* chosen, int64_t count) {
                 states[r] = kernels_.reduce(centers, first, own.pairs.x[r], own.pairs.exclude[r], distances,
                                             chosen, count, own.pairs.t.data(), own.kept[r]);
               });
  if (p_.mean) kernels_.weighted_sums(centers, first, own.kept, rows, own.sums.data());
}

// A chunk's state, and weighted sum of centres, after those before it.
void absorb(MixtureState& all, double* sum, const MixtureState& next, const double* next_sum, int64_t d) {
  const MixtureState both = merged(all, next);
  if (sum) {
    const double first = power_of_difference(all.reference, both.reference);
    const double second = power_of_difference(next.reference, both.reference);
    for (int64_t k = 0; k < d; ++k) sum[k] = sum[k] * first + next_sum[k] * second;
  }
  all = both;
}

void Forward::write(int64_t i, const MixtureState& state, const double* sum) const {
  p_.value[i] = mixture_value(state);
  if (p_.stats) {
    p_.stats[2 * i] = mixture_top_weight(state);
    p_.stats[2 * i + 1] = mixture_effective(state);
    p_.top[i] = state.index;
  }
  if (p_.mean) {
    float* mean = static_cast<float*>(p_.mean) + i * p_.in.d;
    for (int64_t k = 0; k < p_.in.d; ++k) mean[k] = static_cast<float>(sum[k] / state.sum);
  }
}

void Forward::run() const {
  const int64_t m = p_.in.m, stride = pairs_.centers().stride, chunks = divide_up(p_.in.n, kChunk);
  const int64_t threads = num_threads();
  const int64_t rows = std::clamp<int64_t>(divide_up(m, threads), 1, kRowBlock), blocks = divide_up(m, rows);
  const bool mean = p_.mean != nullptr;
  if (blocks >= threads || chunks == 1) {
    parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
      Workspace own(pairs_, mean, stride);
      std::vector<double> sums(mean ? rows * stride : 0);
      MixtureState states[kRowBlock], next[kRowBlock];
      for (int64_t block = begin; block < end; ++block) {
        const int64_t i = block * rows, count = std::min(rows, m - i);
        std::fill(states, states + kRowBlock, MixtureState{});
        std::fill(sums.begin(), sums.end(), 0.0);
        for (int64_t c = 0; c < chunks; ++c) {
          chunk(own, i, count, c * kChunk, next);
          for (int64_t r = 0; r < count; ++r) {
            absorb(states[r], mean ? sums.data() + r * stride : nullptr, next[r],
                   own.sums.data() + r * stride, p_.in.d);
          }
        }
        for (int64_t r = 0; r < count; ++r) write(i + r, states[r], sums.data() + r * stride);
      }
    });
    return;
  }
  // Few rows: threads share their chunks.
  std::vector<MixtureState> states(chunks * m);
  std::vector<double> sums(mean ? chunks * m * stride : 0);
  parallel_for(0, chunks * blocks, 1, [&](int64_t begin, int64_t end) {
    Workspace own(pairs_, mean, stride);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t c = task / blocks, i = task % blocks * rows, count = std::min(rows, m - i);
      chunk(own, i, count, c * kChunk, states.data() + c * m + i);
      if (mean) std::copy_n(own.sums.data(), count * stride, sums.data() + (c * m + i) * stride);
    }
  });
  for (int64_t i = 0; i < m; ++i) {
    MixtureState state;
    std::vector<double> sum(mean ? stride : 0);
    for (int64_t c = 0; c < chunks; ++c) {
      const int64_t at = c * m + i;
      absorb(state, mean ? sum.data() : nullptr, states[at], sums.data() + at * stride, p_.in.d);
    }
    write(i, state, sum.data());
  }
}

}  // namespace

void log_mixture_wide_cpu(const LogMixtureProblem& problem) { Forward(problem).run(); }

}  // namespace refine_ext
