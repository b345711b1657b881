// Chunk kernels of the resampling family, compiled once per instruction set and without contraction into
// fused multiply-adds (csrc/math/reproducible.h). Weights are widened to float64 chunk by chunk; the loops
// over them are plain and left to the vectoriser.
#include <algorithm>
#include <cstring>
#include <utility>

#include "philox_simd.h"
#include "resampling.h"

namespace refine_ext::REFINE_EXT_ISA {
namespace {

template <class T>
void widen_from(const T* p, int64_t n, double* out) {
  if constexpr (std::is_same_v<T, float> || std::is_same_v<T, double>) {
    for (int64_t i = 0; i < n; ++i) out[i] = static_cast<double>(p[i]);
  } else {
    constexpr int kWidth = Vec<float>::kWidth;
    alignas(64) float lanes[kWidth];
    for (int64_t i = 0; i < n; i += kWidth) {
      T padded[kWidth] = {};
      const int64_t valid = std::min<int64_t>(kWidth, n - i);
      if (valid < kWidth) std::memcpy(padded, p + i, static_cast<size_t>(valid) * sizeof(T));
      load(valid < kWidth ? padded : p + i).store(lanes);
      for (int64_t l = 0; l < valid; ++l) out[i + l] = static_cast<double>(lanes[l]);
    }
  }
}

// [begin, end) as float64, in `buffer` or where they are.
const double* widen(Storage storage, const void* p, int64_t begin, int64_t end, double* buffer) {
  switch (storage) {
    case Storage::float64:
      return static_cast<const double*>(p) + begin;
    case Storage::float32:
      widen_from(static_cast<const float*>(p) + begin, end - begin, buffer);
      break;
    case Storage::float16:
      widen_from(static_cast<const Half*>(p) + begin, end - begin, buffer);
      break;
    case Storage::bfloat16:
      widen_from(static_cast<const BFloat16*>(p) + begin, end - begin, buffer);
      break;
  }
  return buffer;
}

// Integers that are ordered as the floats are: -NaN < -inf < ... < inf < NaN. Comparing floats would not
// vectorise.
REFINE_EXT_INLINE int64_t ordered(double x) {
  const int64_t bits = std::bit_cast<int64_t>(x + 0.0);  // -0 becomes 0
  return bits ^ ((bits >> 63) & INT64_MAX);
}
REFINE_EXT_INLINE double from_ordered(int64_t key) {
  return std::bit_cast<double>(key ^ ((key >> 63) & INT64_MAX));
}

struct Extremes {
  int64_t lowest = INT64_MAX, highest = INT64_MIN;
};

Extremes extremes(const double* x, int64_t n) {
  int64_t lowest = INT64_MAX, highest = INT64_MIN;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t key = ordered(x[i]);
    lowest = key < lowest ? key : lowest;
    highest = key > highest ? key : highest;
  }
  return {lowest, highest};
}

template <class Mass>
uint64_t sum_of(const double* weights, int64_t n, Mass mass) {
  uint64_t sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += mass(weights[i]);
  return sum;
}

bool measure(Storage storage, bool log, const void* p, int64_t begin, int64_t end, ChunkMass& chunk) {
  alignas(64) double buffer[kDrawChunk];
  const double* weights = widen(storage, p, begin, end, buffer);
  const int64_t n = end - begin;
  const Extremes found = extremes(weights, n);
  const double infinity = std::numeric_limits<double>::infinity();
  if (found.highest >= ordered(infinity) || found.lowest < ordered(log ? -infinity : 0.0)) return false;
  const double largest = from_ordered(found.highest);
  chunk = {0, 0};
  if (largest == (log ? -infinity : 0.0)) return true;
  chunk.exponent = log ? log_exponent_above(largest) : exponent_above(largest);
  chunk.sum =
      log ? sum_of(weights, n, LogMass(chunk.exponent)) : sum_of(weights, n, LinearMass(chunk.exponent));
  return true;
}

void boundaries(Storage storage, bool log, const void* p, int64_t begin, int64_t end, int64_t exponent,
                int64_t unit, uint64_t base, uint64_t* out) {
  alignas(64) double buffer[kDrawChunk];
  const double* weights = widen(storage, p, begin, end, buffer);
  const int64_t n = end - begin, shift = exponent - unit;
  if (log) {
    const LogMass mass(exponent);
    for (int64_t i = 0; i < n; ++i) out[i] = mass(weights[i]);
  } else {
    const LinearMass mass(exponent);
    for (int64_t i = 0; i < n; ++i) out[i] = mass(weights[i]);
  }
  uint64_t sum = 0;
  if (shift >= 0) {
    const int left = static_cast<int>(std::min<int64_t>(shift, 63));
    for (int64_t i = 0; i < n; ++i) out[i] = base + ((sum += out[i]) << left);
  } else {
    const int right = static_cast<int>(std::min<int64_t>(-shift, 63));  // sums are below 2^63
    for (int64_t i = 0; i < n; ++i) out[i] = base + ((sum += out[i]) >> right);
  }
}

typedef int64_t Longs __attribute__((vector_size(kVectorBytes)));
typedef int64_t UnalignedLongs __attribute__((vector_size(kVectorBytes), aligned(8), may_alias));

// floor((j total + s) / num) for j = first ... first + count - 1, by adding: every lane goes kLanes places at
// a time. Positions are below 2^62 and carries below 2^42, so signed lanes do.
void grid_points(const Grid& grid, uint64_t first, uint64_t s, int64_t count, uint64_t* out) {
  constexpr int kWidth = kVectorBytes / 8, kVectors = 4, kLanes = kWidth * kVectors;
  const uint64_t num = grid.num, quotient = grid.total / num, remainder = grid.total % num;
  const Wide origin = static_cast<Wide>(first) * grid.total + s;
  uint64_t at = static_cast<uint64_t>(origin / num), left = static_cast<uint64_t>(origin % num);
  Longs position[kVectors], carry[kVectors];
  for (int lane = 0; lane < kLanes; ++lane) {
    position[lane / kWidth][lane % kWidth] = static_cast<int64_t>(at);
    carry[lane / kWidth][lane % kWidth] = static_cast<int64_t>(left);
    left += remainder;
    at += quotient + (left >= num);
    left -= left >= num ? num : 0;
  }
  const Longs limit = Longs{} + static_cast<int64_t>(num);
  const Longs step_carry = Longs{} + static_cast<int64_t>(kLanes * remainder % num);
  const Longs step = Longs{} + static_cast<int64_t>(kLanes * quotient + kLanes * remainder / num);
  int64_t k = 0;
  for (; k + kLanes <= count; k += kLanes) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      *reinterpret_cast<UnalignedLongs*>(out + k + v * kWidth) = position[v];
      carry[v] += step_carry;
      const Longs wrap = carry[v] >= limit;  // -1 where true
      carry[v] -= wrap & limit;
      position[v] += step - wrap;
    }
  }
  for (int lane = 0; k + lane < count; ++lane) {
    out[k + lane] = static_cast<uint64_t>(position[lane / kWidth][lane % kWidth]);
  }
}

void positions(const Ascending& draws, uint64_t first, int64_t count, uint64_t* out) {
  if (draws.method == ResampleMethod::systematic) {
    grid_points(draws.grid, first, draws.start, count, out);
    return;
  }
  alignas(64) uint64_t low[kPlaced + 1];
  grid_points(draws.grid, first, 0, count + 1, low);
  random_numbers(draws.sequence, draws.offset + first, count, out);
  for (int64_t k = 0; k < count; ++k) out[k] = low[k] + mulhi(out[k], low[k + 1] - low[k]);
}

typedef int32_t Indices __attribute__((vector_size(kVectorBytes)));

template <int kShift, int... kLane>
REFINE_EXT_INLINE Indices shifted_up(Indices v, std::integer_sequence<int, kLane...>) {
  constexpr int kWidth = sizeof...(kLane);
  return __builtin_shufflevector(v, Indices{}, (kLane < kShift ? kWidth : kLane - kShift)...);
}

// Running maximum of the lanes, of non-negative numbers.
template <int kShift = 1>
REFINE_EXT_INLINE Indices running_maximum(Indices v) {
  constexpr int kWidth = kVectorBytes / 4;
  if constexpr (kShift < kWidth) {
    const Indices before = shifted_up<kShift>(v, std::make_integer_sequence<int, kWidth>{});
    return running_maximum<2 * kShift>(before > v ? before : v);
  } else {
    return v;
  }
}

// Without a branch on the data: how many positions lie below each boundary, by the place that arithmetic
// predicts and two comparisons; each element's index at its first position; a running maximum fills the rest.
void place(const uint64_t* bounds, int64_t elements, uint64_t base, double origin, double rate,
           const uint64_t* position, int64_t draws, int64_t first_index, int64_t* out) {
  constexpr int kWidth = kVectorBytes / 4;
  alignas(64) int32_t below[kDrawChunk];
  alignas(64) int32_t owner[kPlaced + kWidth];
  const int32_t last = static_cast<int32_t>(draws);
  // A little low: of the two candidates the true one is the predicted or the next. Ten bits are dropped
  // because only 52 can be made a float64 in every instruction set; they are worth 2^-50 of the total.
  const double start = origin - 0.0009765625, coarse_rate = rate * 1024.0;
  for (int64_t i = 0; i < elements; ++i) {
    const uint64_t coarse = (bounds[i] - base) >> 10;
    double guess =
        start + (std::bit_cast<double>(coarse | std::bit_cast<uint64_t>(0x1p52)) - 0x1p52) * coarse_rate;
    guess = guess > 0.0 ? guess : 0.0;
    guess = guess < kPlaced ? guess : double(kPlaced);
    below[i] = static_cast<int32_t>(guess);
  }
  std::memset(owner, 0, static_cast<size_t>(draws + 1) * sizeof(int32_t));
  for (int64_t i = 0; i < elements; ++i) {
    const int32_t at = below[i] < last ? below[i] : last;
    // position[draws] and the one after it are beyond every boundary. The draw after those below boundary i
    // is the next element's, unless a later element says so of itself.
    const int32_t next = at + (position[at] < bounds[i]) + (position[at + 1] < bounds[i]);
    owner[next] = static_cast<int32_t>(i + 1);
  }
  Indices current{};
  for (int64_t k = 0; k < draws; k += kWidth) {
    const Indices fresh = running_maximum(*reinterpret_cast<const Indices*>(owner + k));
    current = fresh > current ? fresh : current;
    alignas(64) int32_t lanes[kWidth];
    *reinterpret_cast<Indices*>(lanes) = current;
    current = Indices{} + lanes[kWidth - 1];
    if (k + kWidth <= draws) {
      for (int l = 0; l < kWidth; ++l) out[k + l] = first_index + lanes[l];
    } else {
      for (int64_t l = 0; k + l < draws; ++l) out[k + l] = first_index + lanes[l];
    }
  }
}

double largest(Storage storage, const void* p, int64_t begin, int64_t end) {
  alignas(64) double buffer[kDrawChunk];
  Extremes all;
  for (int64_t at = begin; at < end; at += kDrawChunk) {
    const int64_t stop = std::min(end, at + kDrawChunk);
    const Extremes found = extremes(widen(storage, p, at, stop, buffer), stop - at);
    all.lowest = std::min(all.lowest, found.lowest);
    all.highest = std::max(all.highest, found.highest);
  }
  const double infinity = std::numeric_limits<double>::infinity();
  if (all.highest >= ordered(infinity) || all.lowest < ordered(-infinity))
    return std::numeric_limits<double>::quiet_NaN();
  return from_ordered(all.highest);
}

int64_t accept(Storage storage, const void* p, int64_t begin, int64_t end, const Acceptance& acceptance,
               const PhiloxSequence& sequence, uint64_t offset, bool* keep) {
  constexpr int64_t kPart = 512;
  alignas(64) double buffer[kPart];
  alignas(64) uint64_t bits[kPart];
  const Acceptance decide = acceptance;
  int64_t kept = 0;
  for (int64_t at = begin; at < end; at += kPart) {
    const int64_t n = std::min(kPart, end - at);
    const double* log_ratio = widen(storage, p, at, at + n, buffer);
    random_numbers(sequence, offset + static_cast<uint64_t>(at), n, bits);
    for (int64_t i = 0; i < n; ++i) bits[i] = decide(log_ratio[i], bits[i]) ? 1 : 0;
    for (int64_t i = 0; i < n; ++i) kept += static_cast<int64_t>(bits[i]);
    for (int64_t i = 0; i < n; ++i) keep[at + i] = bits[i] != 0;
  }
  return kept;
}

void steps(const PhiloxSequence& sequence, uint64_t first, int64_t count, uint64_t* proposal,
           double* log_unit) {
  constexpr int64_t kPart = 512;
  alignas(64) uint64_t bits[kPart];
  for (int64_t at = 0; at < count; at += kPart) {
    const int64_t n = std::min(kPart, count - at);
    philox_blocks(sequence, first + static_cast<uint64_t>(at), n, proposal + at, bits);
    for (int64_t i = 0; i < n; ++i) log_unit[at + i] = reproducible_log(unit_to_one(bits[i]));
  }
}

}  // namespace

extern const ResamplingKernels resampling_kernels;
const ResamplingKernels resampling_kernels{measure, boundaries, random_numbers, positions,
                                           place,   largest,    accept,         steps};

}  // namespace refine_ext::REFINE_EXT_ISA
