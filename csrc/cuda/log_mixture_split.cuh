// Rows and centres brought into parts for the tensor cores (log_mixture_pieces.cuh), and from where on.
#pragma once

#include "log_mixture_pieces.cuh"
#include "reduce.cuh"

namespace refine_ext::cuda {

inline constexpr int kOffsetSample = 1024;
inline constexpr int kOffsetGroups = 5;

// A thread a dimension: of the means of five groups of some of the centres the middle one, which a few
// centres far away do not move. budget: registers 32, occupancy 100%
__global__ void __launch_bounds__(kMixtureThreads)
    mixture_offset_kernel(const MixtureInputs in, float* offset) {
  const int64_t k = static_cast<int64_t>(blockIdx.x) * kMixtureThreads + static_cast<int>(threadIdx.x);
  if (k >= in.d) return;
  const int64_t count = in.n < kOffsetSample ? in.n : kOffsetSample, apart = in.n / count;
  double sums[kOffsetGroups] = {}, counts[kOffsetGroups] = {};
#pragma unroll 1
  for (int64_t i = 0; i < count; i += kOffsetGroups) {
#pragma unroll
    for (int g = 0; g < kOffsetGroups; ++g) {
      if (i + g >= count) break;
      const double y = element<double>(in.centers, in.storage, (i + g) * apart * in.d + k);
      const bool finite = y - y == 0.0;
      sums[g] += finite ? y : 0.0;
      counts[g] += finite ? 1.0 : 0.0;
    }
  }
  int groups = 0;
#pragma unroll
  for (int g = 0; g < kOffsetGroups; ++g) {
    groups += counts[g] > 0.0;
    sums[g] = counts[g] > 0.0 ? sums[g] / counts[g] : kInfinity<double>;
  }
  double middle = 0.0;
#pragma unroll
  for (int g = 0; g < kOffsetGroups; ++g) {
    int before = 0;
#pragma unroll
    for (int h = 0; h < kOffsetGroups; ++h)
      before += sums[h] < sums[g] || (sums[h] == sums[g] && h < g) ? 1 : 0;
    if (groups > 0 && before == (groups - 1) / 2) middle = sums[g];
  }
  offset[k] = static_cast<float>(middle);
}

// A warp a row of x, or a centre; those that fill the last tile up are zeros. So is a coordinate at infinity,
// which zero weights multiply; its norm is infinite.
// budget: registers 56, occupancy 56%
__global__ void __launch_bounds__(kMixtureThreads)
    mixture_split_kernel(const MixtureInputs in, const float* offset, int64_t slices, bool centers,
                         const ProductOperand to, int64_t padded) {
  const void* const data = centers ? in.centers : in.x;
  const int64_t count = centers ? in.n : in.m;
  const Team team = my_team({kWarp, 1});
  const int64_t row = team.row, tile = row / kProductTile;
  if (row >= padded) return;
  const int in_tile = static_cast<int>(row - tile * kProductTile);
  double norm[1] = {0.0};
  for (int64_t pack = team.rank; pack < slices * kProductPacks; pack += kWarp) {
    BFloat16 parts[kProductParts][8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int64_t k = pack * 8 + i;
      float rest = 0.0f;
      if (row < count && k < in.d) {
        const double from = static_cast<double>(offset[k]);
        const double coordinate = element<double>(data, in.storage, row * in.d + k);
        rest = static_cast<float>(finite_or(coordinate, from) - from);
        norm[0] += ::fabs(coordinate) == kInfinity<double>
                       ? kInfinity<double>
                       : static_cast<double>(rest) * static_cast<double>(rest);
      }
      split(rest, parts, i);
    }
    uint4* const piece = to.pieces + (tile * slices + pack / kProductPacks) * kPiecePacks;
#pragma unroll
    for (int part = 0; part < kProductParts; ++part) {
      uint4 packed;
      memcpy(&packed, parts[part], sizeof(packed));
      piece[part * kProductTile * kProductPacks +
            place_of_pack(in_tile, static_cast<int>(pack % kProductPacks))] = packed;
    }
  }
  reduce_warp<Sum>(norm);
  if (team.rank == 0) to.norms[row] = static_cast<float>(norm[0]);
}

}  // namespace refine_ext::cuda
