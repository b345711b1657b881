// Rejection sampling, and independent Metropolis-Hastings: one decision per sample or step.
#include <atomic>
#include <cmath>

#include "resampling_rows.h"

namespace refine_ext {
namespace {

double largest_of(const ResamplingKernels& kernels, Storage storage, const void* p, int64_t begin,
                  int64_t end, bool threaded) {
  const int64_t ranges = (end - begin + kGrain - 1) / kGrain;
  std::vector<double> found(ranges);
  parallel_for(0, ranges, threaded ? 1 : ranges, [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) {
      found[r] = kernels.largest(storage, p, begin + r * kGrain, std::min(end, begin + (r + 1) * kGrain));
    }
  });
  double best = -HUGE_VAL;
  for (const double value : found) {
    if (std::isnan(value)) return value;
    best = std::max(best, value);
  }
  return best;
}

// One chain. A batch of steps is prepared at once: its random numbers and proposals do not depend on the
// state.
class Chain {
 public:
  Chain(const MetropolisProblem& problem, int64_t chain)
      : problem_(problem),
        kernels_(resampling_kernels_table()),
        chain_(chain),
        steps_(metropolis_steps(problem.num, problem.burn_in, problem.thin)),
        sequence_{static_cast<uint64_t>(problem.seed), static_cast<uint64_t>(chain), Stream::metropolis} {}

  template <class Load>
  void run(Load&& load) const {
    constexpr int64_t kBatch = 512;
    alignas(64) uint64_t proposal[kBatch];
    alignas(64) double log_unit[kBatch], proposed[kBatch];
    double current = problem_.initial ? problem_.initial[chain_] : 0.0;
    int64_t state = -1, accepted = 0, drawn = 0, due = problem_.burn_in;
    int64_t* out = problem_.out + chain_ * problem_.num;
    for (int64_t first = 0; first < steps_; first += kBatch) {
      const int64_t count = std::min(kBatch, steps_ - first);
      kernels_.steps(sequence_, static_cast<uint64_t>(first), count, proposal, log_unit);
      for (int64_t k = 0; k < count; ++k) {
        proposal[k] = problem_.in_order ? static_cast<uint64_t>(chain_ * steps_ + first + k)
                                        : mulhi(proposal[k], static_cast<uint64_t>(problem_.n));
      }
      for (int64_t k = 0; k < count; ++k) proposed[k] = load(proposal[k]);
      if (first == 0 && !problem_.initial) {
        // Taken whatever its ratio; compared with itself below, which must not count.
        state = static_cast<int64_t>(proposal[0]);
        current = proposed[0];
        accepted -= metropolis_accepts(log_unit[0], current, current);
      }
      for (int64_t k = 0; k < count; ++k) {
        // By masks: a branch on what chance decides is mispredicted as often as not.
        const int64_t take = -static_cast<int64_t>(metropolis_accepts(log_unit[k], proposed[k], current));
        state ^= (state ^ static_cast<int64_t>(proposal[k])) & take;
        const int64_t bits = std::bit_cast<int64_t>(current);
        current = std::bit_cast<double>(bits ^ ((bits ^ std::bit_cast<int64_t>(proposed[k])) & take));
        accepted -= take;
        if (first + k == due) {
          if (state < 0) {
            state = static_cast<int64_t>(proposal[k]);
            current = proposed[k];
          }
          out[drawn++] = state;
          due += problem_.thin;
        }
      }
    }
    problem_.accepted[chain_] = accepted;
  }

 private:
  const MetropolisProblem& problem_;
  const ResamplingKernels& kernels_;
  int64_t chain_, steps_;
  PhiloxSequence sequence_;
};

// Single values of the 16-bit types, widened exactly.
double from_bfloat16(uint16_t bits) { return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }
double from_half(uint16_t bits) {
  // The fields of a half in those of a float read as the value times 2^-112.
  const uint32_t magnitude = static_cast<uint32_t>(bits & 0x7fffu) << 13;
  const bool special = magnitude >= (0x7c00u << 13);
  const double value = special ? std::bit_cast<float>(magnitude | 0x7f800000u)
                               : static_cast<double>(std::bit_cast<float>(magnitude)) * 0x1p112;
  return bits & 0x8000u ? -value : value;
}

}  // namespace

DrawReport rejection_cpu(const RejectionProblem& problem) {
  const ResamplingKernels& kernels = resampling_kernels_table();
  return for_drawn_rows(problem.rows, problem.n, [&](int64_t row, bool threaded) {
    const int64_t begin = row * problem.n, end = begin + problem.n;
    double bound = largest_of(kernels, problem.storage, problem.log_ratio, begin, end, threaded);
    if (std::isnan(bound)) return DrawError::invalid;
    if (problem.log_bound) bound = std::max(bound, problem.log_bound[row]);
    const Acceptance acceptance = problem.gamma
                                      ? Acceptance::shifted(bound, problem.gamma[row], problem.epsilon)
                                      : Acceptance::plain(bound);
    const PhiloxSequence sequence = problem.seeds.sequence(row, Stream::rejection);
    // Number offset + i belongs to sample i of the row, wherever the row begins.
    const uint64_t offset = problem.seeds.offset - static_cast<uint64_t>(begin);
    std::atomic<int64_t> accepted{0};
    parallel_for(begin, end, threaded ? kGrain : problem.n, [&](int64_t from, int64_t to) {
      accepted += kernels.accept(problem.storage, problem.log_ratio, from, to, acceptance, sequence, offset,
                                 problem.keep);
    });
    problem.new_bound[row] = bound;
    problem.accepted[row] = accepted;
    return DrawError::none;
  });
}

DrawReport metropolis_cpu(const MetropolisProblem& problem) {
  const double bound =
      largest_of(resampling_kernels_table(), problem.storage, problem.log_ratio, 0, problem.n, true);
  if (std::isnan(bound)) return {DrawError::invalid, 0};
  const int64_t steps = metropolis_steps(problem.num, problem.burn_in, problem.thin);
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(steps, 1));
  parallel_for(0, problem.chains, grain, [&](int64_t first, int64_t last) {
    for (int64_t c = first; c < last; ++c) {
      const Chain chain(problem, c);
      const void* p = problem.log_ratio;
      switch (problem.storage) {
        case Storage::float64:
          chain.run([p](uint64_t i) { return static_cast<const double*>(p)[i]; });
          break;
        case Storage::float32:
          chain.run([p](uint64_t i) { return double{static_cast<const float*>(p)[i]}; });
          break;
        case Storage::float16:
          chain.run([p](uint64_t i) { return from_half(static_cast<const uint16_t*>(p)[i]); });
          break;
        case Storage::bfloat16:
          chain.run([p](uint64_t i) { return from_bfloat16(static_cast<const uint16_t*>(p)[i]); });
          break;
      }
    }
  });
  return {};
}

}  // namespace refine_ext
