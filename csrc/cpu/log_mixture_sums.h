// Online sums of a log-mixture's weights, for rows in the lanes and packed tiles of centres.
//
// Per row the weights 2^(t_j - r) are summed against a reference r that is some earlier t_j, not the largest:
// it is only replaced where a tile's sum leaves the range that float32 squares without overflow, which takes
// one comparison a tile. The sums of a hundred centres go to float64.
//
// Included by sources that are compiled once per instruction set.
#pragma once

#include "log_mixture_tile.h"

namespace refine_ext::REFINE_EXT_ISA {

template <class S>
using RowIndex = typename Vec<S>::Integer;

// Of the rows in a tile's lanes.
template <class S>
struct alignas(64) RowSums {
  static constexpr int kRows = MixtureTile<S>::kRows;
  // Less than kNoWeight: a tile without any weight has sums of 0, other tiles infinite ones.
  static constexpr S kNoReference = std::numeric_limits<S>::max() / 16;

  S opposite[kRows];                   // -r, kNoReference before there is a weight
  double sum[kRows];                   // sum_j 2^(t_j - r)
  double squares[kRows];               // sum_j 4^(t_j - r)
  S best[kRows];                       // the largest 2^(t_j - r) so far,
  S best_distance[kRows];              // its squared distance in the tile's unit
  RowIndex<S> best_center[kRows];      // and its centre, counted in the chunk, or -1
  RowIndex<S> excluded[kRows];         // counted in the chunk, or -1
  int64_t exclude_begin, exclude_end;  // all of `excluded` that are not -1 lie in between

  RowSums() {
    std::fill_n(opposite, kRows, kNoReference);
    std::fill_n(sum, kRows, 0.0);
    std::fill_n(squares, kRows, 0.0);
    std::fill_n(best, kRows, kNoWeight<S> / 2);
    std::fill_n(best_center, kRows, -1);
    std::fill_n(excluded, kRows, -1);
    exclude_begin = exclude_end = 0;
  }
};

// A tile's sum of weights above which the reference is replaced: its square times the centres of a chunk is
// still a float32.
constexpr double kMostOfTile = 0x1p40;

// sums[0 .. kWidth) += x.
template <class S>
REFINE_EXT_INLINE void add_wide(double* sums, Vec<S> x) {
  WideSum<S> wide;
  wide.add(x);
  constexpr int kWidth = Vec<double>::kWidth;
  (Vec<double>::load(sums) + wide.low).store(sums);
  if constexpr (sizeof(S) == 4) (Vec<double>::load(sums + kWidth) + wide.high).store(sums + kWidth);
}

template <class S>
REFINE_EXT_INLINE void scale_wide(double* sums, Vec<S> x) {
  for (int l = 0; l < Vec<S>::kWidth; ++l) sums[l] *= static_cast<double>(x.v[l]);
}

// A run of packed tiles, and the rows of one group that meets it.
template <class S>
struct MixturePiece {
  const MixtureInputs& in;
  const S* tiles;
  int64_t count, first;  // tiles; the first centre, counted in the chunk
  bool stats;
  const S* rows;
  RowSums<S>& lanes;
  S* mean;            // [d][lanes] sum_j 2^(t_j - r) y_j of the last few hundred centres, or null
  double* wide_mean;  // of those before
  bool score;         // of x - y_j instead (log_mixture.h)
};

// What a tile adds to one vector of rows.
template <class S, bool kKeep>
struct TileWeights {
  Vec<S> sum;
  Vec<S> weights[kKeep ? MixtureTile<S>::kCenters : 1];
};

// A part again, where its sum was of no usable size: there with a larger reference, if that was the reason,
// and without what infinite distances made NaN. Lanes that are not `bad` keep their bits. Returns the new -r.
template <class S, bool kKeep>
__attribute__((noinline)) Vec<S> replace_reference(const CenterTile<S>& tile, const Vec<S>* distance,
                                                   const VecMask<S>& bad, const Vec<S>& old,
                                                   TileWeights<S, kKeep>& part) {
  using V = Vec<S>;
  constexpr int kCenters = MixtureTile<S>::kCenters;
  V largest = V::splat(-std::numeric_limits<S>::infinity());
#pragma GCC unroll 8
  for (int j = 0; j < kCenters; ++j) {
    largest = max_or_second(exponent(tile, j, distance[j], V::splat(0)), largest);
  }
  VecMask<S> raise = largest > V::splat(kNoWeight<S> / 2);
  raise.bits &= bad.bits & (largest + old > V::splat(0)).bits;
  const V opposite = select(raise, V::splat(0) - largest, old);
  // Without any weight in the row so far, none is made of what there is not.
  const V own = select(opposite == V::splat(RowSums<S>::kNoReference), V::splat(0), opposite);
  V sum = V::splat(0);
#pragma GCC unroll 8
  for (int j = 0; j < kCenters; ++j) {
    const V e = max_or_second(V::splat(2 * kNoWeight<S>), exponent(tile, j, distance[j], own));
    const PowerOfTwo<S> weight(e);
    sum = multiply_add(weight.power, weight.factor, sum);
    if constexpr (kKeep) part.weights[j] = select(bad, weight.value(), part.weights[j]);
  }
  part.sum = select(bad, sum, part.sum);
  return opposite;
}

// What was summed for vector v of the rows, to the reference of `opposite`. Returns its factor.
template <class S, int kVectors, bool kKeep>
__attribute__((noinline)) Vec<S> change_reference(const MixturePiece<S>& piece, int v,
                                                  const Vec<S>& opposite) {
  using V = Vec<S>;
  constexpr int kWidth = V::kWidth;
  RowSums<S>& lanes = piece.lanes;
  const V shift = opposite - V::load(lanes.opposite + v * kWidth), factor = PowerOfTwo<S>(shift).value();
  opposite.store(lanes.opposite + v * kWidth);
  scale_wide(lanes.sum + v * kWidth, factor);
  if constexpr (kKeep) {
    scale_wide(lanes.squares + v * kWidth, factor * factor);
    (V::load(lanes.best + v * kWidth) + shift).store(lanes.best + v * kWidth);
    for (int64_t k = 0; piece.mean && k < piece.in.d; ++k) {
      const int64_t at = (k * kVectors + v) * kWidth;
      (V::load(piece.mean + at) * factor).store(piece.mean + at);
      scale_wide(piece.wide_mean + at, factor);
    }
  }
  return factor;
}

template <class S, int kVectors>
REFINE_EXT_INLINE void add_stats(const MixturePiece<S>& piece, const CenterTile<S>& tile, int64_t center,
                                 const Vec<S> (&distance)[kVectors][MixtureTile<S>::kCenters],
                                 const TileWeights<S, true> (&parts)[kVectors], Vec<S> (&squares)[kVectors]) {
  using V = Vec<S>;
  using Bits = typename V::Bits;
  constexpr int kCenters = MixtureTile<S>::kCenters, kWidth = V::kWidth;
  RowSums<S>& lanes = piece.lanes;
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    V opposite = V::load(lanes.opposite + v * kWidth), best = V::load(lanes.best + v * kWidth);
    opposite = select(opposite == V::splat(RowSums<S>::kNoReference), V::splat(0), opposite);
    V best_distance = V::load(lanes.best_distance + v * kWidth);
    V best_center = V::load(reinterpret_cast<const S*>(lanes.best_center + v * kWidth));
    V sum = V::splat(0);
#pragma GCC unroll 8
    for (int j = 0; j < kCenters; ++j) {
      sum = sum + parts[v].weights[j] * parts[v].weights[j];
      // Weights near 1 are alike when exponents are not.
      const V e = exponent(tile, j, distance[v][j], opposite);
      const VecMask<S> better = e > best;
      const V own{(typename V::Native)(Bits{} + static_cast<RowIndex<S>>(center + j))};
      best = select(better, e, best);
      best_distance = select(better, distance[v][j], best_distance);
      best_center = select(better, own, best_center);
    }
    squares[v] = squares[v] + sum;
    best.store(lanes.best + v * kWidth);
    best_distance.store(lanes.best_distance + v * kWidth);
    best_center.store(reinterpret_cast<S*>(lanes.best_center + v * kWidth));
  }
}

template <class S, int kVectors>
REFINE_EXT_INLINE void add_mean(const MixturePiece<S>& piece, const S* values,
                                const TileWeights<S, true> (&parts)[kVectors]) {
  using V = Vec<S>;
  constexpr int kCenters = MixtureTile<S>::kCenters;
  V all = parts[0].sum;
  for (int v = 1; v < kVectors; ++v) all = all + parts[v].sum;
  if (!any(all != V::splat(0))) return;
  for (int64_t k = 0; k < piece.in.d; ++k) {
    V sum[kVectors];
#pragma GCC unroll 8
    for (int j = 0; j < kCenters; ++j) {
      const S* y = values + k * kCenters + j;
#pragma GCC unroll 4
      for (int r = 0; r < kVectors; ++r) {
        const V weight = parts[r].weights[j];
        sum[r] = j == 0 ? weight * V::splat(*y) : multiply_broadcast_add(weight, y, sum[r]);
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kVectors; ++r) {
      S* to = piece.mean + (k * kVectors + r) * V::kWidth;
      (V::load(to) + sum[r]).store(to);
    }
  }
}

template <bool kScaled, class S, int kVectors>
REFINE_EXT_INLINE void add_score(const MixturePiece<S>& piece, const CenterTile<S>& tile,
                                 const TileWeights<S, true> (&parts)[kVectors]) {
  using V = Vec<S>;
  constexpr int kCenters = MixtureTile<S>::kCenters, kWidth = V::kWidth;
  V all = parts[0].sum;
  for (int v = 1; v < kVectors; ++v) all = all + parts[v].sum;
  if (!any(all != V::splat(0))) return;
  V weights[kVectors][kCenters];
  const bool each = piece.in.scale_kind == MixtureScale::per_center;
#pragma GCC unroll 8
  for (int j = 0; j < kCenters; ++j) {
    const V slope = V::splat(each ? tile.slope[j] : S(1));
#pragma GCC unroll 4
    for (int r = 0; r < kVectors; ++r) weights[r][j] = parts[r].weights[j] * slope;
  }
  for (int64_t k = 0; k < piece.in.d; ++k) {
    V sum[kVectors];
#pragma GCC unroll 4
    for (int r = 0; r < kVectors; ++r) sum[r] = V::load(piece.mean + (k * kVectors + r) * kWidth);
#pragma GCC unroll 8
    for (int j = 0; j < kCenters; ++j) {
#pragma GCC unroll 4
      for (int r = 0; r < kVectors; ++r) {
        V z = minus_broadcast(V::load(piece.rows + (k * kVectors + r) * kWidth),
                              tile.values + k * kCenters + j);
        if constexpr (kScaled) {
          const V inverse = V::splat(tile.inverse[k * kCenters + j]);
          z = rounded_product(rounded_product(z, inverse), inverse);
        }
        sum[r] = multiply_add(weights[r][j], z, sum[r]);
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kVectors; ++r) sum[r].store(piece.mean + (k * kVectors + r) * kWidth);
  }
}

// kDims: d where it is known, or 0; kScaled: scales per dimension; kKeep: weights are kept for what is asked
// beside the value.
template <class S, int kDims, bool kScaled, int kVectors, bool kKeep>
void add_piece(const MixturePiece<S>& piece) {
  using V = Vec<S>;
  constexpr int kCenters = MixtureTile<S>::kCenters, kWidth = V::kWidth;
  RowSums<S>& lanes = piece.lanes;
  const int64_t size = CenterTile<S>::size(piece.in);
  V sum[kVectors], squares[kVectors];
  for (int r = 0; r < kVectors; ++r) sum[r] = squares[r] = V::splat(0);
  for (int64_t q = 0; q < piece.count; ++q) {
    const CenterTile<S> tile(piece.in, const_cast<S*>(piece.tiles) + q * size);
    const int64_t center = piece.first + q * kCenters;
    V distance[kVectors][kCenters];
    tile_distances<kDims, kScaled>(piece.rows, tile, piece.in.d, distance);
    if (center < lanes.exclude_end && center + kCenters > lanes.exclude_begin) [[unlikely]] {
      for (int r = 0; r < kVectors; ++r) {
        const V excluded = V::load(reinterpret_cast<const S*>(lanes.excluded + r * kWidth));
        for (int j = 0; j < kCenters; ++j) {
          const VecMask<S> own{(typename V::Bits)excluded.v == static_cast<RowIndex<S>>(center + j)};
          distance[r][j] = select(own, V::splat(std::numeric_limits<S>::infinity()), distance[r][j]);
        }
      }
    }
    TileWeights<S, kKeep> parts[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const V opposite = V::load(lanes.opposite + v * kWidth);
      V part = V::splat(std::numeric_limits<S>::infinity());
      // A chunk's first tile has no reference to go by.
      if (center > 0) {
        part = V::splat(0);
#pragma GCC unroll 8
        for (int j = 0; j < kCenters; ++j) {
          const PowerOfTwo<S> weight(exponent(tile, j, distance[v][j], opposite));
          part = multiply_add(weight.power, weight.factor, part);
          if constexpr (kKeep) parts[v].weights[j] = weight.value();
        }
      }
      parts[v].sum = part;
      const VecMask<S> good = part < V::splat(S(kMostOfTile)), bad{~good.bits};
      if (any(bad)) [[unlikely]] {
        // Copies: what is used above stays in registers.
        TileWeights<S, kKeep> again = parts[v];
        V copy[kCenters];
        for (int j = 0; j < kCenters; ++j) copy[j] = distance[v][j];
        const V raised = replace_reference<S, kKeep>(tile, copy, bad, opposite, again);
        const V factor = change_reference<S, kVectors, kKeep>(piece, v, raised);
        parts[v] = again;
        sum[v] = multiply_add(sum[v], factor, again.sum);
        squares[v] = rounded_product(squares[v], factor * factor);
      } else {
        sum[v] = sum[v] + part;
      }
    }
    if constexpr (kKeep) {
      if (piece.stats) add_stats<S, kVectors>(piece, tile, center, distance, parts, squares);
      if (piece.score) {
        add_score<kScaled, S, kVectors>(piece, tile, parts);
      } else if (piece.mean) {
        add_mean<S, kVectors>(piece, tile.values, parts);
      }
    }
  }
  for (int r = 0; r < kVectors; ++r) {
    add_wide(lanes.sum + r * kWidth, sum[r]);
    if (kKeep) add_wide(lanes.squares + r * kWidth, squares[r]);
  }
}

}  // namespace refine_ext::REFINE_EXT_ISA
