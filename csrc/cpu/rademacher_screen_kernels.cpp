// Screening (csrc/cpu/rademacher.h): sums under signs to 16 bits, with a bound of their error, and the
// columns that may hold a draw's supremum. Compiled once per instruction set.
#include "rademacher_tables.h"

namespace refine_ext::REFINE_EXT_ISA {
namespace {

using V = Vec<float>;
constexpr int kColumns = Row<int16_t>::kColumns;
constexpr int kParts = kColumns / V::kWidth;

// Steps between additions to the float32 sums. More of them leave fewer bits to each value: the integers of
// so many rows may sum to 2^15.
constexpr int64_t kSteps = 5, kRows = kSteps * Wide::kRows;

REFINE_EXT_INLINE V magnitude_of(V x) { return {(V::Native)((V::Bits)x.v & 0x7fffffff)}; }

// What is known of a column: how far its sums may be off, and the sum of its values' sizes.
struct Errors {
  V residual[kParts], size[kParts];
};

// `rows` rows of float32 become int16, in place; back[j] returns them. sums: of their magnitudes.
void to_integers(float* staged, int64_t rows, const float* sums, float* back, Errors& errors) {
  constexpr float kLimit = 32500.0f;  // and half a unit of rounding for each of kRows
  V sum[kParts];
  for (int p = 0; p < kParts; ++p) sum[p] = V::load(sums + p * V::kWidth);
  V scale[kParts], unit[kParts], residual[kParts];
  const V zero = V::splat(0), limit = V::splat(kLimit);
#pragma GCC unroll 8
  for (int p = 0; p < kParts; ++p) {
    // The reciprocal of less would overflow.
    const auto some = sum[p] > V::splat(1e-30f);
    scale[p] = select(some, limit / sum[p], zero);
    unit[p] = select(some, sum[p] / limit, zero);
    unit[p].store(back + p * V::kWidth);
    errors.size[p] = errors.size[p] + sum[p];
    residual[p] = zero;
  }
  typedef int16_t Short __attribute__((vector_size(kVectorBytes / 2), aligned(2), may_alias));
  int16_t* out = reinterpret_cast<int16_t*>(staged);
  const V magic = V::splat(0x1.8p23f);
  for (int64_t i = 0; i < rows; ++i) {
    V x[kParts];
#pragma GCC unroll 8
    for (int p = 0; p < kParts; ++p) x[p] = V::load(staged + i * kColumns + p * V::kWidth);
#pragma GCC unroll 8
    for (int p = 0; p < kParts; ++p) {
      const V shifted = x[p] * scale[p] + magic;
      residual[p] = residual[p] + magnitude_of(x[p] - (shifted - magic) * unit[p]);
      *reinterpret_cast<Short*>(out + i * kColumns + p * V::kWidth) =
          __builtin_convertvector((V::Bits)shifted.v - (V::Bits)magic.v, Short);
    }
  }
  std::memset(out + rows * kColumns, 0, Wide::kRows * kRowBytes);
  for (int p = 0; p < kParts; ++p) errors.residual[p] = errors.residual[p] + residual[p];
}

// sums += running * back, running = 0.
void flush(Row<int16_t>* running, int64_t draws, const float* back, float* sums) {
  typedef int16_t Short __attribute__((vector_size(kVectorBytes / 2), aligned(2), may_alias));
  for (int64_t k = 0; k < draws; ++k) {
    const int16_t* from = reinterpret_cast<const int16_t*>(running + k);
    float* to = sums + k * kColumns;
#pragma GCC unroll 8
    for (int j = 0; j < kColumns; j += V::kWidth) {
      const V::Bits integers = __builtin_convertvector(*reinterpret_cast<const Short*>(from + j), V::Bits);
      const V sum{__builtin_convertvector(integers, V::Native)};
      (V::load(to + j) + sum * V::load(back + j)).store(to + j);
    }
    running[k] = Row<int16_t>{};
  }
}

template <class T>
bool add_sums_of(const RademacherPanel& panel, float* error) {
  const PanelScratch scratch = divide(panel.scratch, panel.n, panel.draws);
  static_assert(kRows <= 210 && kPanelBlocks % kStaged == 0);
  const int64_t padded = padded_draws(panel.draws);
  const int64_t block_rows = staged_rows(panel.n) / 2;  // of float32, which are twice as wide
  Row<int16_t>* running = reinterpret_cast<Row<int16_t>*>(scratch.running);
  std::memset(running, 0, static_cast<size_t>(panel.draws * kRowBytes));
  float* sums = reinterpret_cast<float*>(panel.sums);
  alignas(64) float back[kColumns];
  constexpr int64_t kStages = kPanelBlocks / kStaged;
  Staging<T, float, kColumns> staging[kStages];
  Errors errors[kPanelBlocks];
  std::memset(errors, 0, sizeof errors);
  for (int64_t row = 0; row < panel.n; row += kSignBlock) {
    const int64_t rows = std::min(kSignBlock, panel.n - row);
    make_words<Wide>(panel, panel.first_row + row, rows, scratch);
    for (int64_t stage = 0; stage < panel.columns; stage += kStaged * kColumns) {
      const int64_t columns = std::min<int64_t>(kStaged * kColumns, panel.columns - stage);
      for (int64_t first = 0; first < rows; first += kRows) {
        const int64_t part = std::min(kRows, rows - first);
        const T* data = static_cast<const T*>(panel.outputs) + (row + first) * panel.stride + stage;
        float* staged = reinterpret_cast<float*>(scratch.fixed);
        auto& values = staging[stage / (kStaged * kColumns)];
        values.read(data, panel.stride, part, columns, staged, block_rows);
        // Of the same columns, further down.
        const int64_t left = std::min(kRows, panel.n - row - first - part),
                      blocks = (columns + kColumns - 1) / kColumns;
        Ahead ahead(left > 0 ? data + part * panel.stride : nullptr,
                    panel.stride * static_cast<int64_t>(sizeof(T)), left,
                    columns * static_cast<int64_t>(sizeof(T)), Wide::steps(part) * blocks);
        for (int64_t column = stage; column < stage + columns;
             column += kColumns, staged += block_rows * kColumns) {
          alignas(64) float magnitudes[kColumns];
          for (int j = 0; j < kColumns; ++j)
            magnitudes[j] = static_cast<float>(values.sum(column - stage + j));
          to_integers(staged, part, magnitudes, back, errors[column / kColumns]);
          for (int64_t s = 0; s < Wide::steps(part); ++s) {
            ahead.step();
            add_step<int16_t, Wide>(
                reinterpret_cast<const Row<int16_t>*>(staged) + s * Wide::kRows, part - s * Wide::kRows,
                scratch.words + (first / Wide::kRows + s) * padded, panel.draws, scratch.tables, running);
          }
          flush(running, panel.draws, back, sums + column * panel.draws);
        }
      }
    }
  }
  // Roundings of float32: of each value when it came, of its product and residual, and of each addition.
  const float roundings = 0x1p-23f * static_cast<float>(16 + panel.n / kRows);
  bool finite = true;
  for (int64_t j = 0; j < panel.columns; ++j) {
    const double largest = staging[j / (kStaged * kColumns)].largest(j % (kStaged * kColumns));
    const Errors& own = errors[j / kColumns];
    const int p = static_cast<int>(j % kColumns) / V::kWidth, l = static_cast<int>(j % kColumns) % V::kWidth;
    error[j] = 1.001f * own.residual[p].v[l] + roundings * own.size[p].v[l] + 1e-30f;
    finite = finite && largest < 1e25 && error[j] < 1e30f;
    if (panel.largest) panel.largest[j] = largest;
  }
  return finite;
}

template <bool kMagnitude>
void choose(const RademacherPanel& panel, int64_t column, const float* error, const ScreenState& state) {
  for (int64_t first = 0; first < panel.columns; first += kColumns) {
    const int64_t count = std::min<int64_t>(kColumns, panel.columns - first);
    const float* sums = reinterpret_cast<const float*>(panel.sums) + first * panel.draws;
    V margin[kParts];
    for (int j = 0; j < kColumns; ++j) {
      margin[j / V::kWidth].v[j % V::kWidth] = j < count ? error[first + j] : NAN;  // never chosen
    }
    for (int64_t k = 0; k < panel.draws; ++k, sums += kColumns) {
      V size[kParts], low = V::splat(state.floor[k]);
#pragma GCC unroll 8
      for (int p = 0; p < kParts; ++p) {
        const V sum = V::load(sums + p * V::kWidth);
        size[p] = kMagnitude ? magnitude_of(sum) : sum;
        const V least = size[p] - margin[p];
        low = select(least > low, least, low);
      }
      float floor = state.floor[k];
      for (int l = 0; l < V::kWidth; ++l) floor = low.v[l] > floor ? low.v[l] : floor;
      state.floor[k] = floor;
      const V bar = V::splat(floor);
      V::Bits any{};
#pragma GCC unroll 8
      for (int p = 0; p < kParts; ++p) any |= (V::Bits)((size[p] + margin[p]).v >= bar.v);
      bool some = false;
      for (int l = 0; l < V::kWidth; ++l) some = some || any[l] != 0;
      if (!some) continue;
      for (int64_t j = 0; j < count; ++j) {
        const float most = (kMagnitude ? std::fabs(sums[j]) : sums[j]) + error[first + j];
        if (most >= floor) state.candidates[k].add(column + first + j, most, floor);
      }
    }
  }
}

bool screen(const RademacherPanel& panel, int64_t column, Supremum supremum, const ScreenState& state) {
  float error[kPanelBlocks * kColumns];
  const bool finite =
      with_storage(panel.storage, [&](auto tag) { return add_sums_of<decltype(tag)>(panel, error); });
  if (!finite) return false;
  if (supremum == Supremum::magnitude) {
    choose<true>(panel, column, error, state);
  } else {
    choose<false>(panel, column, error, state);
  }
  return true;
}

}  // namespace

extern const ScreenKernels screen_kernels;
const ScreenKernels screen_kernels = {screen};

}  // namespace refine_ext::REFINE_EXT_ISA
