// Suprema by screening (rademacher.h).
#include <atomic>
#include <cmath>
#include <cstring>
#include <vector>

#include "dispatch.h"
#include "rademacher_grid.h"

namespace refine_ext {

REFINE_EXT_KERNEL_TABLE(RademacherKernels, rademacher_kernels)
REFINE_EXT_KERNEL_TABLE(ScreenKernels, screen_kernels)

namespace {

constexpr int64_t kScreenColumns = 32;  // of a block: 64 bytes of 16-bit integers

// Screening pays where tables are looked up often, and where the error's bound, which grows with n, is well
// below the spread of the sums, which grows with its root.
bool worth_screening(const RademacherProblem& p) {
  return p.supremum != Supremum::norm && p.draws >= 384 && p.m >= 64 && p.n <= (int64_t{1} << 17);
}

struct Screening {
  std::vector<float> floor;            // [parts][draws]
  std::vector<Candidates> candidates;  // [parts][draws]
};

bool screen(const RademacherProblem& p, const Grid& grid, Screening& found) {
  const int64_t sums = grid.panel_columns() * grid.draws;
  found.floor.assign(grid.parts * p.draws, -HUGE_VALF);
  found.candidates.resize(grid.parts * p.draws);
  std::atomic<bool> possible{true};
  const int64_t bytes = 4 * sums + rademacher_kernels_table().scratch_bytes(p.n, grid.draws);
  grid.run(bytes, [&](int64_t part, int64_t chunk, char* scratch) {
    const int64_t first = chunk * grid.draws, draws = std::min(grid.draws, p.draws - first);
    const int64_t at = part * p.draws + first;
    grid.panels(part, p.m, [&](int64_t column, int64_t columns) {
      if (!possible.load(std::memory_order_relaxed)) return;
      RademacherPanel panel = panel_of(p, column, columns, first, draws);
      panel.sums = reinterpret_cast<double*>(scratch);
      panel.largest = chunk == 0 ? p.largest + column : nullptr;
      panel.scratch = scratch + 4 * sums;
      std::memset(scratch, 0, static_cast<size_t>(4 * sums));
      const ScreenState state{found.floor.data() + at, found.candidates.data() + at};
      if (!screen_kernels_table().screen(panel, column, p.supremum, state)) possible = false;
    });
  });
  return possible;
}

// The draws to sum exactly in each block of columns; none: too many.
std::vector<std::vector<int64_t>> chosen_draws(const RademacherProblem& p, const Grid& grid,
                                               Screening& found) {
  const int64_t width = row_columns(p.storage), blocks = divide_up(p.m, width);
  std::vector<std::vector<int64_t>> chosen(blocks);
  int64_t room = p.draws * std::min<int64_t>(blocks / 3, 64);  // beyond which summing everything costs less
  for (int64_t k = 0; k < p.draws && room >= 0; ++k) {
    float floor = -HUGE_VALF;
    for (int64_t part = 0; part < grid.parts; ++part)
      floor = std::max(floor, found.floor[part * p.draws + k]);
    for (int64_t part = 0; part < grid.parts; ++part) {
      Candidates& own = found.candidates[part * p.draws + k];
      own.keep(floor);
      const bool any = own.count > Candidates::kMost;
      // All blocks of a part that kept too many, and of the others too: the panels' order does not matter.
      for (int64_t c = 0; c < (any ? blocks : own.count); ++c) {
        std::vector<int64_t>& draws = chosen[any ? c : own.column[c] / width];
        if (!draws.empty() && draws.back() == k) continue;
        draws.push_back(k);
        --room;
      }
    }
  }
  if (room < 0) chosen.clear();
  return chosen;
}

}  // namespace

bool screened_suprema_cpu(const RademacherProblem& p) {
  if (!worth_screening(p)) return false;
  const Grid grid(p.n, p.m, p.draws, kScreenColumns, false);
  Screening found;
  if (!screen(p, grid, found)) return false;
  const std::vector<std::vector<int64_t>> chosen = chosen_draws(p, grid, found);
  if (chosen.empty()) return false;

  const RademacherKernels& kernels = rademacher_kernels_table();
  const int64_t width = row_columns(p.storage), blocks = static_cast<int64_t>(chosen.size());
  int64_t most = 0;
  for (const std::vector<int64_t>& draws : chosen) most = std::max(most, static_cast<int64_t>(draws.size()));
  most = std::min(most, kChunkDraws);
  const int64_t parts = grid.parts * grid.chunks > 1 ? std::min(num_threads(), blocks) : 1;
  std::vector<double> best(parts * p.draws, -HUGE_VAL);
  std::vector<int64_t> index(parts * p.draws, -1);
  parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    const Scratch<char> scratch(8 * most * width + kernels.scratch_bytes(p.n, most));
    for (int64_t part = begin; part < end; ++part) {
      const SupremumState state{best.data() + part * p.draws, index.data() + part * p.draws, nullptr};
      for (int64_t b = blocks * part / parts; b < blocks * (part + 1) / parts; ++b) {
        const int64_t count = static_cast<int64_t>(chosen[b].size());
        for (int64_t first = 0; first < count; first += most) {
          RademacherPanel panel =
              panel_of(p, b * width, std::min(width, p.m - b * width), 0, std::min(most, count - first));
          panel.chosen = chosen[b].data() + first;
          panel.digits = p.digits;
          panel.sums = reinterpret_cast<double*>(scratch.data());
          panel.scratch = scratch.data() + 8 * most * width;
          std::memset(panel.sums, 0, static_cast<size_t>(8 * most * width));
          kernels.add_sums(panel);
          kernels.reduce(panel, b * width, p.supremum, state);
        }
      }
    }
  });
  std::copy(best.begin(), best.begin() + p.draws, p.suprema);
  std::copy(index.begin(), index.begin() + p.draws, p.index);
  for (int64_t part = 1; part < parts; ++part) {
    for (int64_t k = 0; k < p.draws; ++k) {
      merge_supremum(best[part * p.draws + k], index[part * p.draws + k], p.suprema[k], p.index[k]);
    }
  }
  return true;
}

}  // namespace refine_ext
