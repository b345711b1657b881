// Exact sums under signs by tables (csrc/cpu/rademacher.h), compiled once per instruction set.
#include <array>
#include <bit>
#include <limits>

#include "rademacher_tables.h"

namespace refine_ext::REFINE_EXT_ISA {
namespace {

template <class S>
REFINE_EXT_INLINE Vec<S> magnitude_of(Vec<S> x) {
  using Integer = typename Vec<S>::Integer;
  return {(typename Vec<S>::Native)((typename Vec<S>::Bits)x.v & std::numeric_limits<Integer>::max())};
}

// x * 2^shift, in two factors of which neither leaves the type's range, to the nearest integer, ties to even,
// and no further than the limit; a limit of 0 makes NaN 0.
template <class S>
struct Scale {
  Vec<S> first, second, limit;
};

template <class S>
REFINE_EXT_INLINE typename Vec<S>::Bits to_integer(Vec<S> x, const Scale<S>& scale) {
  using V = Vec<S>;
  using Bits = typename V::Bits;
  const V scaled = x * scale.first * scale.second;
#if defined(__AVX512F__)
  if constexpr (sizeof(S) == 4) {
    const __m512i limit = _mm512_cvtps_epi32((__m512)scale.limit.v);
    const __m512i integer = _mm512_cvtps_epi32((__m512)scaled.v);
    return (Bits)_mm512_max_epi32(_mm512_min_epi32(integer, limit), _mm512_sub_epi32(__m512i{}, limit));
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(S) == 4) {
    const __m256i limit = _mm256_cvtps_epi32((__m256)scale.limit.v);
    const __m256i integer = _mm256_cvtps_epi32((__m256)scaled.v);
    return (Bits)_mm256_max_epi32(_mm256_min_epi32(integer, limit), _mm256_sub_epi32(__m256i{}, limit));
  }
#endif
  // Adding 2^(mantissa bits) rounds.
  const V one_unit = V::splat(sizeof(S) == 4 ? S(0x1p23) : S(0x1p52));
  const V size = magnitude_of(scaled), bounded = select(size < scale.limit, size, scale.limit);
  const Bits sign = (Bits)x.v >> (8 * static_cast<int>(sizeof(S)) - 1);
  return (((Bits)(bounded + one_unit).v - (Bits)one_unit.v) ^ sign) - sign;
}

// Columns of one block of rows, [rows][kColumns], to integers in place, with back[j] to return.
template <class T>
class FixedColumns {
 public:
  using S = typename ComputeOf<T>::type;
  using E = typename Vec<S>::Integer;
  using V = Vec<S>;
  using Bits = typename V::Bits;
  static constexpr int kColumns = Row<E>::kColumns, kParts = Row<E>::kParts, kWidth = V::kWidth;

  // The columns are those from `column` on of what was staged last.
  template <class Staged>
  FixedColumns(S* staged, int64_t rows, int digits, double* back, const Staged& staging, int64_t column)
      : rows_(rows), fixed_(staged) {
    const int certain = sizeof(S) == 8 ? kFixedBits64 : certain_bits(rows);
    const bool free = sizeof(S) == 4 && 8 * digits - 1 > certain;  // bits are chosen by magnitudes
    bool decided = true;
    FixedPoint points[kColumns];
    int bits[kColumns];
    for (int j = 0; j < kColumns; ++j) {
      bits[j] = sizeof(S) == 8 ? certain : std::min(certain, 8 * digits - 1);
      points[j] = fixed_point(staging.largest(column + j), bits[j]);
      if (free && points[j].back > 0.0)
        decided &= choose_bits(staging.sum(column + j), points[j], digits, bits[j]);
    }
    if (!decided) {
      for (int j = 0; j < kColumns; ++j) set_scale(j, points[j], certain);
      const std::array<uint64_t, kColumns> magnitudes = sum_magnitudes();
      for (int j = 0; j < kColumns; ++j) bits[j] = fixed_bits(rows, magnitudes[j], digits);
    }
    for (int j = 0; j < kColumns; ++j) {
      // More bits than were certain: float32 values, whose shifts have no limit to run into.
      const int more = free ? bits[j] - certain : 0;
      points[j].shift += more;
      points[j].back /= static_cast<double>(1 << more);
      set_scale(j, points[j], bits[j]);
      back[j] = points[j].back;
    }
    to_integers();
  }

 private:
  // By a float32 sum of magnitudes, off by some roundings, instead of the sum of integers; false: it may be
  // either of two numbers of bits.
  bool choose_bits(S sum, const FixedPoint& certain, int digits, int& bits) const {
    const double integers = static_cast<double>(sum) / certain.back;
    const double off = 2e-4 * integers + 2.0 * static_cast<double>(rows_);
    if (!(integers + off < 0x1p40)) return false;  // overflown
    bits = fixed_bits(rows_, static_cast<uint64_t>(std::max(0.0, integers - off)), digits);
    return bits == fixed_bits(rows_, static_cast<uint64_t>(integers + off), digits);
  }

  void set_scale(int j, const FixedPoint& point, int bits) {
    const int half = point.shift / 2;
    first_[j] = power_of_two(half);
    second_[j] = power_of_two(point.shift - half);
    limit_[j] = point.back == point.back ? static_cast<S>((int64_t{1} << bits) - 1) : S(0);
  }

  // Of an exponent that is far from the ends of the type's range.
  static S power_of_two(int exponent) {
    if constexpr (sizeof(S) == 4) {
      return std::bit_cast<float>(static_cast<uint32_t>(exponent + 127) << 23);
    } else {
      return std::bit_cast<double>(static_cast<uint64_t>(exponent + 1023) << 52);
    }
  }

  std::array<uint64_t, kColumns> sum_magnitudes() const {
    Bits sum[kParts] = {};  // below 2^31: 1024 values of certain_bits
    for (int64_t i = 0; i < rows_; ++i) {
#pragma GCC unroll 4
      for (int p = 0; p < kParts; ++p) {
        const Bits integer = to_integer<S>(V::load(fixed_ + i * kColumns + p * kWidth), scale(p));
        sum[p] += integer < 0 ? -integer : integer;
      }
    }
    std::array<uint64_t, kColumns> sums;
    for (int j = 0; j < kColumns; ++j) sums[j] = static_cast<uint64_t>(sum[j / kWidth][j % kWidth]);
    return sums;
  }

  void to_integers() {
    Scale<S> scales[kParts];
    for (int p = 0; p < kParts; ++p) scales[p] = scale(p);
    for (int64_t i = 0; i < rows_; ++i) {
#pragma GCC unroll 4
      for (int p = 0; p < kParts; ++p) {
        S* at = fixed_ + i * kColumns + p * kWidth;
        V{(typename V::Native)to_integer<S>(V::load(at), scales[p])}.store(at);
      }
    }
    std::memset(fixed_ + rows_ * kColumns, 0, Narrow::kRows * kRowBytes);  // the most that a step lacks
  }

  Scale<S> scale(int p) const {
    return {V::load(first_ + p * kWidth), V::load(second_ + p * kWidth), V::load(limit_ + p * kWidth)};
  }

  int64_t rows_;
  S* fixed_;
  alignas(64) S first_[kColumns], second_[kColumns], limit_[kColumns];
};

// sums += running * back, running = 0.
template <class E>
void flush(Row<E>* running, int64_t draws, const double* back, double* sums) {
  constexpr int kColumns = Row<E>::kColumns, kWidth = Vec<double>::kWidth;
  typedef E Part __attribute__((vector_size(kWidth * sizeof(E)), may_alias));
  for (int64_t k = 0; k < draws; ++k) {
    const E* from = reinterpret_cast<const E*>(running + k);
    double* to = sums + k * kColumns;
#pragma GCC unroll 8
    for (int j = 0; j < kColumns; j += kWidth) {
      const Part integers = *reinterpret_cast<const Part*>(from + j);
      const Vec<double> sum{__builtin_convertvector(integers, Vec<double>::Native)};
      (Vec<double>::load(to + j) + sum * Vec<double>::load(back + j)).store(to + j);
    }
    running[k] = Row<E>{};
  }
}

template <class T, class Shape>
void add_sums_of(const RademacherPanel& panel) {
  using Columns = FixedColumns<T>;
  using E = typename Columns::E;
  using S = typename Columns::S;
  constexpr int kColumns = Columns::kColumns;
  const PanelScratch scratch = divide(panel.scratch, panel.n, panel.draws);
  const int64_t padded = padded_draws(panel.draws), block_rows = staged_rows(panel.n);
  Row<E>* running = reinterpret_cast<Row<E>*>(scratch.running);
  std::memset(running, 0, static_cast<size_t>(panel.draws * kRowBytes));
  alignas(64) double back[kColumns];
  for (int64_t row = 0; row < panel.n; row += kSignBlock) {
    const int64_t rows = std::min(kSignBlock, panel.n - row);
    make_words<Shape>(panel, panel.first_row + row, rows, scratch);
    for (int64_t stage = 0; stage < panel.columns; stage += kStaged * kColumns) {
      const T* data = static_cast<const T*>(panel.outputs) + row * panel.stride + stage;
      const int64_t columns = std::min<int64_t>(kStaged * kColumns, panel.columns - stage);
      S* staged = reinterpret_cast<S*>(scratch.fixed);
      Staging<T, S, kColumns> staging;
      staging.read(data, panel.stride, rows, columns, staged, block_rows);
      for (int64_t j = 0; panel.largest && j < columns; ++j) {
        const double peak = staging.largest(j);
        double& largest = panel.largest[stage + j];
        largest = peak > largest || peak != peak ? peak : largest;
      }
      const bool beside = stage + kStaged * kColumns < panel.columns, below = row + rows < panel.n;
      const T* next = beside  ? data + kStaged * kColumns
                      : below ? data - stage + rows * panel.stride
                              : nullptr;
      const int64_t next_columns =
          std::min<int64_t>(kStaged * kColumns, panel.columns - (beside ? stage + columns : 0));
      Ahead ahead(next, panel.stride * static_cast<int64_t>(sizeof(T)),
                  beside ? rows : std::min(kSignBlock, panel.n - row - rows),
                  next_columns * static_cast<int64_t>(sizeof(T)),
                  Shape::steps(rows) * ((columns + kColumns - 1) / kColumns));
      for (int64_t column = 0; column < columns; column += kColumns, staged += block_rows * kColumns) {
        FixedColumns<T>(staged, rows, panel.digits, back, staging, column);
        for (int64_t s = 0; s < Shape::steps(rows); ++s) {
          const int64_t first = s * Shape::kRows;
          ahead.step();
          add_step<E, Shape>(reinterpret_cast<const Row<E>*>(staged) + first, rows - first,
                             scratch.words + s * padded, panel.draws, scratch.tables, running);
        }
        flush<E>(running, panel.draws, back, panel.sums + (stage + column) * panel.draws);
      }
    }
  }
}

void add_sums(const RademacherPanel& panel) {
  with_storage(panel.storage, [&](auto tag) {
    using T = decltype(tag);
    if (panel.draws <= kFewDraws) {
      add_sums_of<T, Narrow>(panel);
    } else {
      add_sums_of<T, Wide>(panel);
    }
  });
}

// ---- The supremum over the columns

// The largest of `count` sums (kMagnitude: of their sizes), NaN if there is one.
template <bool kMagnitude>
REFINE_EXT_INLINE double largest_of(const double* sums, int64_t count) {
  using V = Vec<double>;
  V best = V::splat(-HUGE_VAL), nan = V::splat(0.0);
  int64_t j = 0;
  for (; j + V::kWidth <= count; j += V::kWidth) {
    const V sum = V::load(sums + j), size = kMagnitude ? magnitude_of(sum) : sum;
    best = select(size > best, size, best);
    nan = select(size != size, size, nan);
  }
  double result = -HUGE_VAL;
  const auto take = [&](double size) { result = size > result || size != size ? size : result; };
  for (int l = 0; l < V::kWidth; ++l) {
    if (nan.v[l] != nan.v[l]) return nan.v[l];
    take(best.v[l]);
  }
  for (; j < count && result == result; ++j) take(kMagnitude ? std::fabs(sums[j]) : sums[j]);
  return result;
}

template <bool kMagnitude>
void reduce_largest(const RademacherPanel& panel, int64_t column, const SupremumState& state) {
  const int64_t width = row_columns(panel.storage);
  for (int64_t first = 0; first < panel.columns; first += width) {
    const int64_t count = std::min(width, panel.columns - first);
    const double* sums = panel.sums + first * panel.draws;
    for (int64_t i = 0; i < panel.draws; ++i, sums += width) {
      const int64_t k = panel.chosen ? panel.chosen[i] : i;
      const double largest = largest_of<kMagnitude>(sums, count), best = state.best[k];
      if (!(largest > best || (largest != largest && best == best))) continue;
      int64_t j = 0;
      const auto size = [&] { return kMagnitude ? std::fabs(sums[j]) : sums[j]; };
      while (size() != largest && !(largest != largest && size() != size())) ++j;
      state.best[k] = largest;
      state.index[k] = sums[j] < 0.0 ? -1 - (column + first + j) : column + first + j;
    }
  }
}

// Column j's square goes to lane j % 16.
void reduce_squares(const RademacherPanel& panel, int64_t column, const SupremumState& state) {
  const int64_t width = row_columns(panel.storage);
  for (int64_t first = 0; first < panel.columns; first += width) {
    const int64_t count = std::min(width, panel.columns - first);
    const double* sums = panel.sums + first * panel.draws;
    for (int64_t k = 0; k < panel.draws; ++k, sums += width) {
      double* lanes = state.lanes + k * 16 + (column + first) % 16;
      for (int64_t j = 0; j < count; ++j) lanes[j] += sums[j] * sums[j];
    }
  }
}

void reduce(const RademacherPanel& panel, int64_t column, Supremum supremum, const SupremumState& state) {
  switch (supremum) {
    case Supremum::largest:
      return reduce_largest<false>(panel, column, state);
    case Supremum::magnitude:
      return reduce_largest<true>(panel, column, state);
    default:
      return reduce_squares(panel, column, state);
  }
}

}  // namespace

extern const RademacherKernels rademacher_kernels;
const RademacherKernels rademacher_kernels = {scratch_bytes, add_sums, reduce};

}  // namespace refine_ext::REFINE_EXT_ISA
