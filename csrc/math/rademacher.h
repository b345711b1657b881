// Rademacher sums: which signs a draw has, and in what arithmetic the signed sums are made.
//
// Draw k is one sequence of Philox; bit i of it is the sign of sample i, 1 for +1. A sum over samples is made
// in blocks of kSignBlock of them, each in fixed point: a column's values of one block are rounded to
// integers by a power of two that their largest sets, the integers are summed exactly, and the block sums are
// added in float64 in the blocks' order. Integer sums have no order, so that tables, tensor cores and scalar
// loops of any shape give the same bits; and the rounding, at most 2^-(bits + 1) of a block's largest value
// each, is no larger than that of float32 sums.
#pragma once

#include <cstdint>

#include "arithmetic.h"
#include "philox.h"

namespace refine_ext {

inline constexpr int64_t kSignBlock = 1024;      // samples whose sum is exact
inline constexpr int64_t kSignsPerPhilox = 128;  // samples whose signs one Philox block holds

REFINE_EXT_INLINE PhiloxSequence sign_sequence(uint64_t seed, uint64_t draw) {
  return {seed, draw, Stream::sign};
}

// Bit i of the block's words, from the lowest of the first on.
REFINE_EXT_INLINE bool sign_bit(const PhiloxBlock<uint32_t>& block, int i) {
  return (block.word[i >> 5] >> (i & 31) & 1u) != 0;
}

// Bits of a value in a block of `samples` such that their sum stays below 2^31, whatever they are.
REFINE_EXT_INLINE int certain_bits(int64_t samples) { return samples > 512 ? 21 : samples > 256 ? 22 : 23; }

// Bits of a column's values, where `magnitude` is the sum of |integers| of certain_bits: few values are as
// large as the largest, and what that leaves free is worth a digit. `digits` of 8 bits are what tensor cores
// take: 1, 2 or 3.
REFINE_EXT_INLINE int fixed_bits(int64_t samples, uint64_t magnitude, int digits) {
  int bits = certain_bits(samples);
  // An integer of one more bit is at most twice the one before and half a unit of rounding on each side.
  for (uint64_t sum = magnitude + samples; bits < 23 && 2 * sum < (uint64_t{1} << 31); sum *= 2) ++bits;
  return bits < 8 * digits - 1 ? bits : 8 * digits - 1;
}
inline constexpr int kFixedBits64 = 52;  // of float64: 1024 of them stay below 2^63

// 2^shift and 2^-shift take a column's block to fixed point and back. Where the largest value is zero so are
// all; where it is not finite the sums are NaN.
struct FixedPoint {
  int shift;
  double back;
};

// largest = max |value| of the column's block; NaN if any is.
REFINE_EXT_INLINE FixedPoint fixed_point(double largest, int bits) {
  if (!(largest < HUGE_VAL)) return {0, static_cast<double>(NAN)};
  if (largest == 0.0) return {0, 0.0};
  // largest * 2^shift lies in [2^(bits - 1), 2^bits), below that only for subnormal float64.
  const int wanted = bits - 1 - std::ilogb(largest), shift = wanted < 1022 ? wanted : 1022;
  return {shift, std::ldexp(1.0, -shift)};
}

// The integer of a value, to nearest even; the largest may round up to 2^bits, which does not fit.
REFINE_EXT_INLINE int64_t to_fixed(double value, int shift, int bits) {
  const int64_t limit = (int64_t{1} << bits) - 1;
  const int64_t rounded = static_cast<int64_t>(std::nearbyint(std::ldexp(value, shift)));
  return rounded > limit ? limit : rounded < -limit ? -limit : rounded;
}

}  // namespace refine_ext
