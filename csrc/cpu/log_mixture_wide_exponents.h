// Exponents t_j of a log-mixture in many dimensions from float32 distances, for values and for gradients:
// what they round differently would not cancel. Included by sources that are compiled once per instruction
// set.
#pragma once

#include <limits>

#include "log_mixture_wide.h"
#include "simd_storage.h"

namespace refine_ext::REFINE_EXT_ISA {

// Where float32 may have lost squares to underflow or the sum to overflow.
constexpr float kLeastDistance = 1e-28f, kMostDistance = 1e37f;
REFINE_EXT_INLINE bool is_outside(float distance) {
  return distance < kLeastDistance || distance > kMostDistance;
}

inline bool any_outside(const float* distances, int64_t count) {
  using V = Vec<float>;
  V::Bits some{};
  int64_t c = 0;
  for (; c + V::kWidth <= count; c += V::kWidth) {
    const V each = V::load(distances + c);
    some |= (each < V::splat(kLeastDistance)).bits | (each > V::splat(kMostDistance)).bits;
  }
  bool outside = any(VecMask<float>{some});
  for (; c < count; ++c) outside |= is_outside(distances[c]);
  return outside;
}

inline double exact_distance(const float* x, const float* y, int64_t stride) {
  using D = Vec<double>;
  D sum = D::splat(0);
  for (int64_t k = 0; k < stride; k += D::kWidth) {
    D a, b;
    for (int l = 0; l < D::kWidth; ++l) {
      a.v[l] = x[k + l];
      b.v[l] = y[k + l];
    }
    const D difference = a - b;
    sum = sum + difference * difference;
  }
  return horizontal_sum(sum);
}

// t[c] of the chosen centres, or of the first `count` where that is null, all counted from the chunk's first.
inline void exponents(const WideCenters& centers, int64_t first, const float* x, int64_t exclude,
                      const float* distances, const int32_t* chosen, int64_t count, double* t) {
  const double *rate = centers.rate + first, *weight = centers.log2_weight + first;
  const bool outside = any_outside(distances, count);
  if (chosen) {
    for (int64_t c = 0; c < count; ++c) t[c] = weight[chosen[c]] - rate[chosen[c]] * distances[c];
  } else {
    for (int64_t c = 0; c < count; ++c) t[c] = weight[c] - rate[c] * distances[c];
  }
  const auto at = [&](int64_t c) { return chosen ? chosen[c] : c; };
  for (int64_t c = 0; outside && c < count; ++c) {
    const int64_t j = at(c);
    if (is_outside(distances[c]))
      t[c] = weight[j] - rate[j] * exact_distance(x, centers.row(first + j), centers.stride);
  }
  if (exclude >= 0) {
    int64_t c = chosen ? 0 : exclude;
    while (c < count && at(c) != exclude) ++c;
    if (c < count) t[c] = -std::numeric_limits<double>::infinity();
  }
}

// Both in float32.
REFINE_EXT_INLINE Vec<float> narrowed(Vec<double> low, Vec<double> high) {
  using V = Vec<float>;
#if defined(__AVX512F__)
  // Halves put together in memory are read only after both have been written.
  return {(V::Native)_mm512_insertf32x8(_mm512_castps256_ps512(_mm512_cvtpd_ps((__m512d)low.v)),
                                        _mm512_cvtpd_ps((__m512d)high.v), 1)};
#else
  typedef float Half __attribute__((vector_size(kVectorBytes / 2)));
  const Half halves[2] = {__builtin_convertvector(low.v, Half), __builtin_convertvector(high.v, Half)};
  V both;
  std::memcpy(&both, halves, sizeof both);
  return both;
#endif
}

// exp2(t[lane] - reference), 0 where that is below e^-100.
REFINE_EXT_INLINE Vec<float> powers(const double* t, double reference) {
  using V = Vec<float>;
  using D = Vec<double>;
  const auto below = [&](const double* each) {
    return (D::load(each) - D::splat(reference)) * D::splat(kLn2);
  };
  const V difference = narrowed(below(t), below(t + D::kWidth));
  return select(difference < V::splat(-100), V::splat(0), vector_exp(difference));
}

}  // namespace refine_ext::REFINE_EXT_ISA
