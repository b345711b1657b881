// Values, means and scores of the Gaussian log-mixture in many dimensions (log_mixture_wide.h).
#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "log_mixture_wide_pairs.h"
#include "parallel.h"

#define REFINE_EXT_ISA isa_baseline
#include "log_mixture_row_gradient.h"

namespace refine_ext {
namespace {

// Centres that a float32 sum takes well.
constexpr int64_t kScoreCenters = 512;

// For the sums of a block of rows' scores.
struct ScoreMemory {
  Scratch<float> x, sums;  // [kRowBlock][stride]
  Scratch<float> w;        // [kRowBlock][kScoreCenters]
  Scratch<float> packed;
  Scratch<int32_t> index;

  explicit ScoreMemory(int64_t stride)
      : x(kRowBlock * stride),
        sums(kRowBlock * stride),
        w(kRowBlock * kScoreCenters),
        packed(kGradientRows * (kScoreCenters + kGradientTile)),
        index(kScoreCenters + kGradientTile) {}
};

// What a thread needs for a block of rows.
struct Workspace {
  PairMemory pairs;
  KeptCenters kept[kRowBlock];
  Scratch<int32_t> index;
  Scratch<float> weight;
  Scratch<double> sums;  // [kRowBlock][stride]
  std::unique_ptr<ScoreMemory> score;

  Workspace(const WidePairs& all, const LogMixtureProblem& p, int64_t stride)
      : Workspace(all, p.mean || p.score, stride) {
    if (p.score) score = std::make_unique<ScoreMemory>(stride);
  }

 private:
  // vectors: beside each row's state, which are made of all its weights.
  Workspace(const WidePairs& all, bool vectors, int64_t stride)
      : pairs(all.memory(kChunk)),
        index((pairs.room + kPadding) * (vectors ? kRowBlock : 1)),
        weight((pairs.room + kPadding) * (vectors ? kRowBlock : 1)),
        sums(vectors ? kRowBlock * stride : 0) {
    for (int64_t r = 0; r < kRowBlock; ++r) {
      const int64_t own = vectors ? r * (pairs.room + kPadding) : 0;
      kept[r] = {index.data() + own, weight.data() + own, 0};
    }
  }
};

class Forward {
 public:
  explicit Forward(const LogMixtureProblem& p)
      : p_(p),
        kernels_(wide_kernels_of_cpu()),
        pairs_(p.in, p.score ? kGradientSpan : kValueSpan),
        gradient_(p.in) {}
  void run() const;

 private:
  void chunk(Workspace& own, int64_t first_row, int64_t rows, int64_t first, MixtureState* states) const;
  void score_sums(Workspace& own, int64_t rows, int64_t first) const;
  void write(int64_t i, const MixtureState& state, const double* sum) const;

  const LogMixtureProblem& p_;
  const WideKernels& kernels_;
  const WidePairs pairs_;
  const isa_baseline::RowGradient gradient_;
};

// The states of rows [first_row, first_row + rows) for the chunk of centres from `first` on, and in own.sums
// their weighted sums of centres, or for the score of differences.
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
  if (p_.score) score_sums(own, rows, first);
}

// Sums of weight * (x - y_j), times a centre's own rate.
void Forward::score_sums(Workspace& own, int64_t rows, int64_t first) const {
  const WideCenters& centers = pairs_.centers();
  const int64_t stride = centers.stride, n = std::min(kChunk, centers.n - first);
  const int64_t padded = divide_up(rows, kGradientTile) * kGradientTile;
  ScoreMemory& memory = *own.score;
  for (int64_t r = 0; r < rows; ++r) std::copy_n(own.pairs.x[r], stride, memory.x.data() + r * stride);
  std::fill(memory.x.data() + rows * stride, memory.x.data() + padded * stride, 0.0f);
  std::fill_n(own.sums.data(), rows * stride, 0.0);
  const bool with_rate = p_.in.scale_kind == MixtureScale::per_center;
  int64_t next[kRowBlock] = {};
  for (int64_t begin = 0; begin < n; begin += kScoreCenters) {
    const int64_t some = std::min(kScoreCenters, n - begin);
    bool any = false;
    std::fill_n(memory.w.data(), rows * some, 0.0f);
    for (int64_t r = 0; r < rows; ++r) {
      const KeptCenters& kept = own.kept[r];
      float* const w = memory.w.data() + r * some - begin;
      const int64_t last = next[r] + some - 1;
      if (!with_rate && last < kept.count && kept.index[last] == begin + some - 1) {  // all of them
        std::copy_n(kept.weight + next[r], some, w + begin);
        next[r] = last + 1;
        any = true;
        continue;
      }
      for (int64_t& c = next[r]; c < kept.count && kept.index[c] < begin + some; ++c) {
        const int32_t j = kept.index[c];
        w[j] = with_rate ? static_cast<float>(kept.weight[c] * centers.rate[first + j]) : kept.weight[c];
        any = true;
      }
    }
    if (!any) continue;
    std::fill_n(memory.sums.data(), padded * stride, 0.0f);
    wide_gradient_kernels_of_cpu().sums({centers, first + begin, some, memory.x.data(), rows, memory.w.data(),
                                         memory.sums.data(), nullptr, nullptr, memory.index.data(),
                                         memory.packed.data()});
    for (int64_t e = 0; e < rows * stride; ++e) own.sums.data()[e] += memory.sums.data()[e];
  }
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
  if (p_.score) isa_baseline::write_score(p_, gradient_, i, state.sum, sum);
}

void Forward::run() const {
  const int64_t m = p_.in.m, stride = pairs_.centers().stride, chunks = divide_up(p_.in.n, kChunk);
  const int64_t threads = num_threads();
  const int64_t rows = std::clamp<int64_t>(divide_up(m, threads), 1, kRowBlock), blocks = divide_up(m, rows);
  const bool vectors = p_.mean || p_.score;
  if (blocks >= threads || chunks == 1) {
    share(blocks, threads, [&](const auto& next_block) {
      Workspace own(pairs_, p_, stride);
      std::vector<double> sums(vectors ? rows * stride : 0);
      MixtureState states[kRowBlock], next[kRowBlock];
      for (int64_t block; (block = next_block()) >= 0;) {
        const int64_t i = block * rows, count = std::min(rows, m - i);
        std::fill(states, states + kRowBlock, MixtureState{});
        std::fill(sums.begin(), sums.end(), 0.0);
        for (int64_t c = 0; c < chunks; ++c) {
          chunk(own, i, count, c * kChunk, next);
          for (int64_t r = 0; r < count; ++r) {
            absorb(states[r], vectors ? sums.data() + r * stride : nullptr, next[r],
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
  std::vector<double> sums(vectors ? chunks * m * stride : 0);
  share(chunks * blocks, threads, [&](const auto& next) {
    Workspace own(pairs_, p_, stride);
    for (int64_t task; (task = next()) >= 0;) {
      const int64_t c = task / blocks, i = task % blocks * rows, count = std::min(rows, m - i);
      chunk(own, i, count, c * kChunk, states.data() + c * m + i);
      if (vectors) std::copy_n(own.sums.data(), count * stride, sums.data() + (c * m + i) * stride);
    }
  });
  for (int64_t i = 0; i < m; ++i) {
    MixtureState state;
    std::vector<double> sum(vectors ? stride : 0);
    for (int64_t c = 0; c < chunks; ++c) {
      const int64_t at = c * m + i;
      absorb(state, vectors ? sum.data() : nullptr, states[at], sums.data() + at * stride, p_.in.d);
    }
    write(i, state, sum.data());
  }
}

}  // namespace

void log_mixture_wide_cpu(const LogMixtureProblem& problem) { Forward(problem).run(); }

}  // namespace refine_ext
