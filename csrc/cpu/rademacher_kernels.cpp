// Sums under signs by tables (csrc/cpu/rademacher.h), compiled once per instruction set.
#include <algorithm>
#include <array>
#include <utility>

#include "normal_simd.h"
#include "rademacher.h"

namespace refine_ext::REFINE_EXT_ISA {
namespace {

// 64 bytes of columns.
template <class E>
struct Row {
  typedef E Native __attribute__((vector_size(kVectorBytes), may_alias));
  static constexpr int kWidth = kVectorBytes / static_cast<int>(sizeof(E));
  static constexpr int kParts = static_cast<int>(kRowBytes) / kVectorBytes;
  static constexpr int kColumns = static_cast<int>(kRowBytes / static_cast<int64_t>(sizeof(E)));
  Native part[kParts];
};

// Tables of kBits rows each, kTables of them at once. A word has the signs of kRows rows from bit 6 on, so
// that its fields are offsets of rows of 64 bytes.
template <int kBits_, int kTables_>
struct Shape {
  static constexpr int kBits = kBits_, kTables = kTables_, kRows = kBits * kTables;
  static constexpr int64_t kEntries = int64_t{1} << kBits;
  static constexpr int64_t steps(int64_t rows) { return (rows + kRows - 1) / kRows; }
};
using Wide = Shape<6, 7>;     // 28 KB of tables; L1 has room left for what streams by
using Narrow = Shape<4, 12>;  // where making 64 entries costs more than looking them up
constexpr int64_t kFewDraws = 48;

constexpr int64_t kPaddedRows = kSignBlock + 64;

int64_t padded_draws(int64_t draws) { return (draws + 7) / 8 * 8; }

// The working memory of one panel.
struct Scratch64 {
  uint64_t* bits;   // [2 for each Philox block][padded draws]
  uint64_t* words;  // [steps][padded draws]
  char* fixed;      // [kPaddedRows] rows
  char* tables;
  char* running;  // [draws] rows
};

int64_t sign_words(int64_t rows) { return (rows + kSignsPerPhilox - 1) / kSignsPerPhilox * 2 + 1; }

int64_t scratch_bytes(int64_t n, int64_t draws) {
  const int64_t rows = std::min(n, kSignBlock);
  const int64_t words = sign_words(rows) + Wide::steps(rows);
  return padded_draws(draws) * 8 * words + kRowBytes * (kPaddedRows + Wide::kEntries * Wide::kTables + draws);
}

Scratch64 divide(void* scratch, int64_t n, int64_t draws) {
  const int64_t rows = std::min(n, kSignBlock), padded = padded_draws(draws);
  Scratch64 parts;
  parts.bits = static_cast<uint64_t*>(scratch);
  parts.words = parts.bits + sign_words(rows) * padded;
  parts.fixed = reinterpret_cast<char*>(parts.words + Wide::steps(rows) * padded);
  parts.tables = parts.fixed + kPaddedRows * kRowBytes;
  parts.running = parts.tables + Wide::kEntries * Wide::kTables * kRowBytes;
  return parts;
}

// The two halves of Philox block `index` of kWidth draws.
struct SignLanes {
  Lanes::Native low, high;
};
REFINE_EXT_INLINE SignLanes signs_of(uint64_t seed, Lanes::Native draw, uint64_t index) {
  const Lanes::Native zero{};
  const Lanes::Native fourth = (draw >> 32 << 8) | static_cast<uint64_t>(Stream::sign);
  const PhiloxBlock<Lanes> block =
      philox4x32<Lanes>({{{zero + (index & 0xffffffffu)}, {zero + (index >> 32)}, {draw}, {fourth}}},
                        static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
  return {(block.word[0].v & 0xffffffffu) | block.word[1].v << 32,
          (block.word[2].v & 0xffffffffu) | block.word[3].v << 32};
}

template <class Shape>
void make_words(const RademacherPanel& panel, int64_t sample, int64_t rows, const Scratch64& scratch) {
  typedef Lanes::Native V;
  constexpr int kWidth = Lanes::kWidth;
  const int64_t padded = padded_draws(panel.draws), blocks = (rows + kSignsPerPhilox - 1) / kSignsPerPhilox;
  V lane;
  for (int l = 0; l < kWidth; ++l) lane[l] = static_cast<uint64_t>(l);
  for (int64_t b = 0; b < blocks; ++b) {
    const uint64_t index = static_cast<uint64_t>(sample / kSignsPerPhilox + b);
    for (int64_t k = 0; k < padded; k += kWidth) {
      const SignLanes signs =
          signs_of(panel.seed, lane + (panel.first_draw + static_cast<uint64_t>(k)), index);
      *reinterpret_cast<V*>(scratch.bits + 2 * b * padded + k) = signs.low;
      *reinterpret_cast<V*>(scratch.bits + (2 * b + 1) * padded + k) = signs.high;
    }
  }
  std::memset(scratch.bits + 2 * blocks * padded, 0, static_cast<size_t>(padded) * 8);
  for (int64_t s = 0; s < Shape::steps(rows); ++s) {
    const int64_t bit = s * Shape::kRows, shift = bit % 64;
    const uint64_t* from = scratch.bits + bit / 64 * padded;
    uint64_t* to = scratch.words + s * padded;
    for (int64_t k = 0; k < padded; k += kWidth) {
      V word = *reinterpret_cast<const V*>(from + k) >> shift;
      if (shift + Shape::kRows > 64) word |= *reinterpret_cast<const V*>(from + padded + k) << (64 - shift);
      *reinterpret_cast<V*>(to + k) = word << 6;
    }
  }
}

// ---- Fixed point

// x * 2^shift in two factors, neither of which leaves the type's range.
template <class S>
struct Scale {
  S first, second, limit;
};

// |x| in fixed point as an integer: adding 2^(mantissa bits) rounds to nearest even.
template <class S>
REFINE_EXT_INLINE typename Vec<S>::Bits fixed_magnitude(Vec<S> size, Vec<S> first, Vec<S> second,
                                                        Vec<S> limit) {
  const Vec<S> one_unit = Vec<S>::splat(sizeof(S) == 4 ? S(0x1p23) : S(0x1p52));
  const Vec<S> scaled = size * first * second;
  // NaN where the limit is 0
  const Vec<S> bounded = select(scaled < limit, scaled, limit);
  return (typename Vec<S>::Bits)(bounded + one_unit).v - (typename Vec<S>::Bits)one_unit.v;
}

template <class S>
REFINE_EXT_INLINE Vec<S> magnitude_of(Vec<S> x) {
  using Integer = typename Vec<S>::Integer;
  return {(typename Vec<S>::Native)((typename Vec<S>::Bits)x.v & std::numeric_limits<Integer>::max())};
}

// Columns of one block of rows, [rows][kColumns] into `fixed`, with back[j] to return.
template <class T>
class FixedColumns {
 public:
  using S = typename ComputeOf<T>::type;
  using E = typename Vec<S>::Integer;
  using V = Vec<S>;
  using Bits = typename V::Bits;
  static constexpr int kColumns = Row<E>::kColumns, kParts = Row<E>::kParts, kWidth = V::kWidth;

  FixedColumns(const T* data, int64_t stride, int64_t rows, int64_t columns, int digits, E* fixed,
               double* back, double* largest)
      : rows_(rows), fixed_(reinterpret_cast<S*>(fixed)) {
    const std::array<double, kColumns> peaks =
        columns == kColumns ? read<true>(data, stride, columns) : read<false>(data, stride, columns);
    const int certain = sizeof(S) == 8 ? kFixedBits64 : certain_bits(rows);
    int bits[kColumns];
    std::fill(bits, bits + kColumns, sizeof(S) == 8 ? certain : std::min(certain, 8 * digits - 1));
    if (sizeof(S) == 4 && 8 * digits - 1 > certain) {
      for (int j = 0; j < kColumns; ++j) set_scale(j, peaks[j], certain);
      const std::array<uint64_t, kColumns> magnitudes = sum_magnitudes();
      for (int j = 0; j < kColumns; ++j) bits[j] = fixed_bits(rows, magnitudes[j], digits);
    }
    for (int j = 0; j < kColumns; ++j) back[j] = set_scale(j, peaks[j], bits[j]);
    to_integers();
    for (int64_t j = 0; largest && j < columns; ++j) {
      largest[j] = peaks[j] > largest[j] || peaks[j] != peaks[j] ? peaks[j] : largest[j];
    }
  }

 private:
  double set_scale(int j, double peak, int bits) {
    const FixedPoint point = fixed_point(peak, bits);
    const int half = point.shift / 2;
    first_[j] = static_cast<S>(std::ldexp(1.0, half));
    second_[j] = static_cast<S>(std::ldexp(1.0, point.shift - half));
    limit_[j] = point.back == point.back ? static_cast<S>((int64_t{1} << bits) - 1) : S(0);
    return point.back;
  }

  // The columns as they are, and the largest magnitudes: as integers, NaN are the largest.
  template <bool kWhole>
  std::array<double, kColumns> read(const T* data, int64_t stride, int64_t columns) {
    Bits peak[kParts] = {};
    T padded[kColumns + kWidth] = {};
    for (int64_t i = 0; i < rows_; ++i) {
      const T* row = data + i * stride;
      if (!kWhole) {
        std::memcpy(padded, row, static_cast<size_t>(columns) * sizeof(T));
        row = padded;
      }
#pragma GCC unroll 4
      for (int p = 0; p < kParts; ++p) {
        const V x = load_as<S>(row + p * kWidth);
        x.store(fixed_ + i * kColumns + p * kWidth);
        const Bits size = (Bits)magnitude_of(x).v;
        peak[p] = size > peak[p] ? size : peak[p];
      }
    }
    std::array<double, kColumns> peaks;
    for (int j = 0; j < kColumns; ++j)
      peaks[j] = static_cast<double>(V{(typename V::Native)peak[j / kWidth]}.v[j % kWidth]);
    return peaks;
  }

  std::array<uint64_t, kColumns> sum_magnitudes() const {
    Bits sum[kParts] = {};  // below 2^31: 1024 values of certain_bits
    for (int64_t i = 0; i < rows_; ++i) {
#pragma GCC unroll 4
      for (int p = 0; p < kParts; ++p) {
        sum[p] += magnitude(V::load(fixed_ + i * kColumns + p * kWidth), p * kWidth);
      }
    }
    std::array<uint64_t, kColumns> sums;
    for (int j = 0; j < kColumns; ++j) sums[j] = static_cast<uint64_t>(sum[j / kWidth][j % kWidth]);
    return sums;
  }

  void to_integers() {
    for (int64_t i = 0; i < rows_; ++i) {
#pragma GCC unroll 4
      for (int p = 0; p < kParts; ++p) {
        S* at = fixed_ + i * kColumns + p * kWidth;
        const V x = V::load(at);
        const Bits sign = (Bits)x.v >> (8 * static_cast<int>(sizeof(S)) - 1);
        const Bits integer = (magnitude(x, p * kWidth) ^ sign) - sign;
        V{(typename V::Native)integer}.store(at);
      }
    }
    std::memset(fixed_ + rows_ * kColumns, 0, static_cast<size_t>(kPaddedRows - rows_) * kRowBytes);
  }

  REFINE_EXT_INLINE Bits magnitude(V x, int column) const {
    return fixed_magnitude<S>(magnitude_of(x), V::load(first_ + column), V::load(second_ + column),
                              V::load(limit_ + column));
  }

  int64_t rows_;
  S* fixed_;
  alignas(64) S first_[kColumns], second_[kColumns], limit_[kColumns];
};

// ---- Tables

// The sums of kBits rows under all signs: entry b has +row r where bit r of b is set.
template <class E, int kBits>
REFINE_EXT_INLINE void make_table(const Row<E>* rows, Row<E>* table) {
#pragma GCC unroll 4
  for (int p = 0; p < Row<E>::kParts; ++p) {
    typename Row<E>::Native none{};
#pragma GCC unroll 8
    for (int r = 0; r < kBits; ++r) none -= rows[r].part[p];
    table[0].part[p] = none;
  }
#pragma GCC unroll 8
  for (int r = 0; r < kBits; ++r) {
    const Row<E> row = rows[r];
#pragma GCC unroll 32
    for (int b = 0; b < 1 << r; ++b) {
#pragma GCC unroll 4
      for (int p = 0; p < Row<E>::kParts; ++p) {
        table[(1 << r) + b].part[p] = table[b].part[p] + (row.part[p] + row.part[p]);
      }
    }
  }
}

// running[k] += the entries of kTables tables that the draw's word names.
template <class E, class Shape, int kTables>
void look_up(const char* __restrict tables, const uint64_t* __restrict words, int64_t draws,
             Row<E>* __restrict running) {
  constexpr uint64_t kField = static_cast<uint64_t>(Shape::kEntries - 1) << 6;
  for (int64_t k = 0; k < draws; ++k) {
    const uint64_t word = words[k];
    Row<E> sum = running[k];
#pragma GCC unroll 16
    for (int t = 0; t < kTables; ++t) {
      const uint64_t offset = (word >> (Shape::kBits * t)) & kField;
      const Row<E>& entry =
          *reinterpret_cast<const Row<E>*>(tables + t * Shape::kEntries * kRowBytes + offset);
#pragma GCC unroll 4
      for (int p = 0; p < Row<E>::kParts; ++p) sum.part[p] += entry.part[p];
    }
    running[k] = sum;
  }
}

template <class E, class Shape, int... kTables>
void look_up_some(int64_t tables, std::integer_sequence<int, kTables...>, const char* data,
                  const uint64_t* words, int64_t draws, Row<E>* running) {
  using Function = void (*)(const char*, const uint64_t*, int64_t, Row<E>*);
  static constexpr Function kFunctions[] = {look_up<E, Shape, kTables + 1>...};
  kFunctions[tables - 1](data, words, draws, running);
}

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
  constexpr int kColumns = Columns::kColumns;
  const Scratch64 scratch = divide(panel.scratch, panel.n, panel.draws);
  const int64_t padded = padded_draws(panel.draws);
  Row<E>* running = reinterpret_cast<Row<E>*>(scratch.running);
  std::memset(running, 0, static_cast<size_t>(panel.draws * kRowBytes));
  alignas(64) double back[kColumns];
  for (int64_t row = 0; row < panel.n; row += kSignBlock) {
    const int64_t rows = std::min(kSignBlock, panel.n - row);
    make_words<Shape>(panel, panel.first_row + row, rows, scratch);
    for (int64_t column = 0; column < panel.columns; column += kColumns) {
      const T* data = static_cast<const T*>(panel.outputs) + row * panel.stride + column;
      E* fixed = reinterpret_cast<E*>(scratch.fixed);
      Columns(data, panel.stride, rows, std::min<int64_t>(kColumns, panel.columns - column), panel.digits,
              fixed, back, panel.largest ? panel.largest + column : nullptr);
      for (int64_t s = 0; s < Shape::steps(rows); ++s) {
        const int64_t first = s * Shape::kRows;
        const int64_t tables =
            std::min<int64_t>(Shape::kTables, (rows - first + Shape::kBits - 1) / Shape::kBits);
        for (int64_t t = 0; t < tables; ++t) {
          make_table<E, Shape::kBits>(
              reinterpret_cast<const Row<E>*>(scratch.fixed) + first + t * Shape::kBits,
              reinterpret_cast<Row<E>*>(scratch.tables) + t * Shape::kEntries);
        }
        look_up_some<E, Shape>(tables, std::make_integer_sequence<int, Shape::kTables>{}, scratch.tables,
                               scratch.words + s * padded, panel.draws, running);
      }
      flush<E>(running, panel.draws, back, panel.sums + column * panel.draws);
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
    for (int64_t k = 0; k < panel.draws; ++k, sums += width) {
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

// ---- The gradient of a supremum: each draw's signs at the column that it chose

int64_t column_of(int64_t index) { return index >= 0 ? index : -1 - index; }

// tile[r] += the gradient with the sign of row r, for the 128 rows of a Philox block.
REFINE_EXT_INLINE void add_signed(double grad, uint64_t low, uint64_t high, double* tile) {
  using V = Vec<double>;
  typedef uint64_t Bits __attribute__((vector_size(kVectorBytes)));
  Bits lane;
  for (int l = 0; l < V::kWidth; ++l) lane[l] = static_cast<uint64_t>(63 - l);
  const Bits size = (Bits)V::splat(grad).v;
  for (int half = 0; half < 2; ++half) {
    const Bits word = Bits{} + ~(half ? high : low);
    for (int r = 0; r < 64; r += V::kWidth) {
      const Bits minus = (word << (lane - static_cast<uint64_t>(r))) & (uint64_t{1} << 63);
      double* at = tile + half * 64 + r;
      (V::load(at) + V{(V::Native)(size ^ minus)}).store(at);
    }
  }
}

template <class T>
class BackwardRows {
 public:
  BackwardRows(const RademacherBackwardProblem& problem, double* tile) : p_(problem), tile_(tile) {}

  void run(const int64_t* order, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row += kSignsPerPhilox) {
      const int64_t rows = std::min(kSignsPerPhilox, end - row);
      T* out = static_cast<T*>(p_.out) + row * p_.m;
      std::memset(out, 0, static_cast<size_t>(rows * p_.m) * sizeof(T));
      for (int64_t at = 0; at < p_.draws; at += Lanes::kWidth) {
        const int64_t count = std::min<int64_t>(Lanes::kWidth, p_.draws - at);
        Lanes::Native draw{};
        for (int64_t l = 0; l < count; ++l) draw[l] = p_.first_draw + static_cast<uint64_t>(order[at + l]);
        const SignLanes signs = signs_of(p_.seed, draw, static_cast<uint64_t>(row / kSignsPerPhilox));
        for (int64_t l = 0; l < count; ++l) {
          const int64_t k = order[at + l], column = column_of(p_.index[k]);
          if (used_ == 0 || columns_[used_ - 1] != column) next_column(column, out, rows);
          const double grad = p_.grad[k] / static_cast<double>(p_.n);
          add_signed(p_.index[k] >= 0 ? grad : -grad, signs.low[l], signs.high[l],
                     tile_ + (used_ - 1) * kSignsPerPhilox);
        }
      }
      write(out, rows);
    }
  }

 private:
  void next_column(int64_t column, T* out, int64_t rows) {
    if (used_ == kBackwardColumns) write(out, rows);
    columns_[used_] = column;
    std::memset(tile_ + used_ * kSignsPerPhilox, 0, kSignsPerPhilox * sizeof(double));
    ++used_;
  }

  void write(T* out, int64_t rows) {
    T* values = reinterpret_cast<T*>(tile_);  // in place: no wider than what they replace
    for (int64_t i = 0; i < used_ * kSignsPerPhilox; i += Vec<double>::kWidth) {
      store_as<double>(values + i, Vec<double>::load(tile_ + i));
    }
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < used_; ++c) out[r * p_.m + columns_[c]] = values[c * kSignsPerPhilox + r];
    }
    used_ = 0;
  }

  const RademacherBackwardProblem& p_;
  double* tile_;
  int64_t used_ = 0;
  int64_t columns_[kBackwardColumns];
};

void backward(const RademacherBackwardProblem& problem, const int64_t* order, double* tile, int64_t begin,
              int64_t end) {
  with_storage(problem.storage,
               [&](auto tag) { BackwardRows<decltype(tag)>(problem, tile).run(order, begin, end); });
}

// ---- Multipliers as tensors

template <class T>
struct SignPattern {
  using Bits = uint16_t;
  static constexpr Bits one = std::is_same_v<T, Half> ? 0x3c00 : 0x3f80;
};
template <>
struct SignPattern<float> {
  using Bits = uint32_t;
  static constexpr Bits one = 0x3f800000u;
};
template <>
struct SignPattern<double> {
  using Bits = uint64_t;
  static constexpr Bits one = 0x3ff0000000000000u;
};

template <class T>
void write_signs(const MultipliersProblem& p, uint64_t draw, T* out) {
  using Pattern = SignPattern<T>;
  using Bits = typename Pattern::Bits;
  constexpr int64_t kBlocks = 64;
  constexpr int kTop = 8 * static_cast<int>(sizeof(T)) - 1;
  alignas(64) uint64_t low[kBlocks], high[kBlocks];
  for (int64_t first = 0; first < p.n; first += kBlocks * kSignsPerPhilox) {
    const int64_t count = std::min(kBlocks * kSignsPerPhilox, p.n - first);
    philox_blocks(sign_sequence(p.seed, draw), static_cast<uint64_t>((p.first_row + first) / kSignsPerPhilox),
                  (count + kSignsPerPhilox - 1) / kSignsPerPhilox, low, high);
    for (int64_t i = 0; i < count; i += 64) {
      const uint64_t minus = ~(i % kSignsPerPhilox ? high : low)[i / kSignsPerPhilox];
      Bits values[64];
      for (int half = 0; half < 2; ++half) {
        const uint32_t word = static_cast<uint32_t>(minus >> 32 * half);
        for (int l = 0; l < 32; ++l) {
          values[32 * half + l] = static_cast<Bits>(Pattern::one | static_cast<Bits>(word >> l & 1u) << kTop);
        }
      }
      std::memcpy(out + first + i, values, static_cast<size_t>(std::min<int64_t>(64, count - i)) * sizeof(T));
    }
  }
}

template <class T>
void write_normals(const MultipliersProblem& p, uint64_t draw, T* out) {
  using S = typename ComputeOf<T>::type;
  using V = Vec<S>;
  const NoiseLanes lanes(NoiseSequence{p.seed, 0, draw, Stream::multiplier});
  for (int64_t i = 0; i < p.n; i += 4 * V::kWidth) {
    V z[4];
    lanes.normals(static_cast<uint32_t>((p.first_row + i) / 4), z);
    T values[4 * V::kWidth];
    for (int j = 0; j < 4; ++j) store_as<S>(values + j * V::kWidth, z[j]);
    std::memcpy(out + i, values, static_cast<size_t>(std::min<int64_t>(4 * V::kWidth, p.n - i)) * sizeof(T));
  }
}

void multipliers(const MultipliersProblem& problem, int64_t first, int64_t last) {
  with_storage(problem.storage, [&](auto tag) {
    using T = decltype(tag);
    for (int64_t k = first; k < last; ++k) {
      const uint64_t draw = problem.first_draw + static_cast<uint64_t>(k);
      T* out = static_cast<T*>(problem.out) + k * problem.n;
      if (problem.normal) {
        write_normals(problem, draw, out);
      } else {
        write_signs(problem, draw, out);
      }
    }
  });
}

}  // namespace

extern const RademacherKernels rademacher_kernels;
const RademacherKernels rademacher_kernels = {scratch_bytes, add_sums, reduce, backward, multipliers};

}  // namespace refine_ext::REFINE_EXT_ISA
