// exp, 2^x and log of float64 with the same bits on every machine: multiplications, additions and divisions
// in a fixed order, each rounded by itself. Decisions that compare a random number with a probability use
// these, so that CPU and GPU decide alike. A file that includes this is compiled without contraction into
// fused multiply-adds: -ffp-contract=off for the host, --fmad=false for nvcc.
//
// Plain loops over these functions vectorise: no branches, no calls.
#pragma once

#include <bit>
#include <cstdint>
#include <limits>

#include "arithmetic.h"

namespace refine_ext {

// 2^k for -1022 <= k <= 1023.
REFINE_EXT_INLINE double power_of_two(int64_t k) { return std::bit_cast<double>((k + 1023) << 52); }

// 2^x within 1.5 ulp; 0 below the normal range, 2^1023 * 2^(1/2) above 1023.5. x is not NaN.
REFINE_EXT_INLINE double reproducible_exp2(double x) {
  constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52: adding and subtracting it rounds to an integer
  const double clamped = x < -1022.0 ? -1022.0 : (x > 1023.5 ? 1023.5 : x);
  const double shifted = clamped + kRound;
  const double whole = shifted - kRound;
  const double f = clamped - whole;
  // tools/fit_polynomials.py: relative error 4e-18 on [-1/2, 1/2].
  double p = 4.45581794759186856e-10;
  p = p * f + 7.07419437093721228e-9;
  p = p * f + 1.01780570875131303e-7;
  p = p * f + 1.32154325354981091e-6;
  p = p * f + 1.52527338415572019e-5;
  p = p * f + 1.54035304637251597e-4;
  p = p * f + 1.33335581464064704e-3;
  p = p * f + 9.61812910758725604e-3;
  p = p * f + 5.5504108664821627e-2;
  p = p * f + 2.40226506959101596e-1;
  p = p * f + 6.93147180559945309e-1;
  p = p * f + 1.0;
  // The integer stands in the low bits of `shifted`; 1023.5 rounds to 1024, which two factors of 2^512 reach.
  const int64_t k = std::bit_cast<int64_t>(shifted) - std::bit_cast<int64_t>(kRound);
  const int64_t half = k >> 1;
  const double value = p * power_of_two(half) * power_of_two(k - half);
  return x < -1022.0 ? 0.0 : value;
}

inline constexpr double kLog2E = 1.44269504088896340736;

// e^x with a relative error of (2 + |x|) 2^-53.
REFINE_EXT_INLINE double reproducible_exp(double x) { return reproducible_exp2(x * kLog2E); }

// log x within 2 ulp for a positive normal x.
REFINE_EXT_INLINE double reproducible_log(double x) {
  constexpr double kLn2High = 0.693147180369123816490, kLn2Low = 1.90821492927058770002e-10;
  // Subtracting sqrt(1/2)'s bits makes the exponent field change at sqrt(1/2) 2^k instead of at 2^k.
  const int64_t bits = std::bit_cast<int64_t>(x);
  const int64_t exponent = (bits - std::bit_cast<int64_t>(0.70710678118654752440)) >> 52;
  const double f = std::bit_cast<double>(bits - (exponent << 52)) - 1.0;
  const double k = static_cast<double>(static_cast<int32_t>(exponent));
  // log(1 + f) = f - f^2/2 + s (f^2/2 + s^2 P(s^2)), s = f / (2 + f); P as in csrc/cpu/simd.h.
  const double s = f / (2.0 + f), z = s * s, half_square = 0.5 * f * f;
  double p = 0.146164936603116586;
  p = p * z + 0.15331718042755715;
  p = p * z + 0.181828892322975639;
  p = p * z + 0.222222111333259714;
  p = p * z + 0.285714286259844848;
  p = p * z + 0.399999999998994846;
  p = p * z + 0.666666666666666969;
  const double tail = s * (half_square + z * p);
  return k * kLn2High + (f + ((k * kLn2Low + tail) - half_square));
}

}  // namespace refine_ext
