// Kernels of the resampling family. Everything that decides an index is defined in csrc/math/resampling.h and
// is integer arithmetic, or float64 steps that round alike everywhere, so that the indices are the CPU's.
//
//   measure   a block a chunk: its mass                                    reads the weights
//   unit      a block a row: the row's unit, the sums before each chunk
//   table     a block a chunk: C_i                                          reads the weights, writes 8 n
//   bytes copies    (residual) a block a chunk, twice: certain copies, F_i        reads C, writes 8 n bytes
//   draw      a thread a draw: binary search of C (and F)                   writes 8 num bytes
//
// A row of invalid weights, or of none, cannot raise without waiting for the device: its draws are index 0.
#pragma once

#include "../math/resampling_problem.h"
#include "reduce.cuh"

namespace refine_ext::cuda {

inline constexpr int kDrawThreads = 256;
inline constexpr int kRowsOfWarp =
    static_cast<int>(kDrawChunk) / kDrawThreads;        // a warp's share, 32 at a time
inline constexpr uint64_t kInvalidMass = ~uint64_t{0};  // sums are below 2^63

struct RowUnit {
  int64_t unit;
  uint64_t total;  // 0: invalid
};

// Scratch memory of one call to resample.
struct DrawWorkspace {
  ChunkMass* masses;  // [rows][chunks]
  RowUnit* units;     // [rows]
  uint64_t* bases;    // [rows][chunks + 1]: C before each chunk
  uint64_t* table;    // [rows][n]: C
  uint64_t* certain;  // residual: [rows][chunks + 1], copies in each chunk, then before it
  uint64_t* settled;  // residual: [rows][n]: F_i, certain copies up to and including i
  int64_t chunks;
};

template <class T>
__device__ __forceinline__ double wide_at(const void* data, int64_t i) {
  return static_cast<double>(widen(static_cast<const T*>(data)[i]));
}

// Where a thread's elements lie in their chunk: every warp takes 512 consecutive ones, 32 at a time.
__device__ __forceinline__ int64_t element_of(const Team& team, int r) {
  return (team.rank / kWarp) * (kRowsOfWarp * kWarp) + r * kWarp + team.rank % kWarp;
}

struct Chunk {
  int64_t row, index, begin, length;  // begin: of its first element, among all rows'
};
__device__ __forceinline__ Chunk chunk_of(int64_t block, int64_t chunks, int64_t n) {
  Chunk chunk;
  chunk.row = block / chunks;
  chunk.index = block - chunk.row * chunks;
  chunk.begin = chunk.row * n + chunk.index * kDrawChunk;
  const int64_t rest = n - chunk.index * kDrawChunk;
  chunk.length = rest < kDrawChunk ? rest : kDrawChunk;
  return chunk;
}

// budget: registers 48, shared 320, occupancy 62%
template <class T>
__global__ void __launch_bounds__(kDrawThreads)
    measure_kernel(const ResampleProblem problem, const DrawWorkspace work) {
  const Team team = my_team({kDrawThreads, 1});
  const Chunk chunk = chunk_of(blockIdx.x, work.chunks, problem.n);
  const double infinity = std::numeric_limits<double>::infinity();
  const double nothing = problem.log ? -infinity : 0.0;
  double weights[kRowsOfWarp], largest[1] = {nothing};
  int invalid[1] = {0};
#pragma unroll
  for (int r = 0; r < kRowsOfWarp; ++r) {
    const int64_t i = element_of(team, r);
    weights[r] = i < chunk.length ? wide_at<T>(problem.weights, chunk.begin + i) : nothing;
    invalid[0] |= !(weights[r] >= nothing && weights[r] < infinity);
    largest[0] = Maximum::merge(largest[0], weights[r]);
  }
  reduce<Maximum>(team, largest);
  reduce<Maximum>(team, invalid);
  int64_t exponent = 0;
  uint64_t sum[1] = {0};
  if (largest[0] > nothing) {
    exponent = problem.log ? log_exponent_above(largest[0]) : exponent_above(largest[0]);
    const LogMass log_mass(exponent);
    const LinearMass linear_mass(exponent);
#pragma unroll
    for (int r = 0; r < kRowsOfWarp; ++r) {
      const bool counts = weights[r] > nothing && weights[r] < infinity;
      if (counts) sum[0] += problem.log ? log_mass(weights[r]) : linear_mass(weights[r]);
    }
  }
  reduce<Sum>(team, sum);
  if (team.rank == 0) work.masses[blockIdx.x] = {exponent, invalid[0] ? kInvalidMass : sum[0]};
}

// Sums before each chunk of a row, and after the last; size_at(c) is what chunk c adds.
template <class F>
__device__ __forceinline__ uint64_t chunk_bases(const Team& team, int64_t chunks, uint64_t* bases,
                                                F&& size_at) {
  uint64_t carry = 0;
  for (int64_t from = 0; from < chunks; from += team.size) {
    const int64_t c = from + team.rank;
    const uint64_t size = c < chunks ? size_at(c) : 0;
    uint64_t total;
    const uint64_t sum = running_sum(team, size, total);
    if (c < chunks) bases[c] = carry + sum - size;
    carry += total;
  }
  if (team.rank == 0) bases[chunks] = carry;
  return carry;
}

// budget: registers 40, shared 448, occupancy 75%
__global__ void __launch_bounds__(kDrawThreads) unit_kernel(const DrawWorkspace work) {
  const Team team = my_team({kDrawThreads, 1});
  const int64_t row = blockIdx.x;
  const ChunkMass* masses = work.masses + row * work.chunks;
  uint64_t* bases = work.bases + row * (work.chunks + 1);
  int64_t top[1] = {std::numeric_limits<int64_t>::lowest()};
  int invalid[1] = {0};
  for (int64_t c = team.rank; c < work.chunks; c += team.size) {
    const ChunkMass mass = masses[c];
    if (mass.sum == kInvalidMass) {
      invalid[0] = 1;
    } else if (mass.sum > 0) {
      top[0] = Maximum::merge(top[0], mass.exponent + bit_length(mass.sum));
    }
  }
  reduce<Maximum>(team, top);
  reduce<Maximum>(team, invalid);
  if (invalid[0] || top[0] == std::numeric_limits<int64_t>::lowest()) {
    if (team.rank == 0) work.units[row] = {0, 0};
    return;
  }
  const int64_t first = first_unit(top[0], work.chunks);
  uint64_t total[1] = {0};
  for (int64_t c = team.rank; c < work.chunks; c += team.size) {
    total[0] += align_mass(masses[c].sum, masses[c].exponent - first);
  }
  reduce<Sum>(team, total);
  const int64_t unit = final_unit(first, total[0]);
  const uint64_t sum = chunk_bases(team, work.chunks, bases, [&](int64_t c) {
    return align_mass(masses[c].sum, masses[c].exponent - unit);
  });
  if (team.rank == 0) work.units[row] = {unit, sum};
}

// Running sums over a chunk in the order of its elements; f(r, i, sum) for each of this thread's.
template <class F>
__device__ __forceinline__ void scan_chunk(const Team& team, const uint64_t (&sizes)[kRowsOfWarp], F&& f) {
  uint64_t sum = 0, total;
#pragma unroll
  for (int r = 0; r < kRowsOfWarp; ++r) sum += sizes[r];
  uint64_t warp_sum[1] = {sum};
  reduce_warp<Sum>(warp_sum);
  // Each warp's sum once, in its last lane: the other lanes then get what comes before the warp.
  const bool last_lane = team.rank % kWarp == kWarp - 1;
  const uint64_t through = running_sum(team, last_lane ? warp_sum[0] : uint64_t{0}, total);
  uint64_t carry = last_lane ? through - warp_sum[0] : through;
#pragma unroll
  for (int r = 0; r < kRowsOfWarp; ++r) {
    uint64_t running = sizes[r];
#pragma unroll
    for (int distance = 1; distance < kWarp; distance *= 2) {
      const uint64_t before = __shfl_up_sync(kFullMask, running, distance);
      running += team.rank % kWarp >= distance ? before : uint64_t{0};
    }
    f(r, element_of(team, r), carry + running);
    uint64_t row_sum[1] = {sizes[r]};
    reduce_warp<Sum>(row_sum);
    carry += row_sum[0];
  }
}

// budget: registers 96, shared 128, occupancy 25%
template <class T>
__global__ void __launch_bounds__(kDrawThreads)
    table_kernel(const ResampleProblem problem, const DrawWorkspace work) {
  const Team team = my_team({kDrawThreads, 1});
  const Chunk chunk = chunk_of(blockIdx.x, work.chunks, problem.n);
  const RowUnit row = work.units[chunk.row];
  if (row.total == 0) return;
  const ChunkMass mass = work.masses[blockIdx.x];
  const uint64_t base = work.bases[chunk.row * (work.chunks + 1) + chunk.index];
  const LogMass log_mass(mass.exponent);
  const LinearMass linear_mass(mass.exponent);
  const double nothing = problem.log ? -std::numeric_limits<double>::infinity() : 0.0;
  uint64_t sizes[kRowsOfWarp];
#pragma unroll
  for (int r = 0; r < kRowsOfWarp; ++r) {
    const int64_t i = element_of(team, r);
    const double weight = i < chunk.length ? wide_at<T>(problem.weights, chunk.begin + i) : nothing;
    sizes[r] = !(weight > nothing) ? 0 : problem.log ? log_mass(weight) : linear_mass(weight);
  }
  scan_chunk(team, sizes, [&](int, int64_t i, uint64_t sum) {
    if (i < chunk.length) work.table[chunk.begin + i] = base + align_mass(sum, mass.exponent - row.unit);
  });
}

// kWrite = false: the certain copies of each chunk; true: F_i from what comes before each.
// budget: registers 40 (write 80), shared 128, occupancy 75% (write 37%)
template <bool kWrite>
__global__ void __launch_bounds__(kDrawThreads)
    copies_kernel(const ResampleProblem problem, const DrawWorkspace work) {
  const Team team = my_team({kDrawThreads, 1});
  const Chunk chunk = chunk_of(blockIdx.x, work.chunks, problem.n);
  const RowUnit row = work.units[chunk.row];
  if (row.total == 0) return;
  const Grid grid{row.total, static_cast<uint64_t>(problem.num)};
  const double rate = static_cast<double>(grid.num) / static_cast<double>(grid.total);
  const int64_t slot = chunk.row * (work.chunks + 1) + chunk.index;
  uint64_t sizes[kRowsOfWarp], sum[1] = {0};
#pragma unroll
  for (int r = 0; r < kRowsOfWarp; ++r) {
    const int64_t i = element_of(team, r);
    sizes[r] = 0;
    if (i < chunk.length) {
      const uint64_t before = i == 0 ? work.bases[slot] : work.table[chunk.begin + i - 1];
      sizes[r] = certain_copies(work.table[chunk.begin + i] - before, grid, rate);
    }
    sum[0] += sizes[r];
  }
  if constexpr (kWrite) {
    const uint64_t base = work.certain[slot];
    scan_chunk(team, sizes, [&](int, int64_t i, uint64_t copies) {
      if (i < chunk.length) work.settled[chunk.begin + i] = base + copies;
    });
  } else {
    reduce<Sum>(team, sum);
    if (team.rank == 0) work.certain[slot] = sum[0];
  }
}

// budget: registers 40, shared 128, occupancy 75%
__global__ void __launch_bounds__(kDrawThreads) certain_kernel(const DrawWorkspace work) {
  const Team team = my_team({kDrawThreads, 1});
  if (work.units[blockIdx.x].total == 0) return;
  uint64_t* certain = work.certain + static_cast<int64_t>(blockIdx.x) * (work.chunks + 1);
  chunk_bases(team, work.chunks, certain, [&](int64_t c) { return certain[c]; });
}

// The first i in [0, n) with boundary(i) > position; the last boundary is beyond it.
template <class F>
__device__ __forceinline__ int64_t owner_of(int64_t n, uint64_t position, F&& boundary) {
  int64_t low = 0, high = n - 1;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (boundary(middle) > position) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

// budget: registers 40, shared 0, occupancy 75%
__global__ void __launch_bounds__(kDrawThreads)
    draw_kernel(const ResampleProblem problem, const DrawWorkspace work, const int64_t blocks_a_row) {
  const int64_t row = blockIdx.x / blocks_a_row;
  const int64_t j = (blockIdx.x - row * blocks_a_row) * kDrawThreads + threadIdx.x;
  if (j >= problem.num) return;
  int64_t* out = problem.out + row * problem.num + j;
  const uint64_t total = work.units[row].total;
  if (total == 0) {
    *out = 0;
    return;
  }
  const uint64_t* table = work.table + row * problem.n;
  const auto boundary = [&](int64_t i) { return table[i]; };
  const Grid grid{total, static_cast<uint64_t>(problem.num)};
  const PhiloxSequence sequence = problem.seeds.sequence(row, Stream::resample);
  const uint64_t k = static_cast<uint64_t>(j), offset = problem.seeds.offset;
  if (problem.method == ResampleMethod::multinomial) {
    *out = owner_of(problem.n, mulhi(random_bits(sequence, offset + k), total), boundary);
  } else if (problem.method == ResampleMethod::residual) {
    const uint64_t* settled = work.settled + row * problem.n;
    const uint64_t certain = settled[problem.n - 1];
    if (k < certain) {
      *out = owner_of(problem.n, k, [&](int64_t i) { return settled[i]; });
      return;
    }
    const Remainder remainder(grid, certain);
    *out = owner_of(problem.n, mulhi(random_bits(sequence, offset + (k - certain)), remainder.total),
                    [&](int64_t i) { return remainder.boundary(table[i], settled[i]); });
  } else {
    const uint64_t start = problem.method == ResampleMethod::systematic
                               ? mulhi(random_bits(sequence, offset), total)
                               : uint64_t{0};
    *out =
        owner_of(problem.n, Ascending{grid, problem.method, start, sequence, offset}.position(k), boundary);
  }
}

}  // namespace refine_ext::cuda
