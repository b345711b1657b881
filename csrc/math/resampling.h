// Drawing from a refined model: the definition of every draw, for CPU and GPU alike.
//
// Everything that decides an index is integer arithmetic, which is associative: any order of summation, any
// number of threads and any device give the same indices. Floating-point steps are elementwise and
// reproducible (csrc/math/reproducible.h), or only guess a place that integers then confirm.
//
// Masses. A row of n weights is cut into chunks of kDrawChunk. A chunk with largest weight w has the exponent
// e = exponent_above(w) and gives every weight the mass rint(weight 2^(50-e)) (ties to even): a chunk's sum
// fits in 64 bits, and nothing above 2^-50 of the chunk's largest weight is lost. Log-weights: y = l log2(e),
// e = floor(max y) + 1, mass rint(2^(y-e+50)).
//
// The row's unit is a power of two 2^(unit-50) for which the total T lies in [2^60, 2^62): prefix sums inside
// a chunk are shifted by e - unit (align_mass, rounding down), and with B the sum of the earlier chunks'
// totals
//   C_i = B + align_mass(sum of the masses up to and including i in its chunk).
// So C never decreases, C_i = C_{i-1} where the weight is zero, and T = C_{n-1}.
//
// Draws. A draw at position t in [0, T) takes the first i with C_i > t: a weight of zero is never drawn, ties
// cannot happen. U_k is number offset + k of the Philox sequence (seed, row, Stream::resample), 64 bits each,
// where row counts the rows that share a seed; mulhi(a, b) = floor(a b / 2^64).
//   multinomial  t_j = mulhi(U_j, T); independent draws, in draw order.
//   stratified   t_j = lo_j + mulhi(U_j, lo_{j+1} - lo_j), lo_j = floor(j T / num); ascending.
//   systematic   t_j = floor((j T + s) / num), s = mulhi(U_0, T); ascending.
//   residual     first f_i = floor(num m_i / T) copies of each i, m_i = C_i - C_{i-1}, ascending: F in all.
//   The
//                other R = num - F are multinomial draws, by U_0 ... U_{R-1}, from what the floors left over:
//                C'_i = floor((C_i num - T (f_0 + ... + f_i)) / 2^k), T' = floor(T R / 2^k), with k the
//                smallest for which T R < 2^(62+k).
//
// Rejection. U_i is number offset + i of (seed, row, Stream::rejection), u = floor(U_i / 2^12) 2^-52. With
// M = max(log_bound, max log r) and E = e^(log r - M): keep i if u < E (plain), or if
// u (G + (1 - G e^-epsilon) E) < E with G = e^gamma. That is u < sigmoid(F) multiplied out,
// F = d - log(1 - e^(d - epsilon)) - gamma, d = log r - M (Azadi et al. 2019, section 3.2).
//
// Metropolis. Block s of (seed, chain, Stream::metropolis) serves step s = 0, 1, ...: its low half U picks
// the proposal mulhi(U, n) (order "random"; order "given" proposes chain * steps + s), its high half V gives
// u = 1 - floor(V / 2^12) 2^-52 in (0, 1]. The proposal is taken if log u <= log r' - log r. Without an
// initial state step 0 takes its proposal; with one it is compared like any other. Draw m is the state after
// step burn_in + m thin; a chain that is still at its initial state at step burn_in takes that step's
// proposal.
#pragma once

#include "philox.h"
#include "reproducible.h"

namespace refine_ext {

using Wide = unsigned __int128;

inline constexpr int64_t kDrawChunk = 4096;
inline constexpr int kMassBits = 50;
inline constexpr int kTotalBits = 62;
inline constexpr int64_t kMostDraws = int64_t{1} << 40;  // places in [0, num] as a double, to 2^-12

enum class ResampleMethod : int { multinomial, stratified, systematic, residual };

REFINE_EXT_INLINE uint64_t mulhi(uint64_t a, uint64_t b) {
#if defined(__CUDA_ARCH__)
  return __umul64hi(a, b);
#else
  return static_cast<uint64_t>((static_cast<Wide>(a) * b) >> 64);
#endif
}

REFINE_EXT_INLINE int bit_length(uint64_t x) {
  int length = 0;
  for (int step = 32; step > 0; step >>= 1) {
    if (x >> step) {
      x >>= step;
      length += step;
    }
  }
  return length + (x != 0);
}

// ---- masses

// The smallest e with x < 2^e, for a positive finite x.
REFINE_EXT_INLINE int64_t exponent_above(double x) {
  const bool tiny = x < std::numeric_limits<double>::min();
  const int64_t bits = std::bit_cast<int64_t>(tiny ? x * 0x1p54 : x);
  return (bits >> 52) - 1022 - (tiny ? 54 : 0);
}

// rint(x) for 0 <= x < 2^51: the addition rounds, the bits count.
REFINE_EXT_INLINE uint64_t round_to_integer(double x) {
  return std::bit_cast<uint64_t>(x + 0x1p52) - std::bit_cast<uint64_t>(0x1p52);
}

// weight 2^(kMassBits - exponent), rounded. The power is beyond one double where the chunk's largest weight
// is subnormal, so it comes in two exact factors.
struct LinearMass {
  double first, second;

  REFINE_EXT_INLINE explicit LinearMass(int64_t exponent) {
    const int64_t k = kMassBits - exponent, half = k >> 1;
    first = power_of_two(half);
    second = power_of_two(k - half);
  }
  REFINE_EXT_INLINE uint64_t operator()(double weight) const {
    return round_to_integer(weight * first * second);
  }
};

// Beyond +-2^60 log-weights are taken as the bound: an exponent must be an int64.
REFINE_EXT_INLINE int64_t log_exponent_above(double log_weight) {
  const double y = log_weight * kLog2E;
  const double clamped = y < -0x1p60 ? -0x1p60 : (y > 0x1p60 ? 0x1p60 : y);
  const int64_t whole = static_cast<int64_t>(clamped);  // toward zero
  return whole - (static_cast<double>(whole) > clamped) + 1;
}

struct LogMass {
  double exponent;

  REFINE_EXT_INLINE explicit LogMass(int64_t e) : exponent(static_cast<double>(e)) {}
  REFINE_EXT_INLINE uint64_t operator()(double log_weight) const {
    const double z = (log_weight * kLog2E - exponent) + kMassBits;
    // 2^-2 already rounds to zero; the upper bound matters beyond 2^60 only.
    const double clamped = z < -2.0 ? -2.0 : (z > kMassBits ? double(kMassBits) : z);
    return round_to_integer(reproducible_exp2(clamped));
  }
};

struct ChunkMass {
  int64_t exponent;
  uint64_t sum;  // 0: nothing to draw here
};

// floor(mass 2^shift).
REFINE_EXT_INLINE uint64_t align_mass(uint64_t mass, int64_t shift) {
  if (shift >= 0) return mass << (shift < 63 ? shift : 63);
  return shift > -64 ? mass >> -shift : 0;
}

// A first unit, safe for `chunks` chunks: top is the largest exponent + bit_length(sum) over chunks of
// positive sum.
REFINE_EXT_INLINE int64_t first_unit(int64_t top, int64_t chunks) {
  return top + bit_length(static_cast<uint64_t>(chunks)) - kTotalBits;
}

// The final one, from the total in the first: as fine as T < 2^62 surely allows. The rounding down of at most
// 2^bits chunk sums, undone, adds less than another 2^61.
REFINE_EXT_INLINE int64_t final_unit(int64_t unit, uint64_t total) {
  return unit - (kTotalBits - 1 - bit_length(total));
}

// ---- positions of ascending draws

struct Grid {
  uint64_t total, num;

  // floor((j total + s) / num), s < total, j <= num.
  REFINE_EXT_INLINE uint64_t point(uint64_t j, uint64_t s) const {
    return static_cast<uint64_t>((static_cast<Wide>(j) * total + s) / num);
  }
  // floor(c num / total), c <= total. In [0, num].
  REFINE_EXT_INLINE uint64_t stratum(uint64_t c) const {
    return static_cast<uint64_t>(static_cast<Wide>(c) * num / total);
  }
  // c num / total - from, for a c near the start of stratum `from`.
  REFINE_EXT_INLINE double place(uint64_t c, uint64_t from) const {
    const Wide scaled = static_cast<Wide>(c) * num, origin = static_cast<Wide>(from) * total;
    const double difference =
        scaled >= origin ? static_cast<double>(scaled - origin) : -static_cast<double>(origin - scaled);
    return difference / static_cast<double>(total);
  }
};

// One ascending method's positions: t_j lies in [j T / num, (j + 1) T / num], both ends rounded down.
struct Ascending {
  Grid grid;
  ResampleMethod method;  // systematic or stratified
  uint64_t start;         // systematic: s
  PhiloxSequence sequence;
  uint64_t offset;

  REFINE_EXT_INLINE uint64_t position(uint64_t j, uint64_t bits) const {
    if (method == ResampleMethod::systematic) return grid.point(j, start);
    const uint64_t low = grid.point(j, 0);
    return low + mulhi(bits, grid.point(j + 1, 0) - low);
  }
  REFINE_EXT_INLINE uint64_t position(uint64_t j) const {
    return position(j, method == ResampleMethod::systematic ? 0 : random_bits(sequence, offset + j));
  }
  // How many draws have t_j < c: every j below the stratum of c, none above it, so one comparison decides.
  REFINE_EXT_INLINE uint64_t draws_below(uint64_t c) const {
    const uint64_t j = grid.stratum(c);
    return j >= grid.num ? grid.num : j + (position(j) < c);
  }
};

// ---- residual

// floor(num mass / total): the copies that are certain. The guess is at most one off for num <= kMostDraws.
REFINE_EXT_INLINE uint64_t certain_copies(uint64_t mass, const Grid& grid, double rate) {
  const Wide scaled = static_cast<Wide>(mass) * grid.num;
  uint64_t copies = static_cast<uint64_t>(static_cast<double>(mass) * rate);
  copies -= static_cast<Wide>(copies) * grid.total > scaled;
  copies += static_cast<Wide>(copies + 1) * grid.total <= scaled;
  return copies;
}

struct Remainder {
  Grid grid;
  int shift;       // k
  uint64_t draws;  // R
  uint64_t total;  // T'

  REFINE_EXT_INLINE Remainder(const Grid& g, uint64_t certain) : grid(g), shift(0), draws(g.num - certain) {
    const Wide mass = static_cast<Wide>(grid.total) * draws;
    const uint64_t high = static_cast<uint64_t>(mass >> 64);
    const int length = high ? 64 + bit_length(high) : bit_length(static_cast<uint64_t>(mass));
    shift = length > kTotalBits ? length - kTotalBits : 0;
    total = static_cast<uint64_t>(mass >> shift);
  }
  REFINE_EXT_INLINE uint64_t boundary(uint64_t c, uint64_t copies) const {
    return static_cast<uint64_t>((static_cast<Wide>(c) * grid.num - static_cast<Wide>(grid.total) * copies) >>
                                 shift);
  }
};

// ---- decisions

// floor(bits / 2^12) 2^-52 in [0, 1), and 1 minus that in (0, 1]: the bits become the mantissa of a number in
// [1, 2).
REFINE_EXT_INLINE double unit_from_zero(uint64_t bits) {
  return std::bit_cast<double>(bits >> 12 | uint64_t{0x3ff} << 52) - 1.0;
}
REFINE_EXT_INLINE double unit_to_one(uint64_t bits) {
  return 2.0 - std::bit_cast<double>(bits >> 12 | uint64_t{0x3ff} << 52);
}

// u (constant + slope E) < E.
struct Acceptance {
  double log_bound, constant, slope;

  static REFINE_EXT_INLINE Acceptance plain(double log_bound) { return {log_bound, 1.0, 0.0}; }
  static REFINE_EXT_INLINE Acceptance shifted(double log_bound, double gamma, double epsilon) {
    const double odds = reproducible_exp(gamma);
    return {log_bound, odds, 1.0 - odds * reproducible_exp(-epsilon)};
  }
  REFINE_EXT_INLINE bool operator()(double log_ratio, uint64_t bits) const {
    const double e = reproducible_exp(log_ratio - log_bound);
    return unit_from_zero(bits) * (constant + slope * e) < e;
  }
};

REFINE_EXT_INLINE bool metropolis_accepts(double log_unit, double proposed, double current) {
  return log_unit <= proposed - current;
}

}  // namespace refine_ext
