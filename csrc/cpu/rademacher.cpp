#include "rademacher.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <vector>

#include "dispatch.h"
#include "parallel.h"
#include "scratch.h"

namespace refine_ext {

REFINE_EXT_KERNEL_TABLE(RademacherKernels, rademacher_kernels)

namespace {

constexpr double kSerial = 1 << 20;  // multiplications that cost less than waking threads

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// What threads share: `parts` of the blocks of columns times `chunks` of the draws. Parts see a draw's
// columns in any order; rows are never divided.
struct Grid {
  int64_t blocks, parts, chunks, draws;  // draws of a chunk

  Grid(int64_t n, int64_t m, int64_t all_draws, Storage storage, bool one_part)
      : blocks(divide_up(m, row_columns(storage))), parts(1), chunks(divide_up(all_draws, kChunkDraws)) {
    const double work = static_cast<double>(n) * static_cast<double>(m) * static_cast<double>(all_draws);
    const int64_t threads = work < kSerial ? 1 : num_threads();
    // Few blocks divide unevenly; many draws do not mind that each chunk makes its tables.
    if (!one_part && (blocks >= 8 * threads || all_draws < 256 * threads)) parts = std::min(threads, blocks);
    if (parts < threads) chunks = std::min(divide_up(chunks, threads) * threads, divide_up(all_draws, 16));
    draws = divide_up(all_draws, chunks);
    chunks = divide_up(all_draws, draws);
  }

  int64_t panel_blocks() const { return std::min(kPanelBlocks, divide_up(blocks, parts)); }

  // Calls body(part, chunk, scratch) for all of them; scratch has `bytes` of its own for each thread.
  template <class F>
  void run(int64_t bytes, const F& body) const {
    parallel_for(0, parts * chunks, 1, [&](int64_t begin, int64_t end) {
      const Scratch<char> scratch(bytes);
      for (int64_t t = begin; t < end; ++t) body(t / chunks, t % chunks, scratch.data());
    });
  }

  // Calls body(column, columns) for the panels of a part.
  template <class F>
  void panels(int64_t part, int64_t m, int64_t width, const F& body) const {
    const int64_t last = std::min(m, blocks * (part + 1) / parts * width);
    const int64_t most = panel_blocks() * width;
    for (int64_t column = blocks * part / parts * width; column < last; column += most) {
      body(column, std::min(most, last - column));
    }
  }
};

template <class Problem>
RademacherPanel panel_of(const Problem& p, int64_t column, int64_t columns, int64_t first, int64_t draws) {
  RademacherPanel panel{};
  panel.outputs = static_cast<const char*>(p.outputs) + column * size_of(p.storage);
  panel.storage = p.storage;
  panel.n = p.n;
  panel.stride = p.stride;
  panel.columns = columns;
  panel.draws = draws;
  panel.first_draw = p.first_draw + static_cast<uint64_t>(first);
  panel.seed = p.seed;
  panel.digits = 3;
  return panel;
}

}  // namespace

void rademacher_suprema_cpu(const RademacherProblem& p) {
  const RademacherKernels& kernels = rademacher_kernels_table();
  const bool norm = p.supremum == Supremum::norm;
  const int64_t width = row_columns(p.storage);
  const Grid grid(p.n, p.m, p.draws, p.storage, norm);
  const int64_t sums = grid.panel_blocks() * width * grid.draws, lanes = norm ? 16 * grid.draws : 0;
  std::fill(p.largest, p.largest + p.m, 0.0);
  // Of all parts but the first, whose are the results.
  std::vector<double> best((grid.parts - 1) * p.draws);
  std::vector<int64_t> index((grid.parts - 1) * p.draws);
  grid.run(8 * (sums + lanes) + kernels.scratch_bytes(p.n, grid.draws), [&](int64_t part, int64_t chunk,
                                                                            char* scratch) {
    const int64_t first = chunk * grid.draws, draws = std::min(grid.draws, p.draws - first);
    const int64_t at = (part - 1) * p.draws + first;
    const SupremumState state{part ? best.data() + at : p.suprema + first,
                              part ? index.data() + at : p.index + first,
                              reinterpret_cast<double*>(scratch) + sums};
    std::fill(state.best, state.best + draws, -HUGE_VAL);
    std::fill(state.index, state.index + draws, -1);
    std::fill(state.lanes, state.lanes + (norm ? 16 * draws : 0), 0.0);
    grid.panels(part, p.m, width, [&](int64_t column, int64_t columns) {
      RademacherPanel panel = panel_of(p, column, columns, first, draws);
      panel.digits = p.digits;
      panel.sums = reinterpret_cast<double*>(scratch);
      panel.largest = chunk == 0 ? p.largest + column : nullptr;
      panel.scratch = scratch + 8 * (sums + lanes);
      std::memset(panel.sums, 0, static_cast<size_t>(8 * sums));
      kernels.add_sums(panel);
      kernels.reduce(panel, column, p.supremum, state);
    });
    for (int64_t k = 0; norm && k < draws; ++k) {
      state.best[k] = std::sqrt(std::accumulate(state.lanes + 16 * k, state.lanes + 16 * (k + 1), 0.0));
    }
  });
  for (int64_t part = 1; part < grid.parts; ++part) {
    for (int64_t k = 0; k < p.draws; ++k) {
      const double other = best[(part - 1) * p.draws + k];
      if (other > p.suprema[k] || (other != other && p.suprema[k] == p.suprema[k])) {
        p.suprema[k] = other;
        p.index[k] = index[(part - 1) * p.draws + k];
      }
    }
  }
  for (int64_t k = 0; k < p.draws; ++k) p.suprema[k] /= static_cast<double>(p.n);
}

void rademacher_sums_cpu(const RademacherSumsProblem& p) {
  const RademacherKernels& kernels = rademacher_kernels_table();
  const int64_t width = row_columns(p.storage);
  const Grid grid(p.n, p.m, p.draws, p.storage, false);
  const int64_t sums = grid.panel_blocks() * width * grid.draws;
  grid.run(8 * sums + kernels.scratch_bytes(p.n, grid.draws),
           [&](int64_t part, int64_t chunk, char* scratch) {
             const int64_t first = chunk * grid.draws, draws = std::min(grid.draws, p.draws - first);
             grid.panels(part, p.m, width, [&](int64_t column, int64_t columns) {
               RademacherPanel panel = panel_of(p, column, columns, first, draws);
               panel.sums = reinterpret_cast<double*>(scratch);
               panel.scratch = scratch + 8 * sums;
               panel.first_row = p.first_row;
               std::memset(panel.sums, 0, static_cast<size_t>(8 * sums));
               // The caller's rows are of all columns.
               const auto each_row = [&](const auto& copy) {
                 for (int64_t j = 0; j < columns; j += width) {
                   const size_t bytes = static_cast<size_t>(std::min(width, columns - j)) * sizeof(double);
                   for (int64_t k = 0; k < draws; ++k) {
                     copy(p.sums + (first + k) * p.m + column + j, panel.sums + j * draws + k * width, bytes);
                   }
                 }
               };
               each_row([](double* outer, double* inner, size_t bytes) { std::memcpy(inner, outer, bytes); });
               kernels.add_sums(panel);
               each_row([](double* outer, double* inner, size_t bytes) { std::memcpy(outer, inner, bytes); });
             });
           });
}

void rademacher_backward_cpu(const RademacherBackwardProblem& p) {
  const RademacherKernels& kernels = rademacher_kernels_table();
  std::vector<int64_t> order(p.draws);
  std::iota(order.begin(), order.end(), 0);
  const auto column = [&](int64_t k) { return p.index[k] >= 0 ? p.index[k] : -1 - p.index[k]; };
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return column(a) < column(b); });
  const int64_t blocks = divide_up(p.n, kSignsPerPhilox);
  const int64_t grain = std::max<int64_t>(1, (int64_t{1} << 17) / (kSignsPerPhilox * (p.draws + p.m)));
  parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) {
    const Scratch<double> tile(kBackwardColumns * kSignsPerPhilox);
    kernels.backward(p, order.data(), tile.data(), begin * kSignsPerPhilox,
                     std::min(p.n, end * kSignsPerPhilox));
  });
}

void multipliers_cpu(const MultipliersProblem& p) {
  const int64_t grain = std::max<int64_t>(1, (int64_t{1} << 16) / std::max<int64_t>(1, p.n));
  parallel_for(0, p.draws, grain,
               [&](int64_t begin, int64_t end) { rademacher_kernels_table().multipliers(p, begin, end); });
}

}  // namespace refine_ext
