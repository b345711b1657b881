// Rows and centres of a Gaussian log-mixture packed for its register tiles: rows of x, one in each lane of
// kVectors vectors, against kCenters centres.
//
// Included by sources that are compiled once per instruction set. S is what is computed in: the storage's
// compute type, or double for scales that float32 cannot square.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "../math/log_mixture_problem.h"
#include "simd_storage.h"

namespace refine_ext::REFINE_EXT_ISA {

template <class S>
struct MixtureTile {
  static constexpr int kWidth = Vec<S>::kWidth;
  static constexpr int kVectors = 2, kRows = kVectors * kWidth;
  // With the tile's sums and a step's operands: the 32 registers of AVX-512, or 16.
#if defined(__AVX512F__)
  static constexpr int kCenters = 8;
#else
  static constexpr int kCenters = 4;
#endif
};

// The log-weight of what has none. Finite, since PowerOfTwo may not take infinities.
template <class S>
inline constexpr S kNoWeight = -std::numeric_limits<S>::max() / 8;

template <class S, int kLanes>
struct Lines {
  typedef S Line __attribute__((vector_size(kLanes * sizeof(S))));
  typedef S Unaligned __attribute__((vector_size(kLanes * sizeof(S)), aligned(sizeof(S)), may_alias));
  typedef typename IntegerOf<S>::type Index __attribute__((vector_size(kLanes * sizeof(S))));
};

// Off-diagonal halves of blocks of 2 kStep change places, then those of larger ones. A step is a constant,
// and so are its indices.
template <int kStep, class S, int kLanes>
REFINE_EXT_INLINE void exchange(typename Lines<S, kLanes>::Line (&line)[kLanes]) {
  using Line = typename Lines<S, kLanes>::Line;
  typename Lines<S, kLanes>::Index low, high;
#pragma GCC unroll 16
  for (int l = 0; l < kLanes; ++l) {
    low[l] = l & kStep ? kLanes + l - kStep : l;
    high[l] = l & kStep ? kLanes + l : l + kStep;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if (i & kStep) continue;
    const Line a = line[i], b = line[i + kStep];
    line[i] = __builtin_shuffle(a, b, low);
    line[i + kStep] = __builtin_shuffle(a, b, high);
  }
  if constexpr (2 * kStep < kLanes) exchange<2 * kStep, S>(line);
}

// to[k * step + i] = from[i * stride + k] for k < d; lanes i from `count` on repeat the last.
template <int kLanes, class S>
REFINE_EXT_INLINE void transpose(const S* from, int64_t stride, int64_t count, int64_t d, S* to,
                                 int64_t step) {
  using Line = typename Lines<S, kLanes>::Line;
  using Unaligned = typename Lines<S, kLanes>::Unaligned;
  const S* row[kLanes];
  for (int i = 0; i < kLanes; ++i) row[i] = from + std::min<int64_t>(i, count - 1) * stride;
  int64_t k = 0;
  for (; k + kLanes <= d; k += kLanes) {
    Line line[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) line[i] = *reinterpret_cast<const Unaligned*>(row[i] + k);
    exchange<1, S>(line);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) *reinterpret_cast<Unaligned*>(to + (k + i) * step) = line[i];
  }
  for (; k < d; ++k) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) to[k * step + i] = row[i][k];
  }
}

// The same from a storage type.
template <int kLanes, class S, class T>
inline void pack(const T* from, int64_t stride, int64_t count, int64_t d, S* to, int64_t step) {
  if constexpr (std::is_same_v<S, T>) {
    transpose<kLanes>(from, stride, count, d, to, step);
  } else {
    constexpr int64_t kPiece = 64, kWidth = Vec<S>::kWidth;
    alignas(64) S wide[kLanes * kPiece];
    for (int64_t k = 0; k < d; k += kPiece) {
      const int64_t columns = std::min(kPiece, d - k);
      for (int64_t i = 0; i < std::min<int64_t>(kLanes, count); ++i) {
        const T* row = from + i * stride + k;
        int64_t c = 0;
        for (; c + kWidth <= columns; c += kWidth) load_as<S>(row + c).store(wide + i * kPiece + c);
        if (c < columns) {
          T padded[kWidth] = {};
          std::memcpy(padded, row + c, static_cast<size_t>(columns - c) * sizeof(T));
          load_as<S>(padded).store(wide + i * kPiece + c);
        }
      }
      transpose<kLanes>(wide, kPiece, std::min<int64_t>(kLanes, count), columns, to + k * step, step);
    }
  }
}

template <class S>
REFINE_EXT_INLINE bool all_finite(const S* values, int64_t count) {
  using V = Vec<S>;
  constexpr int kParts = 4;  // that do not wait for each other
  V zero[kParts];
  for (V& part : zero) part = V::splat(0);
  int64_t e = 0;
  for (; e + kParts * V::kWidth <= count; e += kParts * V::kWidth) {
#pragma GCC unroll 4
    for (int p = 0; p < kParts; ++p) {
      const V x = V::load(values + e + p * V::kWidth);
      zero[p] = zero[p] + (x - x);
    }
  }
  for (; e < count; ++e) zero[0].v[0] += values[e] - values[e];
  return !any((zero[0] + zero[1]) + (zero[2] + zero[3]) != V::splat(0));
}

// Rows [first, first + kVectors * kWidth) of x, as far as there are: to[k * kVectors * kWidth + lane].
template <int kVectors, class S, class T>
inline void pack_rows(const MixtureInputs& in, int64_t first, S* to) {
  constexpr int kWidth = Vec<S>::kWidth;
  for (int v = 0; v < kVectors; ++v) {
    const int64_t row = std::min(first + v * kWidth, in.m - 1);
    pack<kWidth>(static_cast<const T*>(in.x) + row * in.d, in.d, in.m - row, in.d, to + v * kWidth,
                 kVectors * kWidth);
  }
}

REFINE_EXT_INLINE double compute_at(const MixtureInputs& in, const void* values, int64_t i) {
  return in.storage == Storage::float64 ? static_cast<const double*>(values)[i]
                                        : static_cast<const float*>(values)[i];
}

template <class S>
REFINE_EXT_INLINE S log2_weight_of(const MixtureInputs& in, int64_t j) {
  const double weight = in.log_weights ? compute_at(in, in.log_weights, j) : 0.0;
  return weight == -HUGE_VAL ? kNoWeight<S> : static_cast<S>(kLog2E * weight);
}

// log2(e) / (2 s^2), no more than the type holds.
template <class S>
REFINE_EXT_INLINE S slope_of(const MixtureInputs& in, int64_t i) {
  const double scale = compute_at(in, in.scale, i), slope = 0.5 * kLog2E / scale / scale;
  return static_cast<S>(std::min<double>(slope, std::numeric_limits<S>::max()));
}

// kCenters centres: t_j = log2_weight[j] - slope[j] sum_k ((x_k - y_jk) inverse_jk)^2, without the inverse
// where a centre's scale is one for all dimensions.
template <class S>
struct CenterTile {
  S* slope;        // [kCenters]
  S* log2_weight;  // [kCenters]; kNoWeight where the weight is 0 or there is no centre
  S* values;       // [d][kCenters]
  S* inverse;      // [d][kCenters] with MixtureScale::per_dimension, else null

  static constexpr int kCenters = MixtureTile<S>::kCenters;
  static int64_t size(const MixtureInputs& in) {
    return kCenters * ((in.scale_kind == MixtureScale::per_dimension ? 2 : 1) * in.d + 2);
  }
  // In memory of that size.
  REFINE_EXT_INLINE CenterTile(const MixtureInputs& in, S* memory)
      : slope(memory),
        log2_weight(memory + kCenters),
        values(memory + 2 * kCenters),
        inverse(in.scale_kind == MixtureScale::per_dimension ? values + kCenters * in.d : nullptr) {}
};

// Centres [first, first + kCenters), as far as there are. shared_slope: slope_of the one scale there may be.
template <class S, class T>
inline void pack_centers(const MixtureInputs& in, int64_t first, S shared_slope, const CenterTile<S>& tile) {
  using C = typename ComputeOf<T>::type;
  constexpr int kCenters = MixtureTile<S>::kCenters;
  const int64_t count = std::min<int64_t>(kCenters, in.n - first), all = in.d * kCenters;
  pack<kCenters>(static_cast<const T*>(in.centers) + first * in.d, in.d, count, in.d, tile.values, kCenters);
  for (int j = 0; j < kCenters; ++j) {
    const int64_t at = first + std::min<int64_t>(j, count - 1);
    tile.slope[j] = tile.inverse                                ? S(1)
                    : in.scale_kind == MixtureScale::per_center ? slope_of<S>(in, at)
                                                                : shared_slope;
    tile.log2_weight[j] = j < count ? log2_weight_of<S>(in, at) : kNoWeight<S>;
  }
  if (tile.inverse) {
    const C* scale = static_cast<const C*>(in.scale) + first * in.d;
    pack<kCenters>(scale, in.d, count, in.d, tile.inverse, kCenters);
    const S root = static_cast<S>(std::sqrt(0.5 * kLog2E));
    for (int64_t e = 0; e < all; ++e) tile.inverse[e] = root / tile.inverse[e];
  }
  // A centre at infinity has no weight; as 0 its value may be multiplied with it.
  const bool finite = all_finite(tile.values, all);
  for (int64_t e = 0; !finite && e < all; ++e) {
    if (!std::isinf(tile.values[e])) continue;
    tile.values[e] = 0;
    tile.log2_weight[e % kCenters] = kNoWeight<S>;
  }
}

}  // namespace refine_ext::REFINE_EXT_ISA
