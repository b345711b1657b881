// Which passes to run over a row of weights, and in what order.
//
// One read gives every chunk's mass. Ascending methods then visit the chunks that own a draw, once more each:
// in all 2 reads of the weights and one write of the indices. Multinomial draws come in random order: with
// many of them C is written out beside a guide table, and each draw is two reads at random places; with few
// of them they are sorted.
#include <algorithm>
#include <atomic>
#include <memory>
#include <utility>
#include <vector>

#include "resampling_rows.h"
#include "scratch.h"

namespace refine_ext {

namespace {

constexpr int64_t kTaskDraws = 4 * kPlaced;  // of one chunk; more are shared out
constexpr int64_t kSortedShare = 16;         // sort the draws where there are fewer than n / kSortedShare
constexpr int64_t kPadding = 4;              // beyond every position, at the end of a table
constexpr int64_t kLookups = 4096;           // multinomial draws of one task's step

class Row {
 public:
  Row(const ResampleProblem& problem, int64_t row, bool threaded)
      : problem_(problem),
        kernels_(resampling_kernels_table()),
        begin_(row * problem.n),
        chunks_((problem.n + kDrawChunk - 1) / kDrawChunk),
        threaded_(threaded),
        sequence_(problem.seeds.sequence(row, Stream::resample)),
        out_(problem.out + row * problem.num) {}

  DrawError run() {
    const DrawError error = measure();
    if (error != DrawError::none || problem_.num == 0) return error;
    const Grid grid{bases_.back(), static_cast<uint64_t>(problem_.num)};
    switch (problem_.method) {
      case ResampleMethod::systematic:
      case ResampleMethod::stratified: {
        const uint64_t start = mulhi(random_bits(sequence_, problem_.seeds.offset), grid.total);
        ascending({grid, problem_.method, start, sequence_, problem_.seeds.offset}, bases_, nullptr, out_);
        break;
      }
      case ResampleMethod::multinomial:
        random_draws(bases_, out_, problem_.num,
                     [this](int64_t c, uint64_t* out) { chunk_boundaries(c, out); });
        break;
      case ResampleMethod::residual:
        residual(grid);
        break;
    }
    return DrawError::none;
  }

 private:
  template <class F>
  void over_chunks(F&& f) const {
    parallel_for(0, chunks_, threaded_ ? kGrainChunks : chunks_, [&](int64_t first, int64_t last) {
      for (int64_t c = first; c < last; ++c) f(c);
    });
  }

  int64_t chunk_length(int64_t c) const { return std::min(kDrawChunk, problem_.n - c * kDrawChunk); }

  // Every chunk's mass, the row's unit, and the sums before each chunk (and after the last) in that unit.
  DrawError measure() {
    masses_.resize(chunks_);
    std::atomic<bool> valid{true};
    over_chunks([&](int64_t c) {
      const int64_t from = begin_ + c * kDrawChunk;
      if (!kernels_.measure(problem_.storage, problem_.log, problem_.weights, from, from + chunk_length(c),
                            masses_[c])) {
        valid = false;
      }
    });
    if (!valid) return DrawError::invalid;
    int64_t top = INT64_MIN;
    for (const ChunkMass& mass : masses_) {
      if (mass.sum > 0) top = std::max(top, mass.exponent + bit_length(mass.sum));
    }
    if (top == INT64_MIN) return DrawError::no_mass;
    const auto total_in = [&](int64_t unit) {
      uint64_t total = 0;
      for (const ChunkMass& mass : masses_) total += align_mass(mass.sum, mass.exponent - unit);
      return total;
    };
    unit_ = first_unit(top, chunks_);
    unit_ = final_unit(unit_, total_in(unit_));
    bases_.resize(chunks_ + 1);
    bases_[0] = 0;
    for (int64_t c = 0; c < chunks_; ++c) {
      bases_[c + 1] = bases_[c] + align_mass(masses_[c].sum, masses_[c].exponent - unit_);
    }
    return DrawError::none;
  }

  void chunk_boundaries(int64_t c, uint64_t* out) const {
    const int64_t from = begin_ + c * kDrawChunk;
    kernels_.boundaries(problem_.storage, problem_.log, problem_.weights, from, from + chunk_length(c),
                        masses_[c].exponent, unit_, bases_[c], out);
  }

  // Indices of all ascending draws. bases: C before each chunk and after the last; table: C, or nullptr to
  // make it chunk by chunk.
  void ascending(const Ascending& draws, const std::vector<uint64_t>& bases, const uint64_t* table,
                 int64_t* out) const {
    struct Task {
      int64_t chunk;
      uint64_t first, last;
    };
    std::vector<Task> tasks;
    uint64_t first = 0;
    for (int64_t c = 0; c < chunks_; ++c) {
      const uint64_t last = c + 1 < chunks_ ? draws.draws_below(bases[c + 1]) : draws.grid.num;
      for (; first < last; first = std::min(last, first + kTaskDraws)) {
        tasks.push_back({c, first, std::min(last, first + kTaskDraws)});
      }
    }
    const double rate = static_cast<double>(draws.grid.num) / static_cast<double>(draws.grid.total);
    const int64_t count = static_cast<int64_t>(tasks.size());
    parallel_for(0, count, threaded_ ? kGrainChunks / 2 : count, [&](int64_t from, int64_t to) {
      alignas(64) uint64_t made[kDrawChunk], position[kPlaced + 2];
      for (int64_t k = from; k < to; ++k) {
        const Task& task = tasks[k];
        const int64_t elements = chunk_length(task.chunk), index = task.chunk * kDrawChunk;
        const uint64_t* bounds = table ? table + index : made;
        // The tasks of one chunk follow each other.
        if (!table && (k == from || tasks[k - 1].chunk != task.chunk)) chunk_boundaries(task.chunk, made);
        for (uint64_t j = task.first; j < task.last; j += kPlaced) {
          const int64_t part = static_cast<int64_t>(std::min<uint64_t>(kPlaced, task.last - j));
          kernels_.positions(draws, j, part, position);
          int64_t* to_out = out + j;
          if (part * 32 < elements) {
            for (int64_t i = 0; i < part; ++i) to_out[i] = index + owner(bounds, elements, position[i]);
            continue;
          }
          position[part] = position[part + 1] = UINT64_MAX;
          const uint64_t base = bases[task.chunk];
          kernels_.place(bounds, elements, base, draws.grid.place(base, j), rate, position, part, index,
                         to_out);
        }
      }
    });
  }

  static int64_t owner(const uint64_t* bounds, int64_t elements, uint64_t position) {
    return std::upper_bound(bounds, bounds + elements, position) - bounds;
  }

  // Multinomial draws; boundaries(c, out) makes C of a chunk.
  template <class F>
  void random_draws(const std::vector<uint64_t>& bases, int64_t* out, int64_t num, F&& boundaries) const {
    if (num < problem_.n / kSortedShare) {
      sorted_draws(bases, out, num, boundaries);
      return;
    }
    Scratch<uint64_t> table(problem_.n + kPadding);
    over_chunks([&](int64_t c) { boundaries(c, table.data() + c * kDrawChunk); });
    table_draws(table.data(), bases, out, num);
  }

  template <class F>
  void sorted_draws(const std::vector<uint64_t>& bases, int64_t* out, int64_t num, F&& boundaries) const {
    std::vector<uint64_t> bits(num);
    kernels_.random_numbers(sequence_, problem_.seeds.offset, num, bits.data());
    std::vector<std::pair<uint64_t, int64_t>> draws(num);
    for (int64_t j = 0; j < num; ++j) draws[j] = {mulhi(bits[j], bases.back()), j};
    std::sort(draws.begin(), draws.end());
    std::vector<int64_t> starts;  // the first draw of each chunk that has one, then num
    std::vector<int64_t> owners;
    for (int64_t j = 0; j < num;) {
      const auto chunk =
          std::upper_bound(bases.begin() + 1, bases.end(), draws[j].first) - (bases.begin() + 1);
      owners.push_back(chunk);
      starts.push_back(j);
      while (j < num && draws[j].first < bases[chunk + 1]) ++j;
    }
    starts.push_back(num);
    const int64_t count = static_cast<int64_t>(owners.size());
    parallel_for(0, count, threaded_ ? kGrainChunks : count, [&](int64_t from, int64_t to) {
      alignas(64) uint64_t bounds[kDrawChunk];
      for (int64_t k = from; k < to; ++k) {
        const int64_t c = owners[k];
        boundaries(c, bounds);
        for (int64_t j = starts[k]; j < starts[k + 1]; ++j) {
          out[draws[j].second] = c * kDrawChunk + owner(bounds, chunk_length(c), draws[j].first);
        }
      }
    });
  }

  // Draws at mulhi(U_j, T) among the boundaries of a table. The guide holds the first index beyond every
  // multiple of 2^shift: from there one step in the mean, whatever the weights, because positions are
  // uniform.
  void table_draws(uint64_t* table, const std::vector<uint64_t>& bases, int64_t* out, int64_t num) const {
    const uint64_t total = bases.back();
    std::fill_n(table + problem_.n, kPadding, UINT64_MAX);
    const int shift =
        std::max(0, bit_length(total) - std::max(1, bit_length(static_cast<uint64_t>(problem_.n)) - 1));
    const uint64_t buckets = ((total - 1) >> shift) + 1;
    Scratch<int64_t> guide(static_cast<int64_t>(buckets));
    ascending({{buckets << shift, buckets}, ResampleMethod::systematic, 0, sequence_, 0}, bases, table,
              guide.data());
    parallel_for(0, num, threaded_ ? 4 * kLookups : num, [&](int64_t from, int64_t to) {
      constexpr int64_t kAhead = 32;  // misses in flight
      alignas(64) uint64_t position[kLookups];
      int64_t index[kAhead];
      for (int64_t part = from; part < to; part += kLookups) {
        const int64_t length = std::min(kLookups, to - part);
        kernels_.random_numbers(sequence_, problem_.seeds.offset + static_cast<uint64_t>(part), length,
                                position);
        for (int64_t k = 0; k < length; ++k) position[k] = mulhi(position[k], total);
        for (int64_t k = 0; k < std::min(kAhead, length); ++k)
          __builtin_prefetch(guide.data() + (position[k] >> shift));
        for (int64_t batch = 0; batch < length; batch += kAhead) {
          const int64_t size = std::min(kAhead, length - batch);
          for (int64_t k = 0; k < size; ++k) {
            index[k] = guide.data()[position[batch + k] >> shift];
            __builtin_prefetch(table + index[k]);
          }
          for (int64_t k = batch + kAhead; k < std::min(length, batch + 2 * kAhead); ++k) {
            __builtin_prefetch(guide.data() + (position[k] >> shift));
          }
          for (int64_t k = 0; k < size; ++k) {
            int64_t i = index[k];
            // Four at a time: where the run ends is not to be predicted.
            for (int passed = 4; passed == 4; i += passed) {
              const uint64_t t = position[batch + k];
              passed = (table[i] <= t) + (table[i + 1] <= t) + (table[i + 2] <= t) + (table[i + 3] <= t);
            }
            out[part + batch + k] = i;
          }
        }
      }
    });
  }

  // Calls f(i, copies) for the elements of a chunk, given their boundaries, and returns the sum of the
  // copies.
  template <class F>
  int64_t certain_in(int64_t c, const Grid& grid, double rate, uint64_t* bounds, F&& f) const {
    chunk_boundaries(c, bounds);
    uint64_t before = bases_[c];
    int64_t sum = 0;
    for (int64_t i = 0; i < chunk_length(c); ++i) {
      const uint64_t mass = bounds[i] - before;
      before = bounds[i];
      // Exact arithmetic only where a rounding could have crossed an integer.
      const double expected = static_cast<double>(static_cast<int64_t>(mass)) * rate;
      int64_t copies = static_cast<int64_t>(expected);
      const double rest = expected - static_cast<double>(copies);
      if ((rest < 0x1p-10 && copies > 0) || rest > 1.0 - 0x1p-10) {
        copies = static_cast<int64_t>(certain_copies(mass, grid, rate));
      }
      sum += copies;
      f(i, copies);
    }
    return sum;
  }

  void residual(const Grid& grid) const {
    const double rate = static_cast<double>(grid.num) / static_cast<double>(grid.total);
    std::vector<int64_t> certain(chunks_ + 1, 0);  // copies before each chunk
    over_chunks([&](int64_t c) {
      alignas(64) uint64_t bounds[kDrawChunk];
      certain[c + 1] = certain_in(c, grid, rate, bounds, [](int64_t, int64_t) {});
    });
    for (int64_t c = 0; c < chunks_; ++c) certain[c + 1] += certain[c];
    const Remainder remainder(grid, static_cast<uint64_t>(certain.back()));
    // Writes the copies of a chunk, and makes its boundaries those of the remainder.
    const auto settle = [&](int64_t c, uint64_t* bounds) {
      int64_t at = certain[c];
      certain_in(c, grid, rate, bounds, [&](int64_t i, int64_t copies) {
        for (int64_t k = 0; k < copies; ++k) out_[at + k] = c * kDrawChunk + i;
        at += copies;
        bounds[i] = remainder.boundary(bounds[i], static_cast<uint64_t>(at));
      });
    };
    const int64_t draws = static_cast<int64_t>(remainder.draws);
    if (draws < problem_.n / kSortedShare || draws == 0) {
      // random_draws will settle the chunks that are drawn from only.
      over_chunks([&](int64_t c) {
        alignas(64) uint64_t bounds[kDrawChunk];
        if (certain[c + 1] > certain[c]) settle(c, bounds);
      });
    }
    if (draws == 0) return;
    std::vector<uint64_t> bases(chunks_ + 1);
    for (int64_t c = 0; c <= chunks_; ++c) {
      bases[c] = remainder.boundary(bases_[c], static_cast<uint64_t>(certain[c]));
    }
    random_draws(bases, out_ + certain.back(), draws, settle);
  }

  const ResampleProblem& problem_;
  const ResamplingKernels& kernels_;
  int64_t begin_, chunks_;
  bool threaded_;
  PhiloxSequence sequence_;
  int64_t* out_;
  std::vector<ChunkMass> masses_;
  int64_t unit_ = 0;
  std::vector<uint64_t> bases_;
};

}  // namespace

DrawReport resample_cpu(const ResampleProblem& problem) {
  return for_drawn_rows(problem.rows, problem.n + problem.num,
                        [&](int64_t row, bool threaded) { return Row(problem, row, threaded).run(); });
}

}  // namespace refine_ext
