// CPU drivers of the Gaussian log-mixture.
#include "log_mixture.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "dispatch.h"
#include "log_mixture_wide.h"
#include "parallel.h"
#include "scratch.h"

#define REFINE_EXT_ISA isa_baseline
#include "log_mixture_row_gradient.h"

namespace refine_ext {

using isa_baseline::RowGradient;
using isa_baseline::write_score;

REFINE_EXT_KERNEL_TABLE(LogMixtureKernels, log_mixture_kernels)

namespace {

// Sums over some of the centres, for a block of rows.
struct Sums {
  Scratch<MixtureState> states;
  Scratch<double> means;  // [rows][d], or empty

  Sums(int64_t rows, int64_t d) : states(rows), means(rows * d) {}
};

class Forward {
 public:
  Forward(const LogMixtureProblem& problem, const LogMixtureKernels& kernels)
      : p_(problem),
        in_(problem.in),
        kernels_(kernels),
        vectors_(problem.mean || problem.score),
        plan_(kernels.plan(in_, vectors_)),
        chunks_((in_.n + plan_.chunk_centers - 1) / plan_.chunk_centers),
        mean_columns_(vectors_ ? in_.d : 0),
        gradient_(in_) {}

  void run() const {
    const int64_t units = (in_.m + kUnit - 1) / kUnit, threads = num_threads();
    // Rows are divided while each thread has some units; or else their centres are.
    if (chunks_ == 1 || threads == 1 || units >= 2 * threads) {
      const double work = static_cast<double>(kUnit * in_.n) * static_cast<double>(in_.d + 8);
      const int64_t least = 1 + static_cast<int64_t>(kLeastWork / work);
      // Some blocks for each thread; of more than one unit an even number, which fills the widest lanes.
      const int64_t share = (units + 4 * threads - 1) / (4 * threads);
      const int64_t block = threads == 1 ? units : std::max(least, share > 1 ? (share + 1) / 2 * 2 : 1);
      for_rows(std::min(block * kUnit, plan_.block_rows), threads);
    } else {
      for (int64_t first = 0; first < in_.m; first += plan_.block_rows) {
        share_centers(first, std::min(plan_.block_rows, in_.m - first));
      }
    }
  }

 private:
  static constexpr int64_t kUnit = 16;           // rows that stay on a thread
  static constexpr double kLeastWork = 1 << 20;  // of a thread, in operations on numbers: some 20 us
  static constexpr int64_t kSharedBytes = 64 << 20;

  // Blocks of `most` rows.
  void for_rows(int64_t most, int64_t threads) const {
    most = std::min(most, in_.m);
    share((in_.m + most - 1) / most, threads, [&](const auto& next) {
      const Scratch<char> memory(kernels_.memory_bytes(in_, plan_, most, vectors_));
      const Sums total(most, mean_columns_), part(chunks_ > 1 ? most : 0, mean_columns_);
      for (int64_t block; (block = next()) >= 0;) {
        const int64_t first = block * most, rows = std::min(most, in_.m - first);
        for (int64_t c = 0; c < chunks_; ++c) {
          add(first, rows, c, c == 0 ? total : part, memory.data());
          if (c > 0) merge(part, rows, total);
        }
        write(first, rows, total);
      }
    });
  }

  // As many chunks at a time as memory allows, each on one thread.
  void share_centers(int64_t first, int64_t rows) const {
    const int64_t bytes = rows * (static_cast<int64_t>(sizeof(MixtureState)) + 8 * mean_columns_);
    const int64_t wave = std::clamp(kSharedBytes / bytes, std::min(chunks_, num_threads()), chunks_);
    std::vector<std::unique_ptr<Sums>> sums(wave + 1);
    for (auto& each : sums) each = std::make_unique<Sums>(rows, mean_columns_);
    const Sums& total = *sums[wave];
    for (int64_t c = 0; c < chunks_; c += wave) {
      const int64_t count = std::min(wave, chunks_ - c);
      parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
        const Scratch<char> memory(kernels_.memory_bytes(in_, plan_, rows, vectors_));
        for (int64_t w = begin; w < end; ++w) {
          add(first, rows, c + w, c + w == 0 ? total : *sums[w], memory.data());
        }
      });
      for (int64_t w = c == 0 ? 1 : 0; w < count; ++w) merge(*sums[w], rows, total);
    }
    write(first, rows, total);
  }

  void add(int64_t first_row, int64_t rows, int64_t c, const Sums& to, char* memory) const {
    const int64_t first = c * plan_.chunk_centers, centers = std::min(plan_.chunk_centers, in_.n - first);
    kernels_.add({in_, plan_, first_row, rows, first, centers, p_.stats != nullptr, to.states.data(),
                  vectors_ ? to.means.data() : nullptr, p_.score != nullptr, memory});
  }

  void merge(const Sums& part, int64_t rows, const Sums& total) const {
    for (int64_t i = 0; i < rows; ++i) {
      MixtureState& state = total.states.data()[i];
      const MixtureState own = part.states.data()[i], all = merged(state, own);
      const double before = power_of_difference(state.reference, all.reference);
      const double after = power_of_difference(own.reference, all.reference);
      state = all;
      double* to = total.means.data() + i * mean_columns_;
      const double* from = part.means.data() + i * mean_columns_;
      for (int64_t k = 0; k < mean_columns_; ++k) to[k] = to[k] * before + from[k] * after;
    }
  }

  void write(int64_t first, int64_t rows, const Sums& total) const {
    for (int64_t i = 0; i < rows; ++i) {
      const MixtureState& state = total.states.data()[i];
      const int64_t row = first + i;
      p_.value[row] = mixture_value(state);
      if (p_.stats) {
        p_.stats[2 * row] = mixture_top_weight(state);
        p_.stats[2 * row + 1] = mixture_effective(state);
        p_.top[row] = state.index;
      }
      const double* sums = total.means.data() + i * mean_columns_;
      if (p_.score) write_score(p_, gradient_, row, state.sum, sums);
      for (int64_t k = 0; p_.mean && k < in_.d; ++k) {
        const double mean = sums[k] / state.sum;
        if (in_.storage == Storage::float64) {
          static_cast<double*>(p_.mean)[row * in_.d + k] = mean;
        } else {
          static_cast<float*>(p_.mean)[row * in_.d + k] = static_cast<float>(mean);
        }
      }
    }
  }

  const LogMixtureProblem& p_;
  const MixtureInputs& in_;
  const LogMixtureKernels& kernels_;
  const bool vectors_;
  const MixturePlan plan_;
  const int64_t chunks_, mean_columns_;
  const RowGradient gradient_;
};

}  // namespace

void log_mixture_cpu(const LogMixtureProblem& problem) {
  if (problem.in.m == 0) return;
  if (is_wide(problem.in)) return log_mixture_wide_cpu(problem);
  const LogMixtureKernels& kernels = log_mixture_kernels_table();
  Forward(problem, kernels).run();
}

}  // namespace refine_ext
