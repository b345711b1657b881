// A row of a log-mixture's gradient by x, from the sums that the kernels make.
//
// Included by sources that are compiled once per instruction set, and by drivers.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "../math/log_mixture_problem.h"
#include "simd_storage.h"

namespace refine_ext::REFINE_EXT_ISA {

// Of sums_k = sum_j w_j (x - y_j)_k, times log2(e) / (2 s_j^2) unless all centres share one scale s.
class RowGradient {
 public:
  explicit RowGradient(const MixtureInputs& in) : d_(in.d) {
    if (in.scale_kind != MixtureScale::shared) return;
    const double scale = in.storage == Storage::float64 ? *static_cast<const double*>(in.scale)
                                                        : *static_cast<const float*>(in.scale);
    first_ = second_ = std::min(1 / scale, std::numeric_limits<double>::max());
  }

  // -factor sums_k / s_j^2.
  template <class T>
  void write(T* to, double factor, const double* sums, int64_t step = 1) const {
    for (int64_t k = 0; k < d_; ++k) {
      const double value = -factor * first_ * sums[k * step] * second_;
      if constexpr (sizeof(T) == 8) {
        to[k] = value;
      } else {
        to[k] = encode<T>(static_cast<float>(value));
      }
    }
  }

 private:
  int64_t d_;
  // 1 / s^2 in two steps, neither of which is infinite where the scale's square is zero.
  double first_ = 2 * kLn2, second_ = 1.0;
};

// A row of p.score, from its value and weights whose sum is `total`.
inline void write_score(const LogMixtureProblem& p, const RowGradient& gradient, int64_t row, double total,
                        const double* sums) {
  with_storage(p.in.storage, [&](auto tag) {
    using T = decltype(tag);
    T* to = static_cast<T*>(p.score) + row * p.in.d;
    // None where no centre has a weight, whatever x is.
    if (p.value[row] == -HUGE_VAL) {
      std::fill_n(to, p.in.d, T{});
    } else {
      gradient.write(to, 1.0 / total, sums);
    }
  });
}

}  // namespace refine_ext::REFINE_EXT_ISA
