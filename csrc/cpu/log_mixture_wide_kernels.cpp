// Squared distances, their states and the weighted sums of centres (csrc/cpu/log_mixture_wide.h). Compiled
// once per instruction set.
#include <algorithm>
#include <limits>

#include "log_mixture_wide_exponents.h"

namespace refine_ext::REFINE_EXT_ISA {
namespace {

using V = Vec<float>;
using D = Vec<double>;
using Bits = V::Bits;
constexpr int kWidth = V::kWidth;
static_assert(kPadding % kWidth == 0);

// With their operands the 32 registers of AVX-512, or the 16 before it.
#if defined(__AVX512F__)
constexpr int kTileRows = 4, kTileCenters = 6;
#else
constexpr int kTileRows = 2, kTileCenters = 4;
#endif

void widen(const void* from, Storage storage, int64_t rows, int64_t d, float* to, int64_t stride) {
  with_storage(storage, [&](auto tag) {
    using T = decltype(tag);
    if constexpr (!std::is_same_v<T, double>) {
      for (int64_t i = 0; i < rows; ++i, to += stride) {
        const T* x = static_cast<const T*>(from) + i * d;
        int64_t k = 0;
        for (; k + kWidth <= d; k += kWidth) load(x + k).store(to + k);
        if (k < d) {
          T last[kWidth] = {};
          std::memcpy(last, x + k, static_cast<size_t>(d - k) * sizeof(T));
          load(last).store(to + k);
          k += kWidth;
        }
        for (; k < stride; ++k) to[k] = 0.0f;
      }
    }
  });
}

// In v[0] what kBlocks = kWidth / kLanes vectors come down to whose lanes are added in blocks of kLanes: of
// each block lane l and l + kLanes / 2, until one is left of each of kWidth vectors, in their order.
template <int kLanes>
REFINE_EXT_INLINE void fold(V (&v)[kWidth]) {
  if constexpr (kLanes > 1) {
    Bits low, high;
#pragma GCC unroll 16
    for (int l = 0; l < kWidth; ++l) {
      constexpr int kHalf = kLanes / 2;
      const int q = l % (kWidth / 2);
      low[l] = (l < kWidth / 2 ? 0 : kWidth) + q / kHalf * kLanes + q % kHalf;
      high[l] = low[l] + kHalf;
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes / 2; ++i) {
      const V::Native a = v[2 * i].v, b = v[2 * i + 1].v;
      v[i].v = __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, high);
    }
    fold<kLanes / 2>(v);
  }
}

// The sum of each vector's lanes, alike whichever vectors come with it.
template <int kCount>
REFINE_EXT_INLINE void sums_of_lanes(const V* sum, float* to) {
#pragma GCC unroll 8
  for (int first = 0; first < kCount; first += kWidth) {
    V part[kWidth];
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i) part[i] = first + i < kCount ? sum[first + i] : V::splat(0);
    fold<kWidth>(part);
    part[0].store(to + first);
  }
}

// Room for what sums_of_lanes writes.
template <int kRows, int kCenters>
inline constexpr int kTileSums = (kRows * kCenters + kWidth - 1) / kWidth * kWidth;

// sums[r * kCenters + c] = |x_r - y_c|^2.
template <int kRows, int kCenters>
REFINE_EXT_INLINE void tile(const float* const* x, const float* const* y, int64_t stride, float* sums) {
  V sum[kRows * kCenters];
#pragma GCC unroll 32
  for (int e = 0; e < kRows * kCenters; ++e) sum[e] = V::splat(0);
  for (int64_t k = 0; k < stride; k += kWidth) {
    V a[kRows];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) a[r] = V::load(x[r] + k);
#pragma GCC unroll 8
    for (int c = 0; c < kCenters; ++c) {
      const V b = V::load(y[c] + k);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const V difference = a[r] - b;
        sum[r * kCenters + c] = sum[r * kCenters + c] + difference * difference;
      }
    }
  }
  sums_of_lanes<kRows * kCenters>(sum, sums);
}

constexpr int64_t kLine = 16;  // numbers of a cache line
void distances(const float* const* x, int64_t rows, const float* y, int64_t n, int64_t stride, float* to,
               int64_t to_stride) {
  for (int64_t j = 0; j < n; j += kTileCenters) {
    const float* centers[kTileCenters];
    for (int c = 0; c < kTileCenters; ++c) centers[c] = y + std::min(j + c, n - 1) * stride;
    const int64_t some = std::min<int64_t>(kTileCenters, n - j);
    // The next centres come from L3 meanwhile, a part with each tile.
    const float* next = y + std::min(j + kTileCenters, n) * stride;
    const float* end = y + std::min(j + 2 * kTileCenters, n) * stride;
    const int64_t share = divide_up(kTileCenters * stride, divide_up(rows, kTileRows) * kLine) * kLine;
    for (int64_t i = 0; i < rows; i += kTileRows) {
      for (const float* stop = next + std::min(share, end - next); next < stop; next += kLine)
        __builtin_prefetch(next, 0, 2);
      const float* row[kTileRows];
      for (int r = 0; r < kTileRows; ++r) row[r] = x[std::min(i + r, rows - 1)];
      float sums[kTileSums<kTileRows, kTileCenters>];
      tile<kTileRows, kTileCenters>(row, centers, stride, sums);
      for (int64_t r = 0; r < std::min<int64_t>(kTileRows, rows - i); ++r) {
        float* out = to + (i + r) * to_stride + j;
        for (int64_t c = 0; c < some; ++c) out[c] = sums[r * kTileCenters + c];
      }
    }
  }
}

void chosen_distances(const float* x, const float* y, const int32_t* chosen, int64_t count, int64_t stride,
                      float* to) {
  for (int64_t j = 0; j < count; j += kTileCenters) {
    const float* centers[kTileCenters];
    for (int c = 0; c < kTileCenters; ++c) centers[c] = y + chosen[std::min(j + c, count - 1)] * stride;
    float sums[kTileSums<1, kTileCenters>];
    tile<1, kTileCenters>(&x, centers, stride, sums);
    for (int64_t c = 0; c < std::min<int64_t>(kTileCenters, count - j); ++c) to[j + c] = sums[c];
  }
}

// The t of at least `least` come first, in order, and their centres in `index`; their number.
int64_t keep(double* t, int64_t count, double least, const int32_t* chosen, int32_t* index) {
  int64_t kept = 0, c = 0;
#if defined(__AVX512F__)
  const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  for (; c + 8 <= count; c += 8) {
    const __m512d each = _mm512_loadu_pd(t + c);
    const __mmask8 mask = _mm512_cmp_pd_mask(each, _mm512_set1_pd(least), _CMP_GE_OQ);
    if (mask == 0) continue;
    const __m256i own = chosen ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(chosen + c))
                               : _mm256_add_epi32(lanes, _mm256_set1_epi32(static_cast<int>(c)));
    // What is written behind the kept ones has been read.
    _mm512_storeu_pd(t + kept, _mm512_maskz_compress_pd(mask, each));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(index + kept), _mm256_maskz_compress_epi32(mask, own));
    kept += __builtin_popcount(mask);
  }
#endif
  for (; c < count; ++c) {
    const double value = t[c];
    index[kept] = chosen ? chosen[c] : static_cast<int32_t>(c);
    t[kept] = value;
    kept += value >= least;
  }
  return kept;
}

MixtureState reduce(const WideCenters& centers, int64_t first, const float* x, int64_t exclude,
                    const float* distances, const int32_t* chosen, int64_t count, double* t,
                    KeptCenters& kept) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  exponents(centers, first, x, exclude, distances, chosen, count, t);
  const auto at = [&](int64_t c) { return chosen ? chosen[c] : c; };

  constexpr int kParts = 4;
  D most[kParts];
  typename D::Bits nan{};
  for (D& part : most) part = D::splat(-kInfinity);
  int64_t c = 0;
  for (; c + kParts * D::kWidth <= count; c += kParts * D::kWidth) {
#pragma GCC unroll 4
    for (int p = 0; p < kParts; ++p) {
      const D each = D::load(t + c + p * D::kWidth);
      nan |= (each != each).bits;
      most[p] = max_or_second(each, most[p]);
    }
  }
  bool unknown = any(VecMask<double>{nan});
  double largest = -kInfinity;
  for (const D& part : most) largest = std::max(largest, horizontal_max(part));
  for (; c < count; ++c) {
    unknown |= t[c] != t[c];
    largest = std::max(largest, t[c]);
  }
  MixtureState state;
  kept.count = 0;
  if (unknown) {
    state.reference = state.sum = state.squares = state.largest = std::numeric_limits<double>::quiet_NaN();
    for (c = 0; t[c] == t[c];) ++c;
    state.index = first + at(c);
    return state;
  }
  if (largest == -kInfinity) return state;

  const int64_t total = keep(t, count, largest - centers.span, chosen, kept.index);
  kept.count = total;
  state.reference = state.largest = largest;
  for (c = 0; t[c] != largest;) ++c;
  state.index = first + kept.index[c];
  if (largest == kInfinity) {  // all that is kept
    for (c = 0; c < total; ++c) t[c] = largest = 0.0;
  }
  for (c = total; c % kWidth != 0; ++c) t[c] = -kInfinity;
  WideSum<float> sum, squares;
  for (c = 0; c < total; c += kWidth) {
    const V power = powers(t + c, largest);
    power.store(kept.weight + c);
    sum.add(power);
    squares.add(power * power);
  }
  state.sum = sum.total();
  state.squares = squares.total();
  return state;
}

// Terms that are summed in float32 before they go to float64: those of so many centres, counted or not.
constexpr int64_t kMeanBlock = 64;
#if defined(__AVX512F__)
constexpr int kMeanRows = 4, kMeanParts = 6;
#else
constexpr int kMeanRows = 2, kMeanParts = 4;
#endif

// to[r * stride + k] += sum_c weight[r][c] y_index[c],k for kParts vectors of k.
template <int kRows, int kParts>
void add_weighted(const float* y, int64_t stride, const int32_t* index, const float* const* weight,
                  int64_t count, double* to) {
  V sum[kRows][kParts];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int p = 0; p < kParts; ++p) sum[r][p] = V::splat(0);
  }
  for (int64_t c = 0; c < count; ++c) {
    const float* from = y + index[c] * stride;
    V w[kRows];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) w[r] = V::splat(weight[r][c]);
#pragma GCC unroll 8
    for (int p = 0; p < kParts; ++p) {
      const V value = V::load(from + p * kWidth);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) sum[r][p] = sum[r][p] + w[r] * value;
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int p = 0; p < kParts; ++p) {
      WideSum<float> wide;
      wide.add(sum[r][p]);
      double* own = to + r * stride + p * kWidth;
      (D::load(own) + wide.low).store(own);
      (D::load(own + D::kWidth) + wide.high).store(own + D::kWidth);
    }
  }
}

void weighted_sums(const WideCenters& centers, int64_t first, const KeptCenters* kept, int64_t rows,
                   double* sums) {
  const int64_t stride = centers.stride, n = centers.n - first < kChunk ? centers.n - first : kChunk;
  for (int64_t e = 0; e < rows * stride; ++e) sums[e] = 0.0;
  int64_t begin[kRowBlock] = {}, count[kRowBlock];
  for (int64_t block = 0; block < n; block += kMeanBlock) {
    const int64_t end = std::min(block + kMeanBlock, n);
    for (int64_t r = 0; r < rows; ++r) {
      count[r] = 0;
      while (begin[r] + count[r] < kept[r].count && kept[r].index[begin[r] + count[r]] < end) ++count[r];
    }
    for (int64_t k = 0; k < stride;) {
      const bool whole = k + kMeanParts * kWidth <= stride;
      const float* y = centers.row(first) + k;
      for (int64_t r = 0; r < rows;) {
        // Rows that count the whole block share its loads.
        bool shared = r + kMeanRows <= rows;
        for (int64_t q = r; shared && q < r + kMeanRows; ++q) shared = count[q] == end - block;
        const float* weight[kMeanRows];
        for (int64_t q = 0; q < (shared ? kMeanRows : 1); ++q) weight[q] = kept[r + q].weight + begin[r + q];
        const auto add = shared ? (whole ? add_weighted<kMeanRows, kMeanParts> : add_weighted<kMeanRows, 1>)
                                : (whole ? add_weighted<1, kMeanParts> : add_weighted<1, 1>);
        if (count[r] > 0) add(y, stride, kept[r].index + begin[r], weight, count[r], sums + r * stride + k);
        r += shared ? kMeanRows : 1;
      }
      k += whole ? kMeanParts * kWidth : kWidth;
    }
    for (int64_t r = 0; r < rows; ++r) begin[r] += count[r];
  }
}

}  // namespace

extern const WideKernels wide_kernels;
const WideKernels wide_kernels = {widen, distances, chosen_distances, reduce, weighted_sums};

}  // namespace refine_ext::REFINE_EXT_ISA
