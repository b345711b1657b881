// Chunk kernels of the resampling family, compiled once per instruction set and without contraction into fused
// multiply-adds (csrc/math/reproducible.h). Weights are widened to float64 chunk by chunk; the loops over them are plain
// and left to the vectoriser.
#include "resampling.h"

#include <algorithm>
#include <cstring>

#include "philox_simd.h"

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
    case Storage::float64: return static_cast<const double*>(p) + begin;
    case Storage::float32: widen_from(static_cast<const float*>(p) + begin, end - begin, buffer); break;
    case Storage::float16: widen_from(static_cast<const Half*>(p) + begin, end - begin, buffer); break;
    case Storage::bfloat16: widen_from(static_cast<const BFloat16*>(p) + begin, end - begin, buffer); break;
  }
  return buffer;
}

// Integers that are ordered as the floats are: -NaN < -inf < ... < inf < NaN. Comparing floats would not vectorise.
REFINE_EXT_INLINE int64_t ordered(double x) {
  const int64_t bits = std::bit_cast<int64_t>(x + 0.0);  // -0 becomes 0
  return bits ^ ((bits >> 63) & INT64_MAX);
}
REFINE_EXT_INLINE double from_ordered(int64_t key) { return std::bit_cast<double>(key ^ ((key >> 63) & INT64_MAX)); }

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
  chunk.sum = log ? sum_of(weights, n, LogMass(chunk.exponent)) : sum_of(weights, n, LinearMass(chunk.exponent));
  return true;
}

void boundaries(Storage storage, bool log, const void* p, int64_t begin, int64_t end, int64_t exponent, int64_t unit,
                uint64_t base, uint64_t* out) {
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

// Without a branch on the data: how many positions lie below each boundary, by the place that arithmetic predicts and two
// comparisons; each element's index at its first position; a running maximum fills the rest.
void place(const uint64_t* bounds, int64_t elements, uint64_t base, double origin, double rate,
           const uint64_t* positions, int64_t draws, int64_t first_index, int64_t* out) {
  alignas(64) int32_t below[kDrawChunk];
  alignas(64) int32_t owner[kPlaced + 1];
  const double last = static_cast<double>(draws);
  // A little low: of the two candidates the true one is the predicted or the next.
  const double start = origin - 0.0009765625;
  for (int64_t i = 0; i < elements; ++i) {
    double guess = start + static_cast<double>(static_cast<int64_t>(bounds[i] - base)) * rate;
    guess = guess > 0.0 ? guess : 0.0;
    guess = guess < last ? guess : last;
    const int32_t at = static_cast<int32_t>(guess);
    // positions[draws] and the one after it are beyond every boundary.
    below[i] = at + (positions[at] < bounds[i]) + (positions[at + 1] < bounds[i]);
  }
  std::memset(owner, 0, static_cast<size_t>(draws + 1) * sizeof(int32_t));
  owner[0] = 0;
  for (int64_t i = 0; i + 1 < elements; ++i) owner[below[i]] = static_cast<int32_t>(i + 1);
  int32_t current = 0;
  for (int64_t k = 0; k < draws; ++k) {
    current = owner[k] > current ? owner[k] : current;
    out[k] = first_index + current;
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
  if (all.highest >= ordered(infinity) || all.lowest < ordered(-infinity)) return std::numeric_limits<double>::quiet_NaN();
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
    uint8_t* flags = reinterpret_cast<uint8_t*>(keep + at);
    for (int64_t i = 0; i < n; ++i) flags[i] = decide(log_ratio[i], bits[i]) ? 1 : 0;
    for (int64_t i = 0; i < n; ++i) kept += flags[i];
  }
  return kept;
}

void steps(const PhiloxSequence& sequence, uint64_t first, int64_t count, uint64_t* proposal, double* log_unit) {
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
const ResamplingKernels resampling_kernels{measure, boundaries, random_numbers, place, largest, accept, steps};

}  // namespace refine_ext::REFINE_EXT_ISA
