#include "rademacher.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "../math/guidance_problem.h"
#include "parallel.h"

namespace refine_ext {
namespace {

constexpr int64_t kColumns = 64, kDraws = 32;

double value_at(const void* data, Storage storage, int64_t i) {
  return SampleValues{data, 1, storage, 0.0}.at(i);
}

void store_at(void* data, Storage storage, int64_t i, double value) {
  switch (storage) {
    case Storage::float64:
      static_cast<double*>(data)[i] = value;
      break;
    case Storage::float32:
      static_cast<float*>(data)[i] = static_cast<float>(value);
      break;
    case Storage::bfloat16: {
      const uint32_t bits = std::bit_cast<uint32_t>(static_cast<float>(value));
      static_cast<uint16_t*>(data)[i] = static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
      break;
    }
    default:
      static_cast<_Float16*>(data)[i] = static_cast<_Float16>(value);
  }
}

// sums [draws][columns] += those of rows [0, n) and columns [column, column + columns).
void add_sums(const void* outputs, Storage storage, int64_t n, int64_t stride, int64_t first_row,
              int64_t column, int64_t columns, uint64_t first_draw, int64_t draws, uint64_t seed, int digits,
              double* sums, int64_t sums_stride, double* largest) {
  std::vector<int64_t> fixed(kSignBlock * kColumns), sum(kColumns);
  std::vector<double> back(kColumns);
  for (int64_t row = 0; row < n; row += kSignBlock) {
    const int64_t rows = std::min(kSignBlock, n - row);
    for (int64_t j = 0; j < columns; ++j) {
      double peak = 0.0;
      for (int64_t i = 0; i < rows; ++i) {
        const double v = std::fabs(value_at(outputs, storage, (row + i) * stride + column + j));
        peak = v > peak || v != v ? v : peak;
        if (peak != peak) break;
      }
      int bits = kFixedBits64;
      if (storage != Storage::float64) {
        const FixedPoint coarse = fixed_point(peak, certain_bits(rows));
        uint64_t magnitude = 0;
        for (int64_t i = 0; i < rows && peak < HUGE_VAL; ++i) {
          const double v = value_at(outputs, storage, (row + i) * stride + column + j);
          magnitude += static_cast<uint64_t>(std::abs(to_fixed(v, coarse.shift, certain_bits(rows))));
        }
        bits = fixed_bits(rows, magnitude, digits);
      }
      const FixedPoint point = fixed_point(peak, bits);
      back[j] = point.back;
      if (largest) largest[j] = peak > largest[j] || peak != peak ? peak : largest[j];
      for (int64_t i = 0; i < rows; ++i) {
        const double v = value_at(outputs, storage, (row + i) * stride + column + j);
        fixed[i * kColumns + j] = peak < HUGE_VAL ? to_fixed(v, point.shift, bits) : 0;
      }
    }
    for (int64_t k = 0; k < draws; ++k) {
      const PhiloxSequence sequence = sign_sequence(seed, first_draw + k);
      std::fill(sum.begin(), sum.end(), 0);
      for (int64_t i = 0; i < rows; ++i) {
        const PhiloxBlock<uint32_t> block = sequence.block((first_row + row + i) / kSignsPerPhilox);
        const int64_t sign = sign_bit(block, (row + i) % kSignsPerPhilox) ? 1 : -1;
        for (int64_t j = 0; j < columns; ++j) sum[j] += sign * fixed[i * kColumns + j];
      }
      for (int64_t j = 0; j < columns; ++j)
        sums[k * sums_stride + j] += static_cast<double>(sum[j]) * back[j];
    }
  }
}

}  // namespace

void rademacher_suprema_cpu(const RademacherProblem& p) {
  std::fill(p.largest, p.largest + p.m, 0.0);
  std::vector<double> sums(kDraws * kColumns);
  for (int64_t first = 0; first < p.draws; first += kDraws) {
    const int64_t draws = std::min(kDraws, p.draws - first);
    std::vector<double> best(draws, -HUGE_VAL), lanes(draws * 16, 0.0);
    for (int64_t column = 0; column < p.m; column += kColumns) {
      const int64_t columns = std::min(kColumns, p.m - column);
      std::fill(sums.begin(), sums.end(), 0.0);
      add_sums(p.outputs, p.storage, p.n, p.stride, 0, column, columns, p.first_draw + first, draws, p.seed,
               p.digits, sums.data(), kColumns, p.largest + column);
      for (int64_t k = 0; k < draws; ++k) {
        for (int64_t j = 0; j < columns; ++j) {
          const double sum = sums[k * kColumns + j];
          lanes[k * 16 + (column + j) % 16] += sum * sum;
          const double size = p.supremum == Supremum::magnitude ? std::fabs(sum) : sum;
          if (size > best[k] || (size != size && best[k] == best[k])) {
            best[k] = size;
            p.index[first + k] = sum < 0.0 ? -1 - (column + j) : column + j;
          }
        }
      }
    }
    for (int64_t k = 0; k < draws; ++k) {
      if (p.supremum == Supremum::norm) {
        double square = 0.0;
        for (int l = 0; l < 16; ++l) square += lanes[k * 16 + l];
        best[k] = std::sqrt(square);
        p.index[first + k] = -1;
      }
      p.suprema[first + k] = best[k] / static_cast<double>(p.n);
    }
  }
}

void rademacher_sums_cpu(const RademacherSumsProblem& p) {
  for (int64_t column = 0; column < p.m; column += kColumns) {
    add_sums(p.outputs, p.storage, p.n, p.stride, p.first_row, column, std::min(kColumns, p.m - column),
             p.first_draw, p.draws, p.seed, 3, p.sums + column, p.m, nullptr);
  }
}

void rademacher_backward_cpu(const RademacherBackwardProblem& p) {
  parallel_for(0, p.n, 256, [&](int64_t begin, int64_t end) {
    std::vector<double> row(p.m);
    for (int64_t i = begin; i < end; ++i) {
      std::fill(row.begin(), row.end(), 0.0);
      for (int64_t k = 0; k < p.draws; ++k) {
        const PhiloxBlock<uint32_t> block =
            sign_sequence(p.seed, p.first_draw + k).block(i / kSignsPerPhilox);
        const bool up = sign_bit(block, i % kSignsPerPhilox) == (p.index[k] >= 0);
        const double grad = p.grad[k] / static_cast<double>(p.n);
        row[p.index[k] >= 0 ? p.index[k] : -1 - p.index[k]] += up ? grad : -grad;
      }
      for (int64_t j = 0; j < p.m; ++j) store_at(p.out, p.storage, i * p.m + j, row[j]);
    }
  });
}

void multipliers_cpu(const MultipliersProblem& p) {
  parallel_for(0, p.draws, 16, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      const PhiloxSequence sequence = sign_sequence(p.seed, p.first_draw + k);
      for (int64_t i = 0; i < p.n; ++i) {
        const PhiloxBlock<uint32_t> block = sequence.block((p.first_row + i) / kSignsPerPhilox);
        store_at(p.out, p.storage, k * p.n + i, sign_bit(block, i % kSignsPerPhilox) ? 1.0 : -1.0);
      }
    }
  });
}

}  // namespace refine_ext
