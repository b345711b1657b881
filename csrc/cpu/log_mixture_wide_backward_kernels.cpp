// Weights, and sums of weighted differences, of the gradients in many dimensions
// (csrc/cpu/log_mixture_wide.h). Compiled once per instruction set.
#include <algorithm>

#include "log_mixture_wide_exponents.h"

namespace refine_ext::REFINE_EXT_ISA {
namespace {

using V = Vec<float>;
constexpr int kWidth = V::kWidth;

// A tile's weights stay in registers while the dimensions pass.
#if defined(__AVX512F__)
constexpr int kTile = 4;
#else
constexpr int kTile = 2;
#endif
constexpr int64_t kPieceDimensions = 256;
static_assert(kGradientTile % kTile == 0 && kGradientRows % kTile == 0);

bool weights(const WideCenters& centers, int64_t first, int64_t n, bool with_rate, const float* x,
             int64_t exclude, const float* distances, const int32_t* chosen, int64_t count,
             const WideRow& row, double* t, float* w, double* weights, double* squares) {
  exponents(centers, first, x, exclude, distances, chosen, count, t);
  for (int64_t c = count; c % kWidth != 0; ++c) t[c] = row.least - 1;
  if (chosen) std::fill_n(w, n, 0.0f);
  const double* rate = centers.rate + first;
  bool some = false;
  for (int64_t c = 0; c < count; c += kWidth) {
    bool below = true;
    for (int l = 0; l < kWidth; ++l) below &= t[c + l] < row.least;
    const int64_t lanes = std::min<int64_t>(kWidth, count - c);
    if (below) {
      if (!chosen) std::fill_n(w + c, lanes, 0.0f);
      continue;
    }
    float power[kWidth];
    powers(t + c, row.log2_value).store(power);
    for (int64_t l = 0; l < lanes; ++l) {
      const int64_t j = chosen ? chosen[c + l] : c + l;
      const double p = t[c + l] < row.least ? 0.0 : row.grad * static_cast<double>(power[l]);
      w[j] = static_cast<float>(with_rate ? p * rate[j] : p);
      if (p == 0.0) continue;
      some = true;
      if (weights) weights[j] += p;
      if (!squares) continue;
      const float square = distances[c + l];
      squares[j] +=
          p * (is_outside(square) ? exact_distance(x, centers.row(first + j), centers.stride) : square);
    }
  }
  return some;
}

// The sums of a tile's pairs, in dimensions [begin, end). y: its centres; y_sums: their sums.
template <bool kX, bool kY>
void add_tile(const float* x, float* x_sums, const float* const* y, float* const* y_sums, const float* w,
              int64_t stride, int64_t begin, int64_t end) {
  V weight[kTile][kTile];
#pragma GCC unroll 4
  for (int r = 0; r < kTile; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < kTile; ++c) weight[r][c] = V::splat(w[r * kTile + c]);
  }
  for (int64_t k = begin; k < end; k += kWidth) {
    V row[kTile], sum[kTile];
#pragma GCC unroll 4
    for (int r = 0; r < kTile; ++r) {
      row[r] = V::load(x + r * stride + k);
      if constexpr (kX) sum[r] = V::load(x_sums + r * stride + k);
    }
#pragma GCC unroll 4
    for (int c = 0; c < kTile; ++c) {
      const V center = V::load(y[c] + k);
      V own = V::splat(0);
      if constexpr (kY) own = V::load(y_sums[c] + k);
#pragma GCC unroll 4
      for (int r = 0; r < kTile; ++r) {
        const V difference = row[r] - center;
        if constexpr (kX) sum[r] = weight[r][c] * difference + sum[r];
        if constexpr (kY) own = weight[r][c] * difference + own;
      }
      if constexpr (kY) own.store(y_sums[c] + k);
    }
#pragma GCC unroll 4
    for (int r = 0; kX && r < kTile; ++r) sum[r].store(x_sums + r * stride + k);
  }
}

// Where the rows alone have sums, these stay in registers while some centres pass, in L1 for all the rows.
constexpr int kRowParts = kTile == 4 ? 3 : 2;
constexpr int64_t kRowCenters = 128;

// kParts vectors of the sums of a tile's rows. w: the weights of its first pair of tiles, those of the next
// centres `step` further on.
template <int kParts>
void add_to_rows(const float* x, float* sums, int64_t stride, const float* const* y, int64_t count, int64_t k,
                 const float* w, int64_t step, int64_t ahead) {
  V row[kTile][kParts], sum[kTile][kParts];
#pragma GCC unroll 4
  for (int r = 0; r < kTile; ++r) {
#pragma GCC unroll 4
    for (int p = 0; p < kParts; ++p) {
      row[r][p] = V::load(x + r * stride + k + p * kWidth);
      sum[r][p] = V::load(sums + r * stride + k + p * kWidth);
    }
  }
  for (int64_t c = 0; c < count; c += kTile, w += step) {
#pragma GCC unroll 4
    for (int e = 0; e < kTile; ++e) {
      __builtin_prefetch(y[c + e] + ahead);
      V weight[kTile];
#pragma GCC unroll 4
      for (int r = 0; r < kTile; ++r) weight[r] = V::splat(w[r * kTile + e]);
#pragma GCC unroll 4
      for (int p = 0; p < kParts; ++p) {
        const V center = V::load(y[c + e] + k + p * kWidth);
#pragma GCC unroll 4
        for (int r = 0; r < kTile; ++r) sum[r][p] = weight[r] * (row[r][p] - center) + sum[r][p];
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kTile; ++r) {
#pragma GCC unroll 4
    for (int p = 0; p < kParts; ++p) sum[r][p].store(sums + r * stride + k + p * kWidth);
  }
}

// All sums of rows [begin, begin + tiles * kTile) and the centres in index[0, count), from packed weights.
void add_to_all_rows(const WideSums& task, int64_t begin, int64_t tiles, int64_t count) {
  const int64_t stride = task.centers.stride, step = tiles * kTile * kTile;
  const float* y[kRowCenters];
  for (int64_t first = 0; first < count; first += kRowCenters) {
    const int64_t some = std::min(kRowCenters, count - first);
    for (int64_t c = 0; c < some; ++c) {
      const int32_t j = task.index[first + c];
      y[c] = task.centers.row(task.first + (j < 0 ? task.index[first] : j));
    }
    for (int64_t k = 0; k < stride;) {
      const bool whole = k + kRowParts * kWidth <= stride;
      const auto add = whole ? add_to_rows<kRowParts> : add_to_rows<1>;
      for (int64_t r = 0; r < tiles; ++r) {
        const int64_t at = (begin + r * kTile) * stride;
        add(task.x + at, task.row_sums + at, stride, y, some, k,
            task.packed + first / kTile * step + r * kTile * kTile, step,
            std::min(k + (kRowParts + r % kRowParts) * kWidth, stride - kWidth));
      }
      k += whole ? kRowParts * kWidth : kWidth;
    }
  }
}

// Rows [begin, begin + rows) and the centres in index[0, count), in steps of `dimensions`.
template <bool kX, bool kY>
void add_rows(const WideSums& task, int64_t begin, int64_t rows, int64_t count, int64_t dimensions) {
  const int64_t stride = task.centers.stride, row_tiles = divide_up(rows, kTile);
  // A centre that fills the last tile has no weight there.
  while (count % kTile != 0) task.index[count++] = -1;
  float* to = task.packed;
  for (int64_t c = 0; c < count; c += kTile) {
    for (int64_t r = 0; r < row_tiles * kTile; r += kTile) {
      for (int q = 0; q < kTile; ++q) {
        for (int e = 0; e < kTile; ++e) {
          const int32_t j = task.index[c + e];
          *to++ = j >= 0 && r + q < rows ? task.w[(begin + r + q) * task.n + j] : 0.0f;
        }
      }
    }
  }
  if constexpr (!kY) return add_to_all_rows(task, begin, row_tiles, count);
  for (int64_t k = 0; k < stride; k += dimensions) {
    const float* w = task.packed;
    for (int64_t c = 0; c < count; c += kTile) {
      const float* y[kTile];
      float* sums[kTile] = {};
      for (int e = 0; e < kTile; ++e) {
        const int64_t j = task.index[task.index[c + e] < 0 ? c : c + e];
        y[e] = task.centers.row(task.first + j);
        if (kY) sums[e] = task.center_sums + j * stride;
      }
      for (int64_t r = begin; r < begin + row_tiles * kTile; r += kTile, w += kTile * kTile) {
        add_tile<kX, kY>(task.x + r * stride, kX ? task.row_sums + r * stride : nullptr, y, sums, w, stride,
                         k, std::min(k + dimensions, stride));
      }
    }
  }
}

// The centres in which any of the rows has a weight, in order; their number.
int64_t union_of(const WideSums& task, int64_t begin, int64_t rows) {
  int64_t found = 0, j = 0;
  for (; j + kWidth <= task.n; j += kWidth) {
    V::Bits some{};
    for (int64_t r = begin; r < begin + rows; ++r)
      some |= (V::load(task.w + r * task.n + j) != V::splat(0)).bits;
    if (!any(VecMask<float>{some})) continue;
    for (int l = 0; l < kWidth; ++l) {
      task.index[found] = static_cast<int32_t>(j + l);
      found += some[l] != 0;
    }
  }
  for (; j < task.n; ++j) {
    bool some = false;
    for (int64_t r = begin; r < begin + rows; ++r) some |= task.w[r * task.n + j] != 0.0f;
    task.index[found] = static_cast<int32_t>(j);
    found += some;
  }
  return found;
}

template <bool kX, bool kY>
void add_all(const WideSums& task) {
  const int64_t stride = task.centers.stride;
  const auto add = [&](int64_t begin, int64_t rows, int64_t dimensions) {
    const int64_t count = union_of(task, begin, rows);
    for (int64_t c = 0; kY && c < count; ++c) {
      const int32_t j = task.index[c];
      if (!task.touched[j]) std::fill_n(task.center_sums + j * stride, stride, 0.0f);
      task.touched[j] = true;
    }
    add_rows<kX, kY>(task, begin, rows, count, dimensions);
  };
  for (int64_t begin = 0; begin < task.rows; begin += kGradientRows) {
    const int64_t end = std::min(begin + kGradientRows, task.rows);
    int64_t apart = 0;
    for (int64_t r = begin; r < end; r += kTile)
      apart += union_of(task, r, std::min<int64_t>(kTile, end - r));
    const int64_t together = union_of(task, begin, end - begin) * divide_up(end - begin, kTile);
    if (together <= apart + apart / 4) {
      // A piece of all rows in L1 while the centres pass.
      add(begin, end - begin, kPieceDimensions);
    } else {
      for (int64_t r = begin; r < end; r += kTile) add(r, std::min<int64_t>(kTile, end - r), stride);
    }
  }
}

void sums(const WideSums& task) {
  if (task.row_sums && task.center_sums) return add_all<true, true>(task);
  if (task.row_sums) return add_all<true, false>(task);
  if (task.center_sums) return add_all<false, true>(task);
}

}  // namespace

extern const WideGradientKernels wide_gradient_kernels;
const WideGradientKernels wide_gradient_kernels = {weights, sums};

}  // namespace refine_ext::REFINE_EXT_ISA
