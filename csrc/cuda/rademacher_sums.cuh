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
  int columns;           // of the matrix; the last tile may be filled up
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

// How the warps of a block divide its tile on the tensor cores of sm_80 and newer: two of them across, 32
// columns each. A thread has, of kSteps times 16 draws and kRuns times 8 columns, draws g and g + 8 and
// columns 2 t and 2 t + 1 (mma.cuh). 32 bits hold a block's sum of float32's integers; of float64 it
// takes 64.
template <int kBlockThreads, bool kWideSums>
struct WarpTiles {
  static constexpr bool kWide = kWideSums;
  static constexpr int kThreads = kBlockThreads, kHalves = 2, kSteps = kWide ? 2 : 4, kRuns = 4;
  static constexpr int kDraws = kThreads / (kHalves * kWarp) * 16 * kSteps;  // of the tile

  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int across = static_cast<int>(threadIdx.x) / kWarp % kHalves * (kTileColumns / kHalves);
  const int down = static_cast<int>(threadIdx.x) / (kHalves * kWarp) * 16 * kSteps;

  __device__ __forceinline__ int draw(int i, int h) const { return down + 16 * i + 8 * h + lane / 4; }
  __device__ __forceinline__ int column(int q, int e) const { return across + 8 * q + lane % 4 * 2 + e; }
  // Called before the barrier that makes a piece everybody's.
  __device__ __forceinline__ void arrived() const {}

  // The sums of a group of rows. `signs` is four words of each draw, of which a thread takes word t: bit
  // 2 step + 8 i is row 32 t + 8 i + 2 step, byte 4 t + i of chunk 2 step.
  template <bool kSigned>
  __device__ __forceinline__ void add(const uint4* signs, const uint4* piece,
                                      uint32_t (&part)[kSteps][kRuns][4]) const {
    uint32_t words[kSteps][2];
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h)
        words[i][h] = reinterpret_cast<const uint32_t*>(signs + draw(i, h))[lane % 4];
    }
    const int own = across + lane / 16 * 8 + lane % 8;  // the column whose bytes this lane asks for
    const unsigned char* const bytes = reinterpret_cast<const unsigned char*>(piece) + own * kGroup;
    // More of them at once, and sums are spilled.
#pragma unroll 2
    for (int step = 0; step < 4; ++step) {
      uint32_t columns[2][4];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        load_matrices<false>(columns[half],
                             bytes + 16 * half * kGroup + place_of_chunk(2 * step + lane / 8 % 2, own));
      }
#pragma unroll
      for (int i = 0; i < kSteps; ++i) {
        uint32_t ones[4];
#pragma unroll
        for (int r = 0; r < 4; ++r) ones[r] = words[i][r % 2] >> r / 2 & 0x01010101u;
#pragma unroll
        for (int h = 0; h < 2; ++h) words[i][h] >>= 2;
#pragma unroll
        for (int q = 0; q < kRuns; ++q) {
          const uint32_t two[2] = {columns[q / 2][2 * (q % 2)], columns[q / 2][2 * (q % 2) + 1]};
          multiply_add<kSigned>(part[i][q], ones, two);
        }
      }
    }
  }
};

// What a block of threads does, its tile divided by `Tiles`; its shared memory comes from the kernel.
template <class Tiles>
__device__ __forceinline__ void sum_tile(const SumsTask& task, uint4 (&signs)[kGroups * Tiles::kDraws],
                                         uint4 (&pieces)[kPieces * (kPieceBytes / 16)],
                                         Best (&halves)[Tiles::kDraws]) {
  constexpr bool kWide = Tiles::kWide;
  constexpr int kThreads = Tiles::kThreads, kDraws = Tiles::kDraws, kSteps = Tiles::kSteps,
                kRuns = Tiles::kRuns;
  const Tiles mine;
  const int thread = static_cast<int>(threadIdx.x);
  const int draw_tiles = (task.draws + kDraws - 1) / kDraws;
  const int tile = static_cast<int>(blockIdx.x) / draw_tiles;
  const int first_draw = (static_cast<int>(blockIdx.x) - tile * draw_tiles) * kDraws;
  const auto draw_of = [&](int i, int h) { return first_draw + mine.draw(i, h); };
  const auto column_of = [&](int q, int e) { return tile * kTileColumns + mine.column(q, e); };

  // This thread's sums: element e is of draw e / 2 and column e % 2.
  const auto every = [](auto&& f) {
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
#pragma unroll
      for (int q = 0; q < kRuns; ++q) {
#pragma unroll
        for (int e = 0; e < 4; ++e) f(i, q, e);
      }
    }
  };
  const auto kept = [&](int i, int q, int e) -> double* {
    const int draw = draw_of(i, e / 2), column = column_of(q, e % 2);
    const bool exists = draw < task.draws && column < task.columns;
    return exists ? task.sums + draw * task.sums_stride + column : nullptr;
  };

  double sums[kSteps][kRuns][4];
  every([&](int i, int q, int e) {
    sums[i][q][e] = 0.0;
    if (!task.resume) return;
    if (const double* sum = kept(i, q, e)) sums[i][q][e] = *sum;
  });

  constexpr int kPacks = kPieceBytes / 16;
  const int blocks = static_cast<int>(task.matrix.blocks);
  int to_fetch = blocks * task.matrix.digits * kGroups;
  const uint4* from =
      reinterpret_cast<const uint4*>(task.matrix.planes) + int64_t{tile} * to_fetch * kPacks + thread;
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
  for (int block = 0; block < blocks; ++block) {
    __syncthreads();
#pragma unroll 1
    for (int i = thread; i < kGroups * kDraws; i += kThreads) {
      const PhiloxSequence sequence =
          sign_sequence(task.seed, task.first_draw + static_cast<unsigned>(first_draw + i % kDraws));
      const PhiloxBlock<uint32_t> bits =
          sequence.block(task.first_block + static_cast<unsigned>(block * kGroups + i / kDraws));
      signs[i] = uint4{bits.word[0], bits.word[1], bits.word[2], bits.word[3]};
    }
    uint32_t part[kSteps][kRuns][4];
    [[maybe_unused]] uint64_t high[kSteps][kRuns][4];
    every([&](int i, int q, int e) {
      part[i][q][e] = 0;
      if constexpr (kWide) high[i][q][e] = 0;
    });
    const auto add_group = [&](auto is_signed, int group) {
      wait_copies<1>();
      mine.arrived();
      __syncthreads();
      fetch(slot == 0 ? kPieces - 1 : slot - 1);  // which everybody has read
      mine.template add<decltype(is_signed)::value>(signs + group * kDraws, pieces + slot * kPacks, part);
      slot = slot == kPieces - 1 ? 0 : slot + 1;
    };
#pragma unroll 1
    for (int group = 0; group < kGroups; ++group) add_group(std::true_type{}, group);
#pragma unroll 1
    for (int digit = 1; digit < task.matrix.digits; ++digit) {
      every([&](int i, int q, int e) {
        if constexpr (kWide) {
          high[i][q][e] = (high[i][q][e] + static_cast<uint64_t>(static_cast<int32_t>(part[i][q][e]))) << 8;
          part[i][q][e] = 0;
        } else {
          part[i][q][e] <<= 8;
        }
      });
#pragma unroll 1
      for (int group = 0; group < kGroups; ++group) add_group(std::false_type{}, group);
    }
    const ColumnBlock* const columns = task.matrix.columns + (int64_t{tile} * blocks + block) * kTileColumns;
#pragma unroll
    for (int q = 0; q < kRuns; ++q) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const ColumnBlock column = columns[mine.column(q, e)];
#pragma unroll
        for (int i = 0; i < kSteps; ++i) {
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            double& sum = sums[i][q][2 * h + e];
            using Unsigned = std::conditional_t<kWide, uint64_t, uint32_t>;
            Unsigned ones = part[i][q][2 * h + e];
            if constexpr (kWide) ones += high[i][q][2 * h + e];
            const auto total =
                static_cast<std::make_signed_t<Unsigned>>(2 * ones - static_cast<Unsigned>(column.total));
            sum += static_cast<double>(total) * column.back;
          }
        }
      }
    }
  }

  if (!task.best) {
    every([&](int i, int q, int e) {
      if (double* sum = kept(i, q, e)) *sum = sums[i][q][e];
    });
    return;
  }
  const bool second = mine.column(0, 0) >= kTileColumns / Tiles::kHalves;
  Best best[kSteps][2];
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      best[i][h] = {-std::numeric_limits<double>::infinity(), kNoColumn};
#pragma unroll
      for (int q = 0; q < kRuns; ++q) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int column = column_of(q, e);
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
      if (second && thread % 4 == 0) halves[mine.draw(i, h)] = best[i][h];
    }
  }
  __syncthreads();
  if (second || thread % 4 > 0) return;
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int draw = draw_of(i, h);
      if (draw >= task.draws) continue;
      const bool whole = Tiles::kHalves == 1;
      task.best[int64_t{tile} * task.draws + draw] =
          whole ? best[i][h] : better(best[i][h], halves[mine.draw(i, h)]);
    }
  }
}

// Sums and their parts fill the registers: a word that is the same for a block of rows is in local memory.
// budget: registers 256 (wide 224), local 8 (wide 0), shared 43008 (threads=64 33792, wide 33792,
//     threads=64 wide 29184), occupancy 12%
template <int kThreads, bool kWide>
__global__ void __launch_bounds__(kThreads) sums_kernel(const SumsTask task) {
  using Tiles = WarpTiles<kThreads, kWide>;
  REFINE_EXT_SHARED(uint4, signs, [kGroups * Tiles::kDraws]);
  REFINE_EXT_SHARED(uint4, pieces, [kPieces * (kPieceBytes / 16)]);
  REFINE_EXT_SHARED(Best, halves, [Tiles::kDraws]);
  sum_tile<Tiles>(task, signs, pieces, halves);
}

}  // namespace refine_ext::cuda
