// Rows and centres brought into parts for the tensor cores (log_mixture_pieces.cuh), and from where on.
#pragma once

#include "log_mixture_pieces.cuh"
#include "reduce.cuh"

namespace refine_ext::cuda {

inline constexpr int kOffsetSample = 1024;
inline constexpr int kOffsetGroups = 5;
inline constexpr float kNarrow = 16.0f;                       // widths of a scale
inline constexpr float kNarrowest = 1.0f / 1099511627776.0f;  // 2^-40

// A thread a dimension: of the means of five groups of some of the centres the middle one, which a few
// centres far away do not move.
// budget: registers 48, occupancy 62%
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
// which zero weights multiply; its norm is infinite. Of a row whose `grad` is zero all are.
// budget: registers 56, occupancy 56%
__global__ void __launch_bounds__(kMixtureThreads)
    mixture_split_kernel(const MixtureInputs in, const double* grad, const float* offset, int64_t slices,
                         bool centers, const ProductOperand to, int64_t padded) {
  const void* const data = centers ? in.centers : in.x;
  const int64_t count = centers ? in.n : in.m;
  const Team team = my_team({kWarp, 1});
  const int64_t row = team.row, tile = row / kProductTile;
  if (row >= padded) return;
  const int in_tile = static_cast<int>(row - tile * kProductTile);
  const bool exists = row < count && (!grad || grad[row] != 0.0);
  double norm[1] = {0.0};
  float width[1] = {0.0f};
  for (int64_t pack = team.rank; pack < slices * kProductPacks; pack += kWarp) {
    BFloat16 parts[kProductParts][8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int64_t k = pack * 8 + i;
      float rest = 0.0f;
      if (exists && k < in.d) {
        const double from = static_cast<double>(offset[k]);
        const double coordinate = element<double>(data, in.storage, row * in.d + k);
        rest = static_cast<float>(finite_or(coordinate, from) - from);
        norm[0] += ::fabs(coordinate) == kInfinity<double>
                       ? kInfinity<double>
                       : static_cast<double>(rest) * static_cast<double>(rest);
        const float size = ::fabsf(rest);
        width[0] = size > width[0] ? size : width[0];
      }
      split(rest, parts, i);
    }
    if (!to.pieces) continue;
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
  reduce_warp<Maximum>(width);
  if (team.rank > 0) return;
  if (to.norms) to.norms[row] = static_cast<float>(norm[0]);
  if (to.widths) to.widths[row] = width[0];
}

// One block: whether gradients are sums of products. Their coordinates' errors, up to 2^-20 of the data's
// width and weighted as what they are made of, must be small beside a scale, which is what a difference to a
// centre of some weight is like: below 2^-16 of it. Scales are such that float32 has their squares' inverses.
// budget: registers 24, shared 192, occupancy 100%
__global__ void __launch_bounds__(kMaxThreads)
    mixture_choice_kernel(const MixtureInputs in, const float* row_widths, const float* center_widths,
                          int* multiplied) {
  const Team team = my_team({kMaxThreads, 1});
  // The largest coordinate, scale, and, negative, the smallest.
  float most[3] = {0.0f, 0.0f, -kInfinity<float>};
  const auto note = [](float value, float& largest) { largest = value > largest ? value : largest; };
#pragma unroll 4
  for (int64_t i = team.rank; i < in.m; i += kMaxThreads) note(row_widths[i], most[0]);
#pragma unroll 4
  for (int64_t j = team.rank; j < in.n; j += kMaxThreads) note(center_widths[j], most[0]);
  const int64_t scales = in.scale_kind == MixtureScale::shared ? 1 : in.n;
#pragma unroll 4
  for (int64_t j = team.rank; j < scales; j += kMaxThreads) {
    const float scale = scale_of<float>(in, j);
    note(scale, most[1]);
    note(-scale, most[2]);
  }
  reduce<Maximum>(team, most);
  if (team.rank == 0) {
    const float narrowest = -most[2];
    *multiplied = narrowest >= kNarrowest && most[1] <= 1.0f / kNarrowest && most[0] <= kNarrow * narrowest;
  }
}

}  // namespace refine_ext::cuda
