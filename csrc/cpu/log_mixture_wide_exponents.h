// Exponents t_j of a log-mixture in many dimensions from float32 distances, for values and for gradients:
// what they round differently would not cancel. Included by sources that are compiled once per instruction
// set.
#pragma once

#include <limits>

#include "log_mixture_wide.h"
#include "simd_storage.h"

namespace refine_ext::REFINE_EXT_ISA {

// Where float32 may have lost squares to underflow or the sum to overflow.
REFINE_EXT_INLINE bool is_outside(float distance) { return distance < 1e-28f || distance > 1e37f; }

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
  bool outside = false;
  for (int64_t c = 0; c < count; ++c) outside |= is_outside(distances[c]);
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

// exp2(t[c + lane] - reference), 0 where that is below e^-100.
REFINE_EXT_INLINE Vec<float> powers(const double* t, double reference) {
  using V = Vec<float>;
  using D = Vec<double>;
  typedef float Half __attribute__((vector_size(kVectorBytes / 2)));
  V difference;
  for (int part = 0; part < 2; ++part) {
    const D each = (D::load(t + part * D::kWidth) - D::splat(reference)) * D::splat(kLn2);
    const Half half = __builtin_convertvector(each.v, Half);
    std::memcpy(reinterpret_cast<char*>(&difference) + part * sizeof half, &half, sizeof half);
  }
  return select(difference < V::splat(-100), V::splat(0), vector_exp(difference));
}

}  // namespace refine_ext::REFINE_EXT_ISA
