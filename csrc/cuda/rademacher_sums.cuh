// Signed sums of a matrix in fixed point, on the integer tensor cores: exact, so that the bits are the CPU's.
//
// Signs come as zeros and ones b, and sum_i sigma_i q_i = 2 sum_i b_i q_i - sum_i q_i. A block of threads has
// a tile of draws x kTileColumns columns in registers and walks down the rows: the signs of a block of 1024
// rows are made once, into shared memory; the matrix's bytes arrive kPieceBytes at a time, two pieces ahead.
// Within a block of rows the sums of the highest byte come first and are moved up by eight bits before each
// of the next ones. They wrap around on their way; the last one fits.
#pragma once

#include "mma.cuh"
#include "rademacher_fixed.cuh"

namespace refine_ext::cuda {

inline constexpr int kPieces = 3;  // in shared memory

// A draw's supremum: the size, and 2 j + 1 where column j's sum is negative, else 2 j.
struct Best {
  double size;
  int64_t code;
};
inline constexpr int64_t kNoColumn = std::numeric_limits<int64_t>::max();

// The larger size, NaN before all, the first column of several.
__device__ __forceinline__ Best better(const Best& a, const Best& b) {
  const bool a_nan = a.size != a.size, b_nan = b.size != b.size;
  const bool same = a.size == b.size || (a_nan && b_nan);
  const bool takes = same ? b.code < a.code : b_nan || (!a_nan && b.size > a.size);
  return takes ? b : a;
}

struct SumsTask {
  FixedColumns matrix;
  int64_t columns;       // of the matrix; the last tile may be filled up
  int64_t first_column;  // column 0 as the results count
  uint64_t seed, first_draw, first_block;
  int64_t draws;
  double*
      sums;  // [draws][sums_stride]; nullptr: the sums begin at zero, and the suprema are all that is kept
  int64_t sums_stride;
  bool resume;     // the sums begin at what is there
  Best* best;      // [column tile][draws], or nullptr: the sums are written
  bool magnitude;  // of |sum|, not sum
};

// Integers of a value's bytes: 32 bits hold a block's sum of float32, of float64 it takes 64.
template <bool kWide>
struct SumsLayout {
  static constexpr int kSteps = kWide ? 2 : 4;  // of 16 draws, a warp
  static constexpr int kWarpDraws = 16 * kSteps;
};

// A thread has, of 16 draws and 8 columns each, draws g and g + 8 and columns t and t + 1 (mma.cuh).
// budget: registers 248 (wide 200), shared 45056, occupancy 12%
template <int kThreads, bool kWide>
__global__ void __launch_bounds__(kThreads) sums_kernel(const SumsTask task) {
  using L = SumsLayout<kWide>;
  constexpr int kDown = kThreads / (2 * kWarp), kDraws = kDown * L::kWarpDraws;  // of a tile
  REFINE_EXT_SHARED(uint4, signs, [kGroups * kDraws]);
  REFINE_EXT_SHARED(uint4, pieces, [kPieces * (kPieceBytes / 16)]);
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp, lane = thread % kWarp;
  const int g = lane / 4, t = lane % 4;
  const int across = warp % 2 * (kTileColumns / 2), down = warp / 2 * L::kWarpDraws;
  const int64_t draw_tiles = (task.draws + kDraws - 1) / kDraws;
  const int64_t tile = blockIdx.x / draw_tiles, first_draw = (blockIdx.x - tile * draw_tiles) * kDraws;
  const auto draw_of = [&](int i, int h) { return first_draw + down + 16 * i + 8 * h + g; };
  const auto column_of = [&](int q, int e) { return tile * kTileColumns + across + 8 * q + 2 * t + e; };

  double sums[L::kSteps][4][4];
#pragma unroll
  for (int i = 0; i < L::kSteps; ++i) {
#pragma unroll
    for (int q = 0; q < 4; ++q) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        sums[i][q][e] = 0.0;
        const int64_t draw = draw_of(i, e / 2), column = column_of(q, e % 2);
        if (task.resume && draw < task.draws && column < task.columns) {
          sums[i][q][e] = task.sums[draw * task.sums_stride + column];
        }
      }
    }
  }

  constexpr int kPacks = kPieceBytes / 16;
  const int64_t blocks = task.matrix.blocks;
  int64_t to_fetch = blocks * task.matrix.digits * kGroups;
  const uint4* from = reinterpret_cast<const uint4*>(task.matrix.planes) + tile * to_fetch * kPacks + thread;
  const auto fetch = [&](int slot) {
    if (to_fetch > 0) {
      uint4* const to = pieces + slot * kPacks + thread;
#pragma unroll
      for (int i = 0; i < kPacks; i += kThreads) copy_async(to + i, from + i);
    }
    commit_copies();
    from += kPacks;
    --to_fetch;
  };
  fetch(0);
  fetch(1);
  int slot = 0;
#pragma unroll 1
  for (int64_t block = 0; block < blocks; ++block) {
    __syncthreads();
    for (int i = thread; i < kGroups * kDraws; i += kThreads) {
      const PhiloxSequence sequence = sign_sequence(task.seed, task.first_draw + first_draw + i % kDraws);
      const PhiloxBlock<uint32_t> bits = sequence.block(task.first_block + block * kGroups + i / kDraws);
      signs[i] = uint4{bits.word[0], bits.word[1], bits.word[2], bits.word[3]};
    }
    uint32_t part[L::kSteps][4][4];
    [[maybe_unused]] uint64_t high[L::kSteps][4][4];
#pragma unroll
    for (int i = 0; i < L::kSteps; ++i) {
#pragma unroll
      for (int q = 0; q < 4; ++q) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          part[i][q][e] = 0;
          if constexpr (kWide) high[i][q][e] = 0;
        }
      }
    }
    const auto add_group = [&](auto is_signed, int group) {
      wait_copies<1>();
      __syncthreads();
      fetch(slot == 0 ? kPieces - 1 : slot - 1);  // which everybody has read
      uint32_t words[L::kSteps][2];
      const uint32_t* const drawn = reinterpret_cast<const uint32_t*>(signs + group * kDraws + down + g) + t;
#pragma unroll
      for (int i = 0; i < L::kSteps; ++i) {
        words[i][0] = drawn[4 * 16 * i];
        words[i][1] = drawn[4 * (16 * i + 8)];
      }
      const unsigned char* const bytes = reinterpret_cast<const unsigned char*>(pieces) + slot * kPieceBytes;
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        uint32_t columns[2][4];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int column = across + 16 * half + lane / 16 * 8 + lane % 8;
          load_matrices<false>(columns[half],
                               bytes + column * kGroup + place_of_chunk(2 * step + lane / 8 % 2, column));
        }
#pragma unroll
        for (int i = 0; i < L::kSteps; ++i) {
          uint32_t ones[4];
#pragma unroll
          for (int r = 0; r < 4; ++r) ones[r] = words[i][r % 2] >> (2 * step + r / 2) & 0x01010101u;
#pragma unroll
          for (int q = 0; q < 4; ++q) {
            const uint32_t two[2] = {columns[q / 2][2 * (q % 2)], columns[q / 2][2 * (q % 2) + 1]};
            multiply_add<decltype(is_signed)::value>(part[i][q], ones, two);
          }
        }
      }
      slot = slot == kPieces - 1 ? 0 : slot + 1;
    };
#pragma unroll 1
    for (int group = 0; group < kGroups; ++group) add_group(std::true_type{}, group);
#pragma unroll 1
    for (int digit = 1; digit < task.matrix.digits; ++digit) {
#pragma unroll
      for (int i = 0; i < L::kSteps; ++i) {
#pragma unroll
        for (int q = 0; q < 4; ++q) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            if constexpr (kWide) {
              high[i][q][e] = (high[i][q][e] + static_cast<uint64_t>(static_cast<int32_t>(part[i][q][e])))
                              << 8;
              part[i][q][e] = 0;
            } else {
              part[i][q][e] <<= 8;
            }
          }
        }
      }
#pragma unroll 1
      for (int group = 0; group < kGroups; ++group) add_group(std::false_type{}, group);
    }
    const ColumnBlock* const columns = task.matrix.columns + (tile * blocks + block) * kTileColumns;
#pragma unroll
    for (int q = 0; q < 4; ++q) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const ColumnBlock column = columns[across + 8 * q + 2 * t + e];
#pragma unroll
        for (int i = 0; i < L::kSteps; ++i) {
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            double& sum = sums[i][q][2 * h + e];
            if constexpr (kWide) {
              const uint64_t ones = high[i][q][2 * h + e] + part[i][q][2 * h + e];
              sum +=
                  static_cast<double>(static_cast<int64_t>(2 * ones - static_cast<uint64_t>(column.total))) *
                  column.back;
            } else {
              const uint32_t ones = part[i][q][2 * h + e];
              sum +=
                  static_cast<double>(static_cast<int32_t>(2 * ones - static_cast<uint32_t>(column.total))) *
                  column.back;
            }
          }
        }
      }
    }
  }

  if (!task.best) {
#pragma unroll
    for (int i = 0; i < L::kSteps; ++i) {
#pragma unroll
      for (int q = 0; q < 4; ++q) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int64_t draw = draw_of(i, e / 2), column = column_of(q, e % 2);
          if (draw < task.draws && column < task.columns) {
            task.sums[draw * task.sums_stride + column] = sums[i][q][e];
          }
        }
      }
    }
    return;
  }
  REFINE_EXT_SHARED(Best, halves, [kDraws]);
  Best best[L::kSteps][2];
#pragma unroll
  for (int i = 0; i < L::kSteps; ++i) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      best[i][h] = {-std::numeric_limits<double>::infinity(), kNoColumn};
#pragma unroll
      for (int q = 0; q < 4; ++q) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int64_t column = column_of(q, e);
          const double sum = sums[i][q][2 * h + e];
          const Best one{task.magnitude && sum < 0.0 ? -sum : sum,
                         2 * (task.first_column + column) + (sum < 0.0)};
          if (column < task.columns) best[i][h] = better(best[i][h], one);
        }
      }
#pragma unroll
      for (int distance = 1; distance < 4; distance *= 2) {
        const Best other{__shfl_xor_sync(kFullMask, best[i][h].size, distance),
                         __shfl_xor_sync(kFullMask, best[i][h].code, distance)};
        best[i][h] = better(best[i][h], other);
      }
      if (across > 0 && t == 0) halves[down + 16 * i + 8 * h + g] = best[i][h];
    }
  }
  __syncthreads();
  if (across > 0 || t > 0) return;
#pragma unroll
  for (int i = 0; i < L::kSteps; ++i) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int64_t draw = draw_of(i, h);
      if (draw >= task.draws) continue;
      task.best[tile * task.draws + draw] = better(best[i][h], halves[down + 16 * i + 8 * h + g]);
    }
  }
}

}  // namespace refine_ext::cuda
