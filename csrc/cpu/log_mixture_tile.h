// A register tile of a Gaussian log-mixture: rows of x, one in each lane of kVectors vectors, against
// kCenters centres. Packing, squared distances and powers of two; what is summed is the caller's.
//
// Differences are taken before anything is scaled: x c - y c loses the digits where the data are far from
// the origin. Lanes do not meet, so that a row's bits do not depend on the other rows.
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

// ---- Packing

template <class S, int kLanes>
struct Lines {
  typedef S Line __attribute__((vector_size(kLanes * sizeof(S))));
  typedef S Unaligned __attribute__((vector_size(kLanes * sizeof(S)), aligned(sizeof(S)), may_alias));
  typedef typename IntegerOf<S>::type Index __attribute__((vector_size(kLanes * sizeof(S))));
};

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
    // Off-diagonal halves of blocks of 2 s change places.
#pragma GCC unroll 4
    for (int s = 1; s < kLanes; s *= 2) {
      typename Lines<S, kLanes>::Index low, high;
#pragma GCC unroll 16
      for (int l = 0; l < kLanes; ++l) {
        low[l] = l & s ? kLanes + l - s : l;
        high[l] = l & s ? kLanes + l : l + s;
      }
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        if (i & s) continue;
        const Line a = line[i], b = line[i + s];
        line[i] = __builtin_shuffle(a, b, low);
        line[i + s] = __builtin_shuffle(a, b, high);
      }
    }
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
  V zero = V::splat(0);
  int64_t e = 0;
  for (; e + V::kWidth <= count; e += V::kWidth) {
    const V x = V::load(values + e);
    zero = zero + (x - x);
  }
  for (; e < count; ++e) zero.v[0] += values[e] - values[e];
  return horizontal_sum(zero) == 0.0;
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

// ---- Arithmetic

// a * b, rounded: not part of a multiply-add.
template <class S>
REFINE_EXT_INLINE Vec<S> rounded_product(Vec<S> a, Vec<S> b) {
  Vec<S> product = a * b;
#if defined(__AVX512F__)
  asm("" : "+v"(product.v));
#elif defined(__SSE2__)
  asm("" : "+x"(product.v));
#elif defined(__aarch64__)
  asm("" : "+w"(product.v));
#endif
  return product;
}

// a * b + c in one rounding, where there is an instruction for it. Which of two roundings would otherwise be
// the compiler's choice, in each place anew.
template <class S>
REFINE_EXT_INLINE Vec<S> multiply_add(Vec<S> a, Vec<S> b, Vec<S> c) {
  using Native = typename Vec<S>::Native;
#if defined(__AVX512F__)
  if constexpr (sizeof(S) == 4) {
    return {(Native)_mm512_fmadd_ps((__m512)a.v, (__m512)b.v, (__m512)c.v)};
  } else {
    return {(Native)_mm512_fmadd_pd((__m512d)a.v, (__m512d)b.v, (__m512d)c.v)};
  }
#elif defined(__FMA__)
  if constexpr (sizeof(S) == 4) {
    return {(Native)_mm256_fmadd_ps((__m256)a.v, (__m256)b.v, (__m256)c.v)};
  } else {
    return {(Native)_mm256_fmadd_pd((__m256d)a.v, (__m256d)b.v, (__m256d)c.v)};
  }
#else
  return {(Native)(a.v * b.v + c.v)};
#endif
}

// ---- Squared distances, and exponents

// Rows as pack_rows leaves them.
template <bool kScaled, class S, int kVectors, int kCenters>
REFINE_EXT_INLINE void squared_distances(const S* rows, const S* centers, const S* inverse, int64_t d,
                                         Vec<S> (&sum)[kVectors][kCenters]) {
  using V = Vec<S>;
  const auto step = [&](int64_t k, auto&& take) {
    V x[kVectors];
#pragma GCC unroll 4
    for (int r = 0; r < kVectors; ++r) x[r] = V::load(rows + (k * kVectors + r) * V::kWidth);
#pragma GCC unroll 8
    for (int j = 0; j < kCenters; ++j) {
      const V y = V::splat(centers[k * kCenters + j]);
#pragma GCC unroll 4
      for (int r = 0; r < kVectors; ++r) {
        V difference = x[r] - y;
        if constexpr (kScaled) difference = difference * V::splat(inverse[k * kCenters + j]);
        take(sum[r][j], difference);
      }
    }
  };
  step(0, [](V& all, V z) { all = z * z; });
  for (int64_t k = 1; k < d; ++k) step(k, [](V& all, V z) { all = multiply_add(z, z, all); });
}

// The same in kDims dimensions. Of two squares side by side a compiler may round either first: here
// it is the first, as in a loop.
template <int kDims, class S, int kVectors, int kCenters>
REFINE_EXT_INLINE void few_squares(const S* rows, const S* centers, Vec<S> (&sum)[kVectors][kCenters]) {
  using V = Vec<S>;
#pragma GCC unroll 8
  for (int j = 0; j < kCenters; ++j) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
#pragma GCC unroll 4
      for (int k = 0; k < kDims; ++k) {
        const V z = V::load(rows + (k * kVectors + v) * V::kWidth) - V::splat(centers[k * kCenters + j]);
        sum[v][j] = k == 0 ? z * z : multiply_add(z, z, sum[v][j]);
      }
    }
  }
}

// kDims: d where it has a form of its own, or 0.
template <int kDims, bool kScaled, class S, int kVectors, int kCenters>
REFINE_EXT_INLINE void tile_distances(const S* rows, const CenterTile<S>& tile, int64_t d,
                                      Vec<S> (&sum)[kVectors][kCenters]) {
  if constexpr (kDims > 0) {
    few_squares<kDims>(rows, tile.values, sum);
  } else {
    squared_distances<kScaled>(rows, tile.values, tile.inverse, d, sum);
  }
}

// t_j - r for r = -opposite. With t_j rounded first it is 0 where t_j is r: of exponents beyond 2^24 the
// rounding alone is not small.
template <class S>
REFINE_EXT_INLINE Vec<S> exponent(Vec<S> slope, Vec<S> log2_weight, Vec<S> distance, Vec<S> opposite) {
  return (log2_weight - rounded_product(slope, distance)) + opposite;
}
template <class S>
REFINE_EXT_INLINE Vec<S> exponent(const CenterTile<S>& tile, int j, Vec<S> distance, Vec<S> opposite) {
  return exponent(Vec<S>::splat(tile.slope[j]), Vec<S>::splat(tile.log2_weight[j]), distance, opposite);
}

// ---- Powers of two. Coefficients: tools/fit_polynomials.py.

template <class S>
struct Exp2Tail;
template <>
struct Exp2Tail<float> {
  static constexpr float kValues[] = {0.693147180559945309f, 0.240223490380203614f, 0.0555038101379645743f,
                                      0.00966636851538544831f, 0.00133813025373207962f};
};
template <>
struct Exp2Tail<double> {
  static constexpr double kValues[] = {
      0.693147180559945309,   0.240226506959100982,    0.0555041086648215943,    0.00961812910760688853,
      0.00133335581464169353, 0.000154035304417360502, 0.0000152527338298361184, 1.32154425879216897e-6,
      1.01780624458457735e-7, 7.0725859492692237e-9,   4.45496059818651839e-10};
};

// 2^e = power * factor, two parts so that the product goes into a sum's multiply-add. 2^0 is 1 to the bit;
// beyond the exponent range 0 and infinity, and below 2^-126 (float) or 2^-1022 zero or near it. NaN goes
// through; infinite e may become NaN.
template <class S>
struct PowerOfTwo {
  using V = Vec<S>;
  V power, factor;

  REFINE_EXT_INLINE explicit PowerOfTwo(V e) {
    using T = Tables<S>;
    // To the ends of the exponent field, which stand for 0 and infinity.
    e = min_or_second(V::splat(T::kBias + 1), max_or_second(V::splat(-T::kBias), e));
    const V shifted = e + V::splat(T::kRound), n = shifted - V::splat(T::kRound);
    const V f = e - n;
    factor = f * polynomial(f, Exp2Tail<S>::kValues) + V::splat(1);
    // shifted holds the integer n in its low mantissa bits.
    using Bits = typename V::Bits;
    power.v = (typename V::Native)(((Bits)shifted.v << T::kMantissa) + (Bits)V::splat(1).v);
  }
  REFINE_EXT_INLINE V value() const { return power * factor; }
};

#if defined(__AVX512F__)
// 2^(i/32)
alignas(64) inline constexpr float kPowers[32] = {
    1.0f,        1.0218972f,  1.04427373f, 1.06714046f, 1.09050775f, 1.1143868f,  1.13878858f, 1.1637249f,
    1.18920708f, 1.21524739f, 1.24185777f, 1.26905096f, 1.29683959f, 1.32523668f, 1.35425556f, 1.38390994f,
    1.41421354f, 1.44518077f, 1.47682619f, 1.50916445f, 1.54221082f, 1.5759809f,  1.61049032f, 1.64575553f,
    1.68179286f, 1.71861935f, 1.75625217f, 1.79470909f, 1.8340081f,  1.87416768f, 1.91520655f, 1.95714414f};

// Within 2e-7 of itself: 32 steps to an octave, picked from two registers.
template <>
struct PowerOfTwo<float> {
  using V = Vec<float>;
  V power, factor;

  REFINE_EXT_INLINE explicit PowerOfTwo(V e) {
    const V round = V::splat(Tables<float>::kRound / 32);
    const V shifted = e + round, n = shifted - round;
    const V f = e - n;
    factor = (V::splat(0.240228268096303907f) * f + V::splat(0.693157343710484263f)) * f + V::splat(1);
    const __m512 step =
        _mm512_permutex2var_ps(_mm512_load_ps(kPowers), (__m512i)shifted.v, _mm512_load_ps(kPowers + 16));
    power.v = (V::Native)_mm512_scalef_ps(step, (__m512)n.v);
  }
  REFINE_EXT_INLINE V value() const { return power * factor; }
};
#endif

}  // namespace refine_ext::REFINE_EXT_ISA
