// Signs as offsets into tables of signed sums, and the tables. Included by sources that are compiled once per
// instruction set.
#pragma once

#include <algorithm>
#include <limits>
#include <type_traits>
#include <utility>

#include "philox_simd.h"
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
constexpr int64_t kFewDraws = 128;

// Rows of 64 bytes that a staged block of columns has room for: its own and those of zeros after them, or 210
// rows of twice as many bytes.
inline int64_t staged_rows(int64_t n) { return std::min(n, kSignBlock) + 256; }

// Blocks of columns that are read at once, 256 bytes of each row: rows may be pages apart.
constexpr int64_t kStaged = 4;

inline int64_t padded_draws(int64_t draws) { return (draws + 7) / 8 * 8; }

// The working memory of one panel.
struct PanelScratch {
  uint64_t* bits;   // [2 for each Philox block][padded draws]
  uint64_t* words;  // [steps][padded draws]
  char* fixed;      // [kStaged][staged_rows] rows
  char* tables;
  char* running;  // [draws] rows
};

inline int64_t sign_words(int64_t rows) { return (rows + kSignsPerPhilox - 1) / kSignsPerPhilox * 2 + 1; }

inline int64_t scratch_bytes(int64_t n, int64_t draws) {
  const int64_t rows = std::min(n, kSignBlock);
  const int64_t words = sign_words(rows) + Wide::steps(rows);
  return padded_draws(draws) * 8 * words +
         kRowBytes * (kStaged * staged_rows(n) + Wide::kEntries * Wide::kTables + draws);
}

inline PanelScratch divide(void* scratch, int64_t n, int64_t draws) {
  const int64_t rows = std::min(n, kSignBlock), padded = padded_draws(draws);
  PanelScratch parts;
  parts.bits = static_cast<uint64_t*>(scratch);
  parts.words = parts.bits + sign_words(rows) * padded;
  parts.fixed = reinterpret_cast<char*>(parts.words + Wide::steps(rows) * padded);
  parts.tables = parts.fixed + kStaged * staged_rows(n) * kRowBytes;
  parts.running = parts.tables + Wide::kEntries * Wide::kTables * kRowBytes;
  return parts;
}

// Reads blocks of kColumns columns as Out, each into rows of its own, and keeps the largest |value| of each
// column (as integers, NaN are the largest), and the sum of |values| of what was read last.
template <class T, class Out, int kColumns>
class Staging {
 public:
  using S = typename ComputeOf<T>::type;
  using W = Vec<S>;
  using Bits = typename W::Bits;

  // At most kStaged blocks; out [blocks][block_rows][kColumns].
  void read(const T* data, int64_t stride, int64_t rows, int64_t columns, Out* out, int64_t block_rows) {
    for (auto& block : sum_) {
      for (W& sum : block) sum = W::splat(0);
    }
    switch (columns / kColumns) {
      case 0:
        break;
      case 1:
        read_blocks<1>(data, stride, rows, out, block_rows);
        break;
      case 2:
        read_blocks<2>(data, stride, rows, out, block_rows);
        break;
      case 3:
        read_blocks<3>(data, stride, rows, out, block_rows);
        break;
      default:
        return read_blocks<kStaged>(data, stride, rows, out, block_rows);
    }
    const int64_t b = columns / kColumns, rest = columns % kColumns;
    T padded[kColumns + W::kWidth] = {};
    for (int64_t i = 0; rest > 0 && i < rows; ++i) {
      std::memcpy(padded, data + i * stride + b * kColumns, static_cast<size_t>(rest) * sizeof(T));
      read_row(padded, b, out + (b * block_rows + i) * kColumns);
    }
  }

  double largest(int64_t j) const {
    const Bits& own = peak_[j / kColumns][j % kColumns / W::kWidth];
    return static_cast<double>(W{(typename W::Native)own}.v[j % W::kWidth]);
  }

  S sum(int64_t j) const { return sum_[j / kColumns][j % kColumns / W::kWidth].v[j % W::kWidth]; }

 private:
  static constexpr int kParts = kColumns / W::kWidth;

  template <int64_t kBlocks>
  void read_blocks(const T* data, int64_t stride, int64_t rows, Out* out, int64_t block_rows) {
    for (int64_t i = 0; i < rows; ++i) {
#pragma GCC unroll 4
      for (int64_t b = 0; b < kBlocks; ++b) {
        read_row(data + i * stride + b * kColumns, b, out + (b * block_rows + i) * kColumns);
      }
    }
  }

  REFINE_EXT_INLINE void read_row(const T* row, int64_t b, Out* out) {
#pragma GCC unroll 8
    for (int p = 0; p < kParts; ++p) {
      const W x = load(row + p * W::kWidth);
      const Bits size = (Bits)x.v & std::numeric_limits<typename W::Integer>::max();
      Bits& peak = peak_[b][p];
      peak = size > peak ? size : peak;
      sum_[b][p] = sum_[b][p] + W{(typename W::Native)size};
      put(out + p * W::kWidth, x);
    }
  }

  static REFINE_EXT_INLINE void put(S* to, W x) { x.store(to); }
  static REFINE_EXT_INLINE void put(std::conditional_t<sizeof(S) == 8, float, double>* to, W x) {
    typedef float Narrow __attribute__((vector_size(kVectorBytes / 2), aligned(4), may_alias));
    *reinterpret_cast<Narrow*>(to) = __builtin_convertvector(x.v, Narrow);
  }

  Bits peak_[kStaged][kParts] = {};
  W sum_[kStaged][kParts] = {};
};

// Brings the values that are read next into L2, some at each step of the sums before: rows may be pages
// apart, where no hardware looks ahead.
class Ahead {
 public:
  Ahead(const void* data, int64_t row_bytes, int64_t rows, int64_t bytes, int64_t steps)
      : row_(static_cast<const char*>(data)),
        end_(row_ + rows * row_bytes),
        row_bytes_(row_bytes),
        bytes_(bytes),
        rows_each_(data ? (rows + steps - 1) / steps : 0) {}

  REFINE_EXT_INLINE void step() {
    for (int64_t i = 0; i < rows_each_ && row_ < end_; ++i, row_ += row_bytes_) {
      for (int64_t b = 0; b < bytes_; b += 64) __builtin_prefetch(row_ + b, 0, 2);
    }
  }

 private:
  const char *row_, *end_;
  int64_t row_bytes_, bytes_, rows_each_;
};

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
void make_words(const RademacherPanel& panel, int64_t sample, int64_t rows, const PanelScratch& scratch) {
  typedef Lanes::Native V;
  constexpr int kWidth = Lanes::kWidth;
  const int64_t padded = padded_draws(panel.draws), blocks = (rows + kSignsPerPhilox - 1) / kSignsPerPhilox;
  for (int64_t k = 0; k < padded; k += kWidth) {
    V draw;
    for (int64_t l = 0; l < kWidth; ++l) {
      const int64_t at = std::min(k + l, panel.draws - 1);
      draw[l] = panel.first_draw + static_cast<uint64_t>(panel.chosen ? panel.chosen[at] : at);
    }
    for (int64_t b = 0; b < blocks; ++b) {
      const SignLanes signs = signs_of(panel.seed, draw, static_cast<uint64_t>(sample / kSignsPerPhilox + b));
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

// Adds the signed sums of a step's rows, which are padded with rows of zeros.
template <class E, class Shape>
void add_step(const Row<E>* fixed, int64_t rows, const uint64_t* words, int64_t draws, char* tables,
              Row<E>* running) {
  const int64_t count = std::min<int64_t>(Shape::kTables, (rows + Shape::kBits - 1) / Shape::kBits);
  for (int64_t t = 0; t < count; ++t) {
    make_table<E, Shape::kBits>(fixed + t * Shape::kBits,
                                reinterpret_cast<Row<E>*>(tables) + t * Shape::kEntries);
  }
  look_up_some<E, Shape>(count, std::make_integer_sequence<int, Shape::kTables>{}, tables, words, draws,
                         running);
}

}  // namespace
}  // namespace refine_ext::REFINE_EXT_ISA
