// A block of rows and a block of centres of the log-mixture's gradients, compiled once per instruction set.
//
// A tile of weights p_ij is made as the forward makes it, a row in each lane, and the sums follow in it:
// those over centres in the lanes of the rows, those over rows in the lanes too until the block of rows is
// done.
//
// Weights below the smallest normal number are taken for zero, and what they would be multiplied with is
// left out: a tile without any other is not summed.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "log_mixture_backward.h"
#include "log_mixture_row_gradient.h"
#include "log_mixture_tile.h"
#include "parallel.h"

namespace refine_ext::REFINE_EXT_ISA {
namespace {

// Centres of a block are as many as a float32 sum takes well.
constexpr int64_t kBlockRows = 512, kBlockCenters = 128, kBlockElements = int64_t{1} << 18;
constexpr int64_t kLeastRows = 256;  // of sums over rows, which go across lanes at the end of a block
constexpr int64_t kRowBlocks = 16;   // at least, for the threads to share

inline int64_t rounded_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

template <class S>
REFINE_EXT_INLINE S lanes_sum(Vec<S> v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(S) == 4) {
    return _mm512_reduce_add_ps((__m512)v.v);
  } else {
    return _mm512_reduce_add_pd((__m512d)v.v);
  }
#else
  S part[Vec<S>::kWidth];
  v.store(part);
#pragma GCC unroll 4
  for (int half = Vec<S>::kWidth / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
    for (int l = 0; l < half; ++l) part[l] += part[l + half];
  }
  return part[0];
#endif
}

// Where things are in the scratch memory of a block of rows.
template <class S>
struct Scene {
  using V = Vec<S>;
  using Tile = MixtureTile<S>;
  using Index = typename IntegerOf<S>::type;
  static constexpr int kWidth = V::kWidth, kVectors = Tile::kVectors, kRows = Tile::kRows;
  static constexpr int kCenters = Tile::kCenters;

  const MixtureBackwardPlan& plan;
  const MixtureInputs& in;
  int64_t d;
  bool over_rows;
  // Of the block of rows. Panels of kRows of them, [d][kRows]: x, and sums to be multiplied with the row's
  // factor, of the block of centres and of those before.
  S *x, *slope;
  double* total;
  S *high, *low;    // of the value in units of log 2; infinite where nothing is asked of the row
  S* grad;          // 1 where no sums over rows are wanted
  Index* exclude;   // within the block of centres
  bool* undefined;  // a panel has NaN
  // Of the block of centres.
  S *tiles, *weights, *squares;
  S *slopes, *spreads;  // sums over rows, of a tile [d][kCenters][kWidth]
  int64_t bytes = 0;

  Scene(const MixtureBackwardPlan& p, void* memory)
      : plan(p), in(p.problem.in), d(in.d), over_rows(p.over_rows()) {
    const bool over_dims = plan.slopes || plan.spreads;
    const bool per_dimension = in.scale_kind == MixtureScale::per_dimension;
    const auto take = [&](auto*& pointer, int64_t count) {
      using Element = std::remove_reference_t<decltype(*pointer)>;
      pointer = reinterpret_cast<Element*>(static_cast<char*>(memory) + bytes);
      bytes += rounded_up(count * static_cast<int64_t>(sizeof(Element)), 64);
    };
    take(x, plan.rows * d);
    take(slope, plan.rows * d);
    take(total, plan.rows * d);
    take(high, plan.rows);
    take(low, plan.rows);
    take(grad, plan.rows);
    take(exclude, plan.rows);
    take(undefined, plan.rows / kRows);
    take(tiles, plan.centers / kCenters * tile_size());
    take(weights, plan.weights ? plan.centers * kWidth : 0);
    take(squares, plan.squares ? plan.centers * kWidth : 0);
    const int64_t sums = over_dims ? kCenters * kWidth * d : 0;
    take(slopes, sums);
    take(spreads, per_dimension ? sums : 0);
  }
  int64_t tile_size() const { return rounded_up(CenterTile<S>::size(in), kWidth); }
  CenterTile<S> tile(int64_t at) const { return CenterTile<S>(in, tiles + at * tile_size()); }
  int64_t rows_of(int64_t row_block) const { return std::min(plan.rows, in.m - row_block * plan.rows); }
  int64_t panels_of(int64_t row_block) const { return (rows_of(row_block) + kRows - 1) / kRows; }
};

template <class S, class T>
void begin(const MixtureBackwardPlan& plan, int64_t row_block, void* scratch) {
  const Scene<S> at(plan, scratch);
  constexpr int kRows = Scene<S>::kRows;
  constexpr S kInfinity = std::numeric_limits<S>::infinity();
  const MixtureInputs& in = plan.problem.in;
  const int64_t d = in.d, first = row_block * plan.rows, rows = at.rows_of(row_block);
  for (int64_t panel = 0; panel < at.panels_of(row_block); ++panel) {
    S* x = at.x + panel * kRows * d;
    pack_rows<Scene<S>::kVectors, S, T>(in, first + panel * kRows, x);
    bool undefined = false;
    for (int64_t r = panel * kRows; r < (panel + 1) * kRows; ++r) {
      const double value = r < rows ? kLog2E * plan.problem.value[first + r] : 0.0;
      const double grad = r < rows ? plan.problem.grad[first + r] : 0.0;
      if (grad == 0.0 || value == -HUGE_VAL) {
        // No gradient, whatever x is: a row without centres stays without.
        at.high[r] = kInfinity;
        at.low[r] = at.grad[r] = 0;
        for (int64_t k = 0; k < d; ++k) x[k * kRows + r % kRows] = 0;
        continue;
      }
      at.high[r] = static_cast<S>(value);
      at.low[r] = static_cast<S>(value - at.high[r]);
      at.grad[r] = at.over_rows ? static_cast<S>(grad) : S(1);
      undefined |= value != value;
    }
    at.undefined[panel] = undefined;
  }
  std::memset(at.total, 0, static_cast<size_t>(plan.rows * d) * sizeof(double));
}

// w_ij = g_i p_ij; with `square` the sums (x - y)^2 too. False: all are zero.
template <int kDims, bool kScaled, class S>
REFINE_EXT_INLINE bool tile_weights(const Scene<S>& at, int64_t panel, int64_t t, bool excluding,
                                    const CenterTile<S>& tile, Vec<S> (&w)[2][Scene<S>::kCenters],
                                    Vec<S> (&square)[2][Scene<S>::kCenters]) {
  using V = Vec<S>;
  constexpr int kWidth = Scene<S>::kWidth, kRows = Scene<S>::kRows, kCenters = Scene<S>::kCenters;
  // The exponent of the smallest normal number, and one of less than the smallest number.
  const V least = V::splat(S(1 - Tables<S>::kBias)), none = V::splat(S(-2 * Tables<S>::kBias));
  tile_distances<kDims, kScaled>(at.x + panel * kRows * at.d, tile, at.d, square);
  V largest[2] = {none, none};
#pragma GCC unroll 2
  for (int r = 0; r < 2; ++r) {
    const V opposite = V::splat(0) - V::load(at.high + panel * kRows + r * kWidth);
    const V low = V::load(at.low + panel * kRows + r * kWidth);
#pragma GCC unroll 8
    for (int j = 0; j < kCenters; ++j) {
      w[r][j] = exponent(tile, j, square[r][j], opposite) - low;
    }
  }
  if (excluding) {
    using Bits = typename V::Bits;
#pragma GCC unroll 2
    for (int r = 0; r < 2; ++r) {
      Bits left_out;
      std::memcpy(&left_out, at.exclude + panel * kRows + r * kWidth, sizeof left_out);
      left_out -= static_cast<typename V::Integer>(t * kCenters);
#pragma GCC unroll 8
      for (int j = 0; j < kCenters; ++j) w[r][j] = select(VecMask<S>{left_out == j}, none, w[r][j]);
    }
  }
#pragma GCC unroll 2
  for (int r = 0; r < 2; ++r) {
#pragma GCC unroll 8
    for (int j = 0; j < kCenters; ++j) largest[r] = max_or_second(w[r][j], largest[r]);
  }
  if (!any(max_or_second(largest[0], largest[1]) > least) && !at.undefined[panel]) return false;
#pragma GCC unroll 2
  for (int r = 0; r < 2; ++r) {
    const V grad = V::load(at.grad + panel * kRows + r * kWidth);
#pragma GCC unroll 8
    for (int j = 0; j < kCenters; ++j) {
      w[r][j] = grad * PowerOfTwo<S>(select(w[r][j] < least, none, w[r][j])).value();
    }
  }
  return true;
}

// Sums of the weights, and of their squares.
template <class S>
REFINE_EXT_INLINE void add_weights(const Scene<S>& at, int64_t t, const Vec<S> (&w)[2][Scene<S>::kCenters],
                                   const Vec<S> (&square)[2][Scene<S>::kCenters]) {
  using V = Vec<S>;
  constexpr int kCenters = Scene<S>::kCenters;
  const auto add = [&](S* to, auto&& term) {
#pragma GCC unroll 8
    for (int j = 0; j < kCenters; ++j) {
      S* p = to + (t * kCenters + j) * V::kWidth;
      (V::load(p) + (term(0, j) + term(1, j))).store(p);
    }
  };
  if (at.plan.weights) add(at.weights, [&](int r, int j) { return w[r][j]; });
  if (at.plan.squares) add(at.squares, [&](int r, int j) { return w[r][j] * square[r][j]; });
}

template <int kDims, bool kScaled, bool kX, bool kY, class S>
void sum_tile(const Scene<S>& at, int64_t panel, int64_t t, bool excluding) {
  using V = Vec<S>;
  constexpr int kWidth = Scene<S>::kWidth, kRows = Scene<S>::kRows, kCenters = Scene<S>::kCenters;
  const CenterTile<S> tile = at.tile(t);
  V w[2][kCenters], square[2][kCenters];
  if (!tile_weights<kDims, kScaled>(at, panel, t, excluding, tile, w, square)) return;
  if (at.plan.weights || at.plan.squares) add_weights(at, t, w, square);
  if constexpr (!kX && !kY) return;
  if (at.in.scale_kind == MixtureScale::per_center) {
#pragma GCC unroll 8
    for (int j = 0; j < kCenters; ++j) {
      w[0][j] = w[0][j] * V::splat(tile.slope[j]);
      w[1][j] = w[1][j] * V::splat(tile.slope[j]);
    }
  }
  const S* x = at.x + panel * kRows * at.d;
  S* slope = at.slope + panel * kRows * at.d;
  const int64_t dims = kDims ? kDims : at.d;
#pragma GCC unroll 4
  for (int64_t k = 0; k < dims; ++k) {
    V row[2], sum[2];
#pragma GCC unroll 2
    for (int r = 0; r < 2; ++r) {
      row[r] = V::load(x + k * kRows + r * kWidth);
      if constexpr (kX) sum[r] = V::load(slope + k * kRows + r * kWidth);
    }
#pragma GCC unroll 8
    for (int j = 0; j < kCenters; ++j) {
      const V y = V::splat(tile.values[k * kCenters + j]);
      V terms[2], squares[2];
#pragma GCC unroll 2
      for (int r = 0; r < 2; ++r) {
        const V difference = row[r] - y;
        if constexpr (kScaled || kY) terms[r] = w[r][j] * difference;
        if constexpr (kScaled) {
          const V inverse = V::splat(tile.inverse[k * kCenters + j]);
          squares[r] = terms[r] * difference;
          if constexpr (kX) sum[r] = (terms[r] * inverse) * inverse + sum[r];
        } else if constexpr (kX) {
          sum[r] = w[r][j] * difference + sum[r];
        }
      }
      // Every use of a term is a multiply-add, so that the sums over centres round alike in all lanes.
      const int64_t own = (k * kCenters + j) * kWidth;
      if constexpr (kY) (terms[0] + (terms[1] + V::load(at.slopes + own))).store(at.slopes + own);
      if constexpr (kY && kScaled) {
        (V::load(at.spreads + own) + (squares[0] + squares[1])).store(at.spreads + own);
      }
    }
#pragma GCC unroll 2
    for (int r = 0; kX && r < 2; ++r) sum[r].store(slope + k * kRows + r * kWidth);
  }
}

// Adds sums over the rows of a block to those of the blocks before.
template <class S>
void add_tile_sums(const Scene<S>& at, int64_t first, const S* from, void* to) {
  constexpr int kCenters = Scene<S>::kCenters, kWidth = Scene<S>::kWidth;
  const int64_t count = std::min<int64_t>(kCenters, at.in.n - first);
  for (int64_t j = 0; to && j < count; ++j) {
    S* row = static_cast<S*>(to) + (first + j) * at.d;
    for (int64_t k = 0; k < at.d; ++k) row[k] += lanes_sum(Vec<S>::load(from + (k * kCenters + j) * kWidth));
  }
}

template <int kDims, bool kScaled, bool kX, bool kY, class S>
void block_by_rows(const Scene<S>& at, int64_t first, int64_t panels, int64_t tiles, const bool* excluding) {
  constexpr int kCenters = Scene<S>::kCenters, kWidth = Scene<S>::kWidth;
  const auto sum = [&](int64_t panel, int64_t t) {
    sum_tile<kDims, kScaled, kX, kY>(at, panel, t, excluding[panel]);
  };
  if constexpr (kY) {
    for (int64_t t = 0; t < tiles; ++t) {
      std::fill_n(at.slopes, kCenters * kWidth * at.d, S(0));
      if (kScaled) std::fill_n(at.spreads, kCenters * kWidth * at.d, S(0));
      for (int64_t panel = 0; panel < panels; ++panel) sum(panel, t);
      add_tile_sums(at, first + t * kCenters, at.slopes, at.plan.slopes);
      if (kScaled) add_tile_sums(at, first + t * kCenters, at.spreads, at.plan.spreads);
    }
  } else {
    // A panel stays in L2.
    for (int64_t panel = 0; panel < panels; ++panel) {
      for (int64_t t = 0; t < tiles; ++t) sum(panel, t);
    }
  }
}

template <class S>
void run_block(const Scene<S>& at, int64_t first, int64_t panels, int64_t tiles, const bool* excluding) {
  const bool scaled = at.in.scale_kind == MixtureScale::per_dimension, x = at.plan.problem.grad_x != nullptr;
  const bool y = at.plan.slopes || at.plan.spreads;
  const auto with = [](bool value, auto&& f) { value ? f(std::true_type{}) : f(std::false_type{}); };
  with(scaled, [&](auto s) {
    with(x, [&](auto gx) {
      with(y, [&](auto gy) {
        if constexpr (!s.value && sizeof(S) == 4) {
          if (at.d == 1)
            return block_by_rows<1, false, gx.value, gy.value>(at, first, panels, tiles, excluding);
          if (at.d == 2)
            return block_by_rows<2, false, gx.value, gy.value>(at, first, panels, tiles, excluding);
          if (at.d == 3)
            return block_by_rows<3, false, gx.value, gy.value>(at, first, panels, tiles, excluding);
        }
        block_by_rows<0, s.value, gx.value, gy.value>(at, first, panels, tiles, excluding);
      });
    });
  });
}

template <class S, class T>
void block(const MixtureBackwardPlan& plan, int64_t row_block, int64_t center_block, void* scratch) {
  const Scene<S> at(plan, scratch);
  constexpr int kRows = Scene<S>::kRows, kCenters = Scene<S>::kCenters, kWidth = Scene<S>::kWidth;
  const MixtureInputs& in = plan.problem.in;
  const int64_t first = center_block * plan.centers, centers = std::min(plan.centers, in.n - first);
  const int64_t tiles = (centers + kCenters - 1) / kCenters, panels = at.panels_of(row_block);
  const S slope = in.scale_kind == MixtureScale::shared ? slope_of<S>(in, 0) : S(0);
  for (int64_t t = 0; t < tiles; ++t) pack_centers<S, T>(in, first + t * kCenters, slope, at.tile(t));
  bool excluding[kBlockRows / Vec<float>::kWidth * 4] = {};
  for (int64_t r = 0; in.exclude && r < panels * kRows; ++r) {
    const int64_t row = row_block * plan.rows + r;
    const int64_t j = row < in.m ? in.exclude[row] - first : -1;
    const bool inside = j >= 0 && j < centers;
    at.exclude[r] = static_cast<typename Scene<S>::Index>(inside ? j : -1);
    excluding[r / kRows] |= inside;
  }
  if (plan.weights) std::fill_n(at.weights, plan.centers * kWidth, S(0));
  if (plan.squares) std::fill_n(at.squares, plan.centers * kWidth, S(0));
  const int64_t values = panels * kRows * at.d;
  if (plan.problem.grad_x) std::fill_n(at.slope, values, S(0));
  run_block(at, first, panels, tiles, excluding);
  const auto add = [&](const S* from, double* to) {
    for (int64_t j = 0; to && j < centers; ++j) to[first + j] += lanes_sum(Vec<S>::load(from + j * kWidth));
  };
  add(at.weights, plan.weights);
  add(at.squares, plan.squares);
  if (plan.problem.grad_x) {
    for (int64_t e = 0; e < values; ++e) at.total[e] += static_cast<double>(at.slope[e]);
  }
}

template <class S, class T>
void finish(const MixtureBackwardPlan& plan, int64_t row_block, void* scratch) {
  const Scene<S> at(plan, scratch);
  constexpr int64_t kRows = Scene<S>::kRows;
  const MixtureInputs& in = plan.problem.in;
  const int64_t first = row_block * plan.rows, rows = at.rows_of(row_block), d = at.d;
  T* out = static_cast<T*>(plan.problem.grad_x);
  const RowGradient gradient(in);
  for (int64_t r = 0; out && r < rows; ++r) {
    const double grad = at.over_rows ? 1.0 : plan.problem.grad[first + r];
    gradient.write(out + (first + r) * d, grad, at.total + r / kRows * d * kRows + r % kRows, kRows);
  }
}

template <class S>
void choose_blocks(MixtureBackwardPlan& plan) {
  const MixtureInputs& in = plan.problem.in;
  constexpr int64_t kRows = Scene<S>::kRows;
  const int64_t most = std::clamp<int64_t>(kBlockElements / in.d / 64 * 64, 64, kBlockRows);
  // Rows of a gradient of x alone do not meet: their blocks may be as many as the threads like. Sums over
  // rows have blocks, hence bits, that the sizes alone decide.
  const int64_t blocks = plan.over_rows() ? kRowBlocks : 4 * num_threads();
  const int64_t least = plan.over_rows() ? kLeastRows : kRows;
  plan.rows = std::min(std::min(most, rounded_up(std::max<int64_t>(1, in.m), kRows)),
                       std::max(least, rounded_up((in.m + blocks - 1) / blocks, kRows)));
  plan.centers = std::min(std::min(most, kBlockCenters), rounded_up(in.n, 64));
}

// f(S, T) of the plan.
template <class F>
void with_types(const MixtureBackwardPlan& plan, F&& f) {
  with_storage(plan.problem.in.storage, [&](auto storage) {
    using T = decltype(storage);
    if constexpr (sizeof(T) == 8) {
      f(double{}, storage);
    } else {
      plan.in_double ? f(double{}, storage) : f(float{}, storage);
    }
  });
}

void choose(MixtureBackwardPlan& plan) {
  with_types(plan, [&](auto compute, auto) { choose_blocks<decltype(compute)>(plan); });
}
int64_t scratch_bytes(const MixtureBackwardPlan& plan) {
  int64_t bytes = 0;
  with_types(plan, [&](auto compute, auto) { bytes = Scene<decltype(compute)>(plan, nullptr).bytes; });
  return bytes;
}
void begin_any(const MixtureBackwardPlan& plan, int64_t row_block, void* scratch) {
  with_types(plan, [&](auto compute, auto storage) {
    begin<decltype(compute), decltype(storage)>(plan, row_block, scratch);
  });
}
void block_any(const MixtureBackwardPlan& plan, int64_t row_block, int64_t center_block, void* scratch) {
  with_types(plan, [&](auto compute, auto storage) {
    block<decltype(compute), decltype(storage)>(plan, row_block, center_block, scratch);
  });
}
void finish_any(const MixtureBackwardPlan& plan, int64_t row_block, void* scratch) {
  with_types(plan, [&](auto compute, auto storage) {
    finish<decltype(compute), decltype(storage)>(plan, row_block, scratch);
  });
}

}  // namespace

extern const LogMixtureBackwardKernels log_mixture_backward_kernels = {choose, scratch_bytes, begin_any,
                                                                       block_any, finish_any};

}  // namespace refine_ext::REFINE_EXT_ISA
