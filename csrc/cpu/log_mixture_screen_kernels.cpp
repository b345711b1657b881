// Bounds of exponents from rounded rows and centres, and the centres that may count
// (csrc/cpu/log_mixture_wide.h). Compiled once per instruction set.
//
// With a = x - c and b = y - c, and a', b' their roundings: |a.b - a'.b'| <= |a'| |b - b'| + |a - a'| |b|,
// and a'.b' is a sum of integers, which is exact.
#include <algorithm>
#include <cmath>
#include <limits>

#include "log_mixture_wide.h"
#include "simd_storage.h"

#if defined(__SSE2__) && !defined(__AVX512F__) && !defined(__F16C__)
#include <emmintrin.h>
#endif

namespace refine_ext::REFINE_EXT_ISA {
namespace {

using V = Vec<float>;
using Bits = V::Bits;
constexpr int kWidth = V::kWidth;

#if defined(__AVX512F__)
constexpr int kVectors = 4, kRows = 6;
#else
constexpr int kVectors = 2, kRows = 4;
#endif
constexpr int kPanel = kVectors * kWidth;
static_assert(kChunk % kPanel == 0);

// What a 32-bit lane holds of a row, and of a centre, and how the products of two lanes are added to a third.

// Four bytes, the centre's above zero by kShift.
struct ByteLanes {
  using Integer = int8_t;
  static constexpr int kCount = 4, kLimit = 127, kShift = 128;
  static constexpr int64_t kMostDimensions = (int64_t{1} << 31) / (255 * 127);
#if defined(__AVX512F__)
  // In its own words, since not all machines with AVX-512 have it.
  static REFINE_EXT_INLINE void add(Bits& sum, Bits center, Bits row) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(center), "v"(row));
  }
  static bool exists() { return __builtin_cpu_supports("avx512vnni"); }
#else
  static REFINE_EXT_INLINE void add(Bits&, Bits, Bits) {}
  static bool exists() { return false; }
#endif
};

// Two integers of 11 bits.
struct WordLanes {
  using Integer = int16_t;
  static constexpr int kCount = 2, kLimit = 1023, kShift = 0;
  static constexpr int64_t kMostDimensions = (int64_t{1} << 31) / (1023 * 1023);
#if defined(__AVX512BW__)
  static REFINE_EXT_INLINE void add(Bits& sum, Bits center, Bits row) {
    sum += (Bits)_mm512_madd_epi16((__m512i)center, (__m512i)row);
  }
  static bool exists() { return true; }
#elif defined(__AVX2__)
  static REFINE_EXT_INLINE void add(Bits& sum, Bits center, Bits row) {
    sum += (Bits)_mm256_madd_epi16((__m256i)center, (__m256i)row);
  }
  static bool exists() { return true; }
#elif defined(__SSE2__)
  static REFINE_EXT_INLINE void add(Bits& sum, Bits center, Bits row) {
    sum += (Bits)_mm_madd_epi16((__m128i)center, (__m128i)row);
  }
  static bool exists() { return true; }
#else
  static REFINE_EXT_INLINE void add(Bits&, Bits, Bits) {}
  static bool exists() { return false; }
#endif
};

// f(lanes) with what this machine and d take; false: nothing.
template <class F>
bool with_lanes(int64_t d, F&& f) {
  if (ByteLanes::exists() && d <= ByteLanes::kMostDimensions) {
    f(ByteLanes{});
    return true;
  }
  if (WordLanes::exists() && d <= WordLanes::kMostDimensions) {
    f(WordLanes{});
    return true;
  }
  return false;
}

int64_t padded(int64_t d) { return (d + kPadding - 1) / kPadding * kPadding; }

int64_t panel_bytes(int64_t d) {
  int64_t bytes = 0;
  with_lanes(d, [&](auto lanes) { bytes = padded(d) / lanes.kCount * kPanel * 4; });
  return bytes;
}

// Roundings of float32 in an exponent, of the distance that is summed in the end and of its bounds, to each
// of their terms.
double rounding_of(int64_t stride) { return 0x1.2p-24 * static_cast<double>(stride / kWidth + 16); }

struct Rounded {
  double norm;      // |a|
  double residual;  // |a - a'|, at most
  float unit;       // a' = unit * integers
  int64_t sum;      // of the integers
  bool known;       // false: not finite, or too large
};

// a = x - c, rounded.
template <class Lanes>
Rounded round_row(const float* x, const float* mean, int64_t stride, typename Lanes::Integer* to, float* a) {
  const auto magnitude = [](V v) { return V{(V::Native)((Bits)v.v & 0x7fffffff)}; };
  V most = V::splat(0);
  WideSum<float> square;
  for (int64_t k = 0; k < stride; k += kWidth) {
    const V each = V::load(x + k) - V::load(mean + k);
    each.store(a + k);
    most = max_or_second(magnitude(each), most);
    square.add(each * each);
  }
  const float largest = static_cast<float>(horizontal_max(most));
  const double squares = square.total();
  Rounded result{std::sqrt(squares), 0.0, 0.0f, 0, squares < 1e30};
  if (!result.known) return result;
  const bool some = largest > 1e-30f;  // the reciprocal of less would overflow
  const V scale = V::splat(some ? Lanes::kLimit / largest : 0.0f);
  result.unit = some ? largest / Lanes::kLimit : 0.0f;
  const V unit = V::splat(result.unit), magic = V::splat(0x1.8p23f);
  typedef typename Lanes::Integer Narrow
      __attribute__((vector_size(kWidth * sizeof(typename Lanes::Integer)), aligned(1), may_alias));
  V residual = V::splat(0);
  Bits sum{};
  for (int64_t k = 0; k < stride; k += kWidth) {
    const V each = V::load(a + k), shifted = each * scale + magic;
    const Bits integer = (Bits)shifted.v - (Bits)magic.v;
    const V left = each - (shifted - magic) * unit;
    residual = residual + left * left;
    sum += integer;
    *reinterpret_cast<Narrow*>(to + k) = __builtin_convertvector(integer, Narrow);
  }
  for (int l = 0; l < kWidth; ++l) result.sum += sum[l];
  // Roundings of x - c and of what is left, of the sum of squares, and what underflow took from it.
  result.residual = 1.001 * std::sqrt(horizontal_sum(residual)) + 0x1p-22 * result.norm +
                    1e-19 * static_cast<double>(stride);
  return result;
}

template <class Lanes>
void round_panel(const WideCenters& centers, int64_t stride, const ScreenCenters& to, int64_t panel,
                 char* values, float* a, typename Lanes::Integer* integers) {
  const int64_t steps = stride / Lanes::kCount;
  const double rounding = rounding_of(stride);
  int32_t* words = reinterpret_cast<int32_t*>(values);
  for (int64_t lane = 0; lane < kPanel; ++lane) {
    const int64_t j = panel * kPanel + lane;
    to.base[j] = -std::numeric_limits<float>::infinity();
    to.gain[j] = to.rate[j] = to.residual[j] = to.size[j] = to.slack[j] = 0.0f;
    if (j >= centers.n) continue;
    const Rounded b = round_row<Lanes>(centers.row(j), to.mean, stride, integers, a);
    const double rate = centers.rate[j] / to.unit, weight = centers.log2_weight[j] / to.unit;
    to.base[j] = static_cast<float>(weight - rate * b.norm * b.norm);
    to.gain[j] = static_cast<float>(2.0 * rate * b.unit);
    to.rate[j] = static_cast<float>(rate);
    to.residual[j] = static_cast<float>(2.002 * rate * b.residual);
    to.size[j] = static_cast<float>(2.002 * rate * b.norm);
    const double size = rate * b.norm * b.norm + (std::isfinite(weight) ? std::fabs(weight) : 0.0);
    // Not finite where no bound holds.
    to.slack[j] = static_cast<float>(b.known && size < 1e37 ? 1.001 * rounding * size : HUGE_VAL);
    for (int64_t s = 0; s < steps; ++s) {
      typename Lanes::Integer word[Lanes::kCount];
      for (int e = 0; e < Lanes::kCount; ++e)
        word[e] = static_cast<typename Lanes::Integer>(integers[s * Lanes::kCount + e] + Lanes::kShift);
      std::memcpy(words + s * kPanel + lane, word, 4);
    }
  }
}

void round_centers(const WideCenters& centers, int64_t d, const ScreenCenters& to, int64_t begin, int64_t end,
                   float* scratch) {
  const int64_t stride = padded(d);
  with_lanes(d, [&](auto lanes) {
    using Lanes = decltype(lanes);
    auto* integers = reinterpret_cast<typename Lanes::Integer*>(scratch + stride);
    for (int64_t panel = begin; panel < end; ++panel)
      round_panel<Lanes>(centers, stride, to, panel, to.values + panel * panel_bytes(d), scratch, integers);
  });
}

// to[r][0, kPanel) = start[r] + products of row r's integers and a panel's.
template <class Lanes>
REFINE_EXT_INLINE void products(const int32_t* const* rows, const int32_t* start, const int32_t* panel,
                                int64_t steps, int32_t* const* to) {
  Bits sum[kRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < kVectors; ++c) sum[r][c] = start[r] - Bits{};
  }
  for (int64_t s = 0; s < steps; ++s, panel += kPanel) {
    Bits center[kVectors];
#pragma GCC unroll 8
    for (int c = 0; c < kVectors; ++c) center[c] = *reinterpret_cast<const Bits*>(panel + c * kWidth);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Bits row = rows[r][s] - Bits{};
#pragma GCC unroll 8
      for (int c = 0; c < kVectors; ++c) Lanes::add(sum[r][c], center[c], row);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < kVectors; ++c) *reinterpret_cast<Bits*>(to[r] + c * kWidth) = sum[r][c];
  }
}

// Upper bounds of the exponents in the place of the products, and a lower bound of the largest.
float bound(const ScreenCenters& centers, int64_t first, const float* base, int64_t count, const Rounded& a,
            double rounding, float* products) {
  const V unit = V::splat(a.unit), norm = V::splat(static_cast<float>(-a.norm * a.norm)),
          rounded = V::splat(static_cast<float>(1.001 * (a.norm + a.residual))),
          residual = V::splat(static_cast<float>(1.001 * (a.residual + rounding * a.norm))),
          square = V::splat(static_cast<float>(1.001 * rounding * a.norm * a.norm));
  V largest = V::splat(-std::numeric_limits<float>::infinity());
  for (int64_t c = 0; c < count; c += kWidth) {
    const int64_t j = first + c;
    const V product{__builtin_convertvector(*reinterpret_cast<const Bits*>(products + c), V::Native)};
    const V rate = V::load(centers.rate + j);
    const V middle = V::load(base + c) + rate * norm + V::load(centers.gain + j) * (unit * product);
    const V error = V::load(centers.slack + j) + rate * square + V::load(centers.residual + j) * rounded +
                    V::load(centers.size + j) * residual;
    largest = max_or_second(middle - error, largest);
    (middle + error).store(products + c);
  }
  return static_cast<float>(horizontal_max(largest));
}

// The c of upper[c] >= least, -1 where they are more than `most`.
int64_t choose_above(const float* upper, int64_t count, float least, int64_t most, int32_t* chosen) {
  int64_t found = 0;
  for (int64_t c = 0; c < count; c += kPanel) {
    Bits some{};
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) some |= (Bits)(V::load(upper + c + v * kWidth).v >= V::splat(least).v);
    if (!any(VecMask<float>{some})) continue;
    for (int64_t each = c; each < c + kPanel; ++each) {
      if (!(upper[each] >= least)) continue;
      if (found == most) return -1;
      chosen[found++] = static_cast<int32_t>(each);
    }
  }
  return found;
}

constexpr int64_t kProducts = kRowBlock * kChunk;

int64_t scratch_floats(int64_t d) { return kProducts + kChunk + padded(d) * (kRowBlock + 1); }

template <class Lanes>
void choose_of(const WideCenters& centers, const ScreenCenters& screen, int64_t d, const float* const* x,
               int64_t rows, const int64_t* exclude, const double* least, int64_t first, int64_t n,
               int64_t most, int64_t room, float* scratch, int32_t* chosen, int64_t* count) {
  const int64_t stride = padded(d), steps = stride / Lanes::kCount,
                whole = (n + kPanel - 1) / kPanel * kPanel;
  float *base = scratch + kProducts, *a = base + kChunk;
  int32_t* words = reinterpret_cast<int32_t*>(a + stride);
  Rounded rounded[kRowBlock];
  int32_t start[kRowBlock];
  for (int64_t r = 0; r < rows; ++r) {
    rounded[r] = round_row<Lanes>(x[r], screen.mean, stride,
                                  reinterpret_cast<typename Lanes::Integer*>(words + r * steps), a);
    start[r] = static_cast<int32_t>(-Lanes::kShift * rounded[r].sum);
  }
  for (int64_t c = 0; c < whole; c += kPanel) {
    const int32_t* panel =
        reinterpret_cast<const int32_t*>(screen.values + (first + c) / kPanel * panel_bytes(d));
    for (int64_t i = 0; i < rows; i += kRows) {
      const int32_t* row[kRows];
      int32_t own[kRows];
      int32_t* to[kRows];
      for (int r = 0; r < kRows; ++r) {
        const int64_t each = std::min(i + r, rows - 1);
        row[r] = words + each * steps;
        own[r] = start[each];
        to[r] = reinterpret_cast<int32_t*>(scratch) + each * kChunk + c;
      }
      products<Lanes>(row, own, panel, steps, to);
    }
  }
  std::memcpy(base, screen.base + first, static_cast<size_t>(whole) * sizeof(float));
  const float span = static_cast<float>(centers.span / screen.unit * 1.001);
  for (int64_t r = 0; r < rows; ++r) {
    count[r] = -1;
    if (!rounded[r].known) continue;
    if (exclude[r] >= 0) base[exclude[r]] = -std::numeric_limits<float>::infinity();
    float* bounds = scratch + r * kChunk;
    const float largest = bound(screen, first, base, whole, rounded[r], rounding_of(stride), bounds);
    const float wanted = least ? static_cast<float>(least[r] / screen.unit) : largest - span;
    // Down by its rounding, and by what underflow may take from the bounds.
    const float lowest = wanted - 1e-6f * (least ? std::fabs(wanted) : std::fabs(largest) + span) - 1e-36f;
    // Not where no bound is finite.
    if (largest > -HUGE_VALF && lowest > -std::numeric_limits<float>::max())
      count[r] = choose_above(bounds, whole, lowest, most, chosen + r * room);
    if (exclude[r] >= 0) base[exclude[r]] = screen.base[first + exclude[r]];
  }
}

void choose(const WideCenters& centers, const ScreenCenters& screen, int64_t d, const float* const* x,
            int64_t rows, const int64_t* exclude, const double* least, int64_t first, int64_t n, int64_t most,
            int64_t room, float* scratch, int32_t* chosen, int64_t* count) {
  with_lanes(d, [&](auto lanes) {
    choose_of<decltype(lanes)>(centers, screen, d, x, rows, exclude, least, first, n, most, room, scratch,
                               chosen, count);
  });
}

}  // namespace

extern const ScreenKernels mixture_screen_kernels;
const ScreenKernels mixture_screen_kernels = {kPanel, panel_bytes, round_centers, choose, scratch_floats};

}  // namespace refine_ext::REFINE_EXT_ISA
