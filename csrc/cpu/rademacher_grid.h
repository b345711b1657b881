// How csrc/cpu divides Rademacher sums among threads.
#pragma once

#include <algorithm>

#include "parallel.h"
#include "rademacher.h"
#include "scratch.h"

namespace refine_ext {

inline constexpr double kSerial = 1 << 20;  // multiplications that cost less than waking threads

// What threads share: `parts` of the blocks of columns times `chunks` of the draws. Parts see a draw's
// columns in any order; rows are never divided.
struct Grid {
  int64_t width;                         // columns of a block
  int64_t blocks, parts, chunks, draws;  // draws of a chunk

  Grid(int64_t n, int64_t m, int64_t all_draws, int64_t block_columns, bool one_part)
      : width(block_columns),
        blocks(divide_up(m, width)),
        parts(1),
        chunks(divide_up(all_draws, kChunkDraws)) {
    const double work = static_cast<double>(n) * static_cast<double>(m) * static_cast<double>(all_draws);
    const int64_t threads = work < kSerial ? 1 : num_threads();
    // Few blocks divide unevenly; many draws do not mind that each chunk makes its tables.
    if (!one_part && (blocks >= 8 * threads || all_draws < 256 * threads)) parts = std::min(threads, blocks);
    if (parts < threads) chunks = std::min(divide_up(chunks, threads) * threads, divide_up(all_draws, 16));
    draws = divide_up(all_draws, chunks);
    chunks = divide_up(all_draws, draws);
  }

  int64_t panel_columns() const { return std::min(kPanelBlocks, divide_up(blocks, parts)) * width; }

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
  void panels(int64_t part, int64_t m, const F& body) const {
    const int64_t last = std::min(m, blocks * (part + 1) / parts * width);
    const int64_t most = panel_columns();
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

// Of two parts' suprema, which have the lower columns first.
inline void merge_supremum(double other, int64_t other_index, double& best, int64_t& index) {
  if (other > best || (other != other && best == best)) {
    best = other;
    index = other_index;
  }
}

}  // namespace refine_ext
