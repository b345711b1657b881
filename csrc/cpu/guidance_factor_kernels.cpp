// What multiplies the gradient of a discriminator, in float64, compiled once per instruction set.
#include "../math/guidance.h"
#include "density_ratio_dispatch.h"
#include "guidance.h"

namespace refine_ext::REFINE_EXT_ISA {
namespace {

using V = Vec<double>;

// Samples from `row` on, of which `count` are there, and zeros.
V load_values(const SampleValues& values, int64_t row, int64_t count) {
  if (!values.data || values.stride == 0) return V::splat(values.at(0));
  return with_storage(values.storage, [&](auto tag) {
    using T = decltype(tag);
    const T* p = static_cast<const T*>(values.data) + row;
    if (count >= V::kWidth) return load_as<double>(p);
    T padded[2 * V::kWidth] = {};
    std::memcpy(padded, p, static_cast<size_t>(count) * sizeof(T));
    return load_as<double>(padded);
  });
}

void factors(const GuidanceFactorProblem& problem, int64_t first, int64_t last) {
  with_form(problem.family.form, [&](auto form) {
    const FixedLogRatio<decltype(form)::value, V> log_ratio_of(problem.family);
    for (int64_t row = first; row < last; row += V::kWidth) {
      const int64_t count = std::min<int64_t>(V::kWidth, last - row);
      const auto load = [&](const SampleValues& values) { return load_values(values, row, count); };
      const SampleFactors<V> sample{load(problem.h), load(problem.shift), load(problem.weight),
                                    load(problem.sigma), load(problem.alpha)};
      const V factor = guidance_factor(problem, sample, log_ratio_of);
      if (count == V::kWidth) {
        factor.store(problem.out + row);
      } else {
        std::memcpy(problem.out + row, &factor.v, static_cast<size_t>(count) * sizeof(double));
      }
    }
  });
}

}  // namespace

extern const GuidanceFactorKernels guidance_factor_kernels;
const GuidanceFactorKernels guidance_factor_kernels = {factors};

}  // namespace refine_ext::REFINE_EXT_ISA
