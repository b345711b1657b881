#include "rademacher.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <vector>

#include "dispatch.h"
#include "rademacher_grid.h"

namespace refine_ext {

REFINE_EXT_KERNEL_TABLE(RademacherKernels, rademacher_kernels)
REFINE_EXT_KERNEL_TABLE(SignKernels, sign_kernels)

namespace {

void dense_suprema(const RademacherProblem& p) {
  const RademacherKernels& kernels = rademacher_kernels_table();
  const bool norm = p.supremum == Supremum::norm;
  const Grid grid(p.n, p.m, p.draws, row_columns(p.storage), norm);
  const int64_t sums = grid.panel_columns() * grid.draws, lanes = norm ? 16 * grid.draws : 0;
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
    grid.panels(part, p.m, [&](int64_t column, int64_t columns) {
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
      const int64_t at = (part - 1) * p.draws + k;
      merge_supremum(best[at], index[at], p.suprema[k], p.index[k]);
    }
  }
}

}  // namespace

void rademacher_suprema_cpu(const RademacherProblem& p) {
  std::fill(p.largest, p.largest + p.m, 0.0);
  for (int64_t first = 0; first < p.draws; first += kScreenedDraws) {
    RademacherProblem part = p;
    part.draws = std::min(kScreenedDraws, p.draws - first);
    part.first_draw = p.first_draw + static_cast<uint64_t>(first);
    part.suprema = p.suprema + first;
    part.index = p.index + first;
    if (!screened_suprema_cpu(part)) dense_suprema(part);
  }
  for (int64_t k = 0; k < p.draws; ++k) p.suprema[k] /= static_cast<double>(p.n);
}

void rademacher_sums_cpu(const RademacherSumsProblem& p) {
  const RademacherKernels& kernels = rademacher_kernels_table();
  const int64_t width = row_columns(p.storage);
  const Grid grid(p.n, p.m, p.draws, width, false);
  const int64_t sums = grid.panel_columns() * grid.draws;
  grid.run(8 * sums + kernels.scratch_bytes(p.n, grid.draws),
           [&](int64_t part, int64_t chunk, char* scratch) {
             const int64_t first = chunk * grid.draws, draws = std::min(grid.draws, p.draws - first);
             grid.panels(part, p.m, [&](int64_t column, int64_t columns) {
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
  const SignKernels& kernels = sign_kernels_table();
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
               [&](int64_t begin, int64_t end) { sign_kernels_table().multipliers(p, begin, end); });
}

}  // namespace refine_ext
