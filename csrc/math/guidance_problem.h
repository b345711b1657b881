// The guidance ops as plain data for the CPU and CUDA drivers.
#pragma once

#include "density_ratio_problem.h"
#include "normal.h"

namespace refine_ext {

inline constexpr int kMostTerms = 7;

// x' = a x + sum_k c_k u_k + s z on `rows` samples of n elements; see refine_ext/guidance.py.
// Elements of a sample are contiguous; samples are `stride` elements apart, 0 for one that serves all.
struct StepTensor {
  const void* data;
  int64_t stride;
  Storage storage;
};

struct GuidedStepProblem {
  int64_t rows, n;
  StepTensor x;  // x.storage is the state's
  void* out;     // [rows, n] contiguous, of the state's storage; may be x.data
  int terms;
  StepTensor term[kMostTerms];
  const double* table;  // coefficients (a, c_1 .. c_K[, s]) of each row, or nullptr: `scalars`
  int64_t table_stride;
  double scalars[kMostTerms + 2];
  const double* factor;  // [rows], multiplies c_K, or nullptr
  bool noisy;
  const int64_t* seeds;  // [rows] if seed_stride is 1, [1] if it is 0, or nullptr: `seed`
  int64_t seed_stride;
  int64_t seed, step;

  // Of term k = 0 (x), 1 .. K, K + 1 (noise). One that is exactly 0 leaves its tensor out, whatever it and
  // the factor hold.
  REFINE_EXT_INLINE double coefficient(int64_t row, int k) const {
    const double c = table ? table[row * table_stride + k] : scalars[k];
    return factor && k == terms && k > 0 && c != 0.0 ? c * factor[row] : c;
  }

  REFINE_EXT_INLINE NoiseSequence noise(int64_t row) const {
    const bool own = seeds && seed_stride != 0;
    return {static_cast<uint64_t>(seeds ? seeds[row * seed_stride] : seed), static_cast<uint32_t>(step),
            own ? 0 : static_cast<uint64_t>(row)};
  }
};

enum class Parametrization : int { score, noise, denoised, velocity };
inline constexpr int kParametrizations = 4;

// A value for each sample: a number, or a tensor of one for all (stride 0) or of one each (1).
struct SampleValues {
  const void* data;  // nullptr: `constant`
  int64_t stride;
  Storage storage;
  double constant;

  REFINE_EXT_INLINE double at(int64_t row) const {
    if (!data) return constant;
    const int64_t i = row * stride;
    switch (storage) {
      case Storage::float64:
        return static_cast<const double*>(data)[i];
      case Storage::float32:
        return static_cast<const float*>(data)[i];
      case Storage::bfloat16:
        return std::bit_cast<float>(static_cast<uint32_t>(static_cast<const uint16_t*>(data)[i]) << 16);
      default:
        return half_value(static_cast<const uint16_t*>(data)[i]);
    }
  }

 private:
  static REFINE_EXT_INLINE double half_value(uint16_t bits) {
    const uint32_t magnitude = bits & 0x7fffu;
    // Exponent and mantissa moved into float's fields read as the value times 2^-112, subnormals included.
    const float small = std::bit_cast<float>(magnitude << 13);
    const float special = std::bit_cast<float>(magnitude << 13 | 0x7f800000u);
    // In float64, where nothing is flushed to zero.
    const double value = magnitude < 0x7c00u ? static_cast<double>(small) * 0x1p112 : special;
    return bits & 0x8000u ? -value : value;
  }
};

// refine_ext/guidance.py guidance_factor.
struct GuidanceFactorProblem {
  int64_t rows;
  SampleValues h, shift, weight, sigma, alpha;
  bool has_sigma;
  double sigma_min, sigma_max;
  Family family;  // of the divergence, for a logit too
  bool logit, flow;
  Parametrization parametrization;
  double* out;  // [rows]
};

}  // namespace refine_ext
