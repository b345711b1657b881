// Weighted sums of differences for any dimension: posterior means and gradients, but where the tensor cores
// sum products (log_mixture_product_sums.cuh).
//
// Weights a_ij of a block of rows and a block of centres are written to memory, then multiply differences in
// tiles of owners (rows or centres) x dimensions. Blocks depend on the number of centres alone in what a row
// gets, and sums go on in their order.
#pragma once

#include "log_mixture_pieces.cuh"

namespace refine_ext::cuda {

// A row's logarithm as the weights want it, in base 2 and two parts; `grad` multiplies the weights.
struct RowLogarithm {
  const double* value;
  const double* grad;  // or nullptr: ones

  template <class C>
  __device__ __forceinline__ void parts(int64_t row, C& high, C& low) const {
    const double logarithm = kLog2E * value[row];
    high = static_cast<C>(logarithm);
    low = high - high == C(0) ? static_cast<C>(logarithm - static_cast<double>(high)) : C(0);
  }
  template <class C>
  __device__ __forceinline__ C gradient(int64_t row) const {
    return grad ? static_cast<C>(grad[row]) : C(1);
  }
};

// Whether a row's exponents are rounded before its logarithm is subtracted, or it has no centre at all.
template <class C>
__device__ __forceinline__ bool is_coarse(C high) {
  return !(high > -kCoarse<C> && high < kCoarse<C>);
}
template <class C>
__device__ __forceinline__ C coarse_weight(C q, C slope, C weight, C high, C low) {
  return high == -kInfinity<C> ? C(0) : power_of_two((fused(q, slope, weight) - high) - low);
}

// Rows [first_row, first_row + rows) and centres likewise, whole tiles of the latter.
struct WeightBlock {
  void* weights;  // [rows][stride], or in parts for the tensor cores: [tile of rows][slice of centres]
  int64_t first_row, rows, first_center, centers, stride;
  // Where the tensor cores may: whether they do (nullptr: yes), and whether parts have the factor 1 / s^2.
  const int* multiplied;
  bool factored;
  // Of parts, if wanted: sums over a tile's centres; over a tile's rows of a and a q without 1 / s^2.
  float* row_totals;                      // [tiles of 64 centres][rows]
  float *center_totals, *center_squares;  // [tiles of rows][stride]

  __device__ __forceinline__ bool is_multiplied() const { return !multiplied || *multiplied; }
};

// 1 / s^2 as weights have it.
__device__ __forceinline__ float weight_factor(float slope) {
  return static_cast<float>(-2.0 * kLn2) * slope;
}

// A thread's weights of a row and two slices of centres, in parts: half a pack of each.
__device__ __forceinline__ void store_parts(const WeightBlock& block, int64_t tile, int64_t slice, int row,
                                            int across, const float (&weights)[8]) {
  static_assert(PairTile<float>::kRows == kProductTile && PairTile<float>::kColumns == 2 * kProductSlice);
  BFloat16 parts[kProductParts][8];
#pragma unroll
  for (int c = 0; c < 8; ++c) split(weights[c], parts, c);
  uint4* const pieces =
      static_cast<uint4*>(block.weights) + (tile * (block.stride / kProductSlice) + slice) * kPiecePacks;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int part = 0; part < kProductParts; ++part) {
      uint4* const pack =
          pieces + half * kPiecePacks + part * kProductTile * kProductPacks + place_of_pack(row, across / 2);
      uint64_t packed;
      memcpy(&packed, &parts[part][4 * half], sizeof(packed));
      reinterpret_cast<uint64_t*>(pack)[across % 2] = packed;
    }
  }
}

// Written as parts (kParts) there are zeros wherever a pair does not exist.
// budget: registers 72 (float32 128, float64 dims 80, float32 dims 136, float32 parts 136), shared 13328
//     (float64 dims 17664, float32 dims 17664, float32 parts 15376), occupancy 43% (float32 25%, float64
//     dims 37%, float32 dims 18%, float32 parts 18%)
template <class T, bool kDims, bool kParts>
__global__ void __launch_bounds__(kMixtureThreads, kParts ? 3 : 0)
    mixture_weights_kernel(const MixtureInputs in, const RowLogarithm rows, const WeightBlock block) {
  using Tile = PairTile<T>;
  using Slice = PairSlice<T, kDims>;
  constexpr int kOwn = Tile::kOwn;
  REFINE_EXT_SHARED(Slice, slice, [1]);
  REFINE_EXT_SHARED(T, slopes, [Tile::kColumns]);
  REFINE_EXT_SHARED(T, weights, [Tile::kColumns]);
  const Tile mine;
  const int64_t across = block.stride / Tile::kColumns, tile = blockIdx.x / across;
  const int64_t local_row = tile * Tile::kRows, local_center = (blockIdx.x - tile * across) * Tile::kColumns;
  const int64_t first_row = block.first_row + local_row, first_center = block.first_center + local_center;
  load_weights<T, kDims>(in, first_center, kDims ? T(-1) : shared_slope<T>(in), slopes, weights);
  T q[kOwn][kOwn];
  squared_distances<T, kDims>(in, first_row, first_center, slice[0], q);
  const bool parts = kParts && block.is_multiplied();
  [[maybe_unused]] T totals[kParts ? kOwn : 1] = {}, squares[kParts ? kOwn : 1] = {};
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    const int64_t row = first_row + mine.row(i);
    const bool exists = local_row + mine.row(i) < block.rows;
    if (!exists && !parts) continue;
    T high = T(0), low = T(0), grad = T(0);
    int64_t excluded = -1;
    if (exists) {
      rows.parts(row, high, low);
      grad = rows.gradient<T>(row);
      if (in.exclude) excluded = in.exclude[row];
    }
    [[maybe_unused]] T a[kOwn];
    [[maybe_unused]] T* const to =
        static_cast<T*>(block.weights) + (local_row + mine.row(i)) * block.stride + local_center;
#pragma unroll
    for (int c = 0; c < kOwn; ++c) {
      const int column = mine.column(c);
      const T slope = slopes[column], weight = weights[column];
      const T p = is_coarse(high) ? coarse_weight(q[i][c], slope, weight, high, low)
                                  : power_of_two(exponent(q[i][c], slope, weight, high) - low);
      const int64_t j = first_center + column;
      const bool counts = local_center + column < block.centers && j != excluded && grad != T(0);
      a[c] = counts ? grad * p : T(0);
      if (!parts) to[column] = a[c];
    }
    if constexpr (kParts) {
      if (!parts) continue;
      T total = T(0);
#pragma unroll
      for (int c = 0; c < kOwn; ++c) {
        totals[c] += a[c];
        squares[c] = a[c] == T(0) ? squares[c] : fused(a[c], q[i][c], squares[c]);
        if (block.factored) a[c] *= weight_factor(slopes[mine.column(c)]);
        total += a[c];
      }
      store_parts(block, local_row / kProductTile, local_center / kProductSlice, mine.row(i), mine.across, a);
      if (!block.row_totals) continue;
#pragma unroll
      for (int distance = 1; distance < kMixtureAcross; distance *= 2)
        total += __shfl_xor_sync(kFullMask, total, distance);
      if (exists && mine.across == 0)
        block.row_totals[local_center / Tile::kColumns * block.rows + local_row + mine.row(i)] = total;
    }
  }
  if constexpr (kParts) {
    if (!parts || !block.center_totals) return;
    constexpr int kWarps = kMixtureThreads / kWarp;
    REFINE_EXT_SHARED(T, columns, [2][kWarps][Tile::kColumns]);
    const int warp = static_cast<int>(threadIdx.x) / kWarp;
#pragma unroll
    for (int c = 0; c < kOwn; ++c) {
#pragma unroll
      for (int distance = kMixtureAcross; distance < kWarp; distance *= 2) {
        totals[c] += __shfl_xor_sync(kFullMask, totals[c], distance);
        squares[c] += __shfl_xor_sync(kFullMask, squares[c], distance);
      }
      if (static_cast<int>(threadIdx.x) % kWarp >= kMixtureAcross) continue;
      columns[0][warp][mine.column(c)] = totals[c];
      columns[1][warp][mine.column(c)] = squares[c];
    }
    __syncthreads();
    static_assert(2 * Tile::kColumns == kMixtureThreads);
    const int which = static_cast<int>(threadIdx.x) / Tile::kColumns;
    const int column = static_cast<int>(threadIdx.x) % Tile::kColumns;
    T sum = T(0);
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += columns[which][w][column];
    (which == 0 ? block.center_totals : block.center_squares)[tile * block.stride + local_center + column] =
        sum;
  }
}

// Sums of a block's weights times differences, added to what is there unless it is the first.
struct SumsOfDifferences {
  WeightBlock block;
  void* sums;     // [owners][d]
  void* squares;  // likewise, of a (x - y)^2, or nullptr
  void* totals;   // [owners] sum of a, or nullptr
  bool first;
};

// For each row sum_j a_ij f_j (y_j - o_i), with o = x and f = 1 / s^2 for gradients, or o = y_0 and f = 1 for
// means (of which a weight's error then only takes its share of the data's width), 0 where y_0 is infinite.
// For each centre (kCenters) sum_i a_ij (x_i - y_j), and the squares.
// budget: registers 160 (float32 232, float64 centers 208, float32 centers 256, float64 dims 168, float32
//     dims 248, float64 centers dims 200, float32 centers dims 256), shared 12800 (float64 dims 17152,
//     float32 dims 17152, float64 centers dims 12800, float32 centers dims 12800), occupancy 18% (float32
//     12%, float64 centers 12%)
template <class T, bool kCenters, bool kDims>
__global__ void __launch_bounds__(kMixtureThreads, 2)
    mixture_sums_kernel(const MixtureInputs in, const double* grad, bool mean, const SumsOfDifferences task) {
  using Tile = PairTile<T>;
  constexpr int kOwn = Tile::kOwn, kApart = 16 / sizeof(T);
  constexpr bool kFactors = kDims && !kCenters;
  REFINE_EXT_SHARED(T, weights, [kMixtureSlice][Tile::kRows + kApart]);
  REFINE_EXT_SHARED(T, others, [kMixtureSlice][Tile::kColumns + kApart]);
  REFINE_EXT_SHARED(T, factors, [kFactors ? kMixtureSlice : 1][kFactors ? Tile::kColumns + kApart : 1]);
  const Tile mine;
  const WeightBlock& block = task.block;
  if (block.multiplied && *block.multiplied) return;
  const int64_t dimension_tiles = (in.d + Tile::kColumns - 1) / Tile::kColumns;
  const int64_t tile = blockIdx.x / dimension_tiles;
  const int64_t local = tile * Tile::kRows, k0 = (blockIdx.x - tile * dimension_tiles) * Tile::kColumns;
  const int64_t owners = kCenters ? block.centers : block.rows;
  const int64_t count = kCenters ? block.rows : block.centers;
  const int64_t first_owner = kCenters ? block.first_center : block.first_row;
  const int64_t first_other = kCenters ? block.first_row : block.first_center;
  const void* const owner_data = kCenters || mean ? in.centers : in.x;
  const void* const other_data = kCenters ? in.x : in.centers;
  const T shared = kDims ? T(-1) : shared_slope<T>(in);

  T own[kOwn][kOwn], sums[kOwn][kOwn], squares[kCenters ? kOwn : 1][kOwn], totals[kCenters ? kOwn : 1];
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    if constexpr (kCenters) totals[i] = T(0);
#pragma unroll
    for (int c = 0; c < kOwn; ++c) {
      const int64_t k = k0 + mine.column(c), o = mean ? 0 : first_owner + local + mine.row(i);
      const bool exists = k < in.d && local + mine.row(i) < owners;
      own[i][c] = exists ? element<T>(owner_data, in.storage, o * in.d + k) : T(0);
      if (kCenters || mean) own[i][c] = finite_or(own[i][c], T(0));
      sums[i][c] = T(0);
      if constexpr (kCenters) squares[i][c] = T(0);
    }
  }
  const int thread = static_cast<int>(threadIdx.x);
#pragma unroll 1
  for (int64_t first = 0; first < count; first += kMixtureSlice) {
    __syncthreads();
    // Neighbouring threads read what lies side by side: the centres of a row's weights.
#pragma unroll 4
    for (int e = thread; e < kMixtureSlice * Tile::kRows; e += kMixtureThreads) {
      const int other = kCenters ? e / Tile::kRows : e % kMixtureSlice;
      const int owner = kCenters ? e % Tile::kRows : e / kMixtureSlice;
      const int64_t i = kCenters ? first + other : local + owner,
                    j = kCenters ? local + owner : first + other;
      T a = T(0);
      if (i < block.rows && j < block.centers) {
        a = static_cast<const T*>(block.weights)[i * block.stride + j];
        if (!kCenters && !kDims && !mean) {
          const bool each = in.scale_kind == MixtureScale::per_center;
          a *= T(-2.0 * kLn2) * (each ? slope_of_scale(scale_of<T>(in, block.first_center + j)) : shared);
        }
      }
      weights[other][owner] = a;
    }
#pragma unroll 4
    for (int e = thread; e < kMixtureSlice * Tile::kColumns; e += kMixtureThreads) {
      const int other = e / Tile::kColumns, column = e % Tile::kColumns;
      bool exists = first + other < count && k0 + column < in.d;
      // Nothing of a row whose gradient is zero, NaN neither.
      if (kCenters && exists) exists = grad[first_other + first + other] != 0.0;
      const int64_t at = (first_other + first + other) * in.d + k0 + column;
      const T value = exists ? element<T>(other_data, in.storage, at) : T(0);
      others[other][column] = kCenters ? value : finite_or(value, T(0));
      if constexpr (kFactors) {
        const T scale = exists && !mean ? compute_element<T>(in.scale, in.storage, at) : T(1);
        factors[other][column] = T(1) / scale / scale;
      }
    }
    __syncthreads();
#pragma unroll 2
    for (int l = 0; l < kMixtureSlice; ++l) {
      T a[kOwn], z[kOwn], f[kOwn];
#pragma unroll
      for (int i = 0; i < kOwn; ++i) a[i] = weights[l][mine.row(i)];
#pragma unroll
      for (int c = 0; c < kOwn; ++c) {
        z[c] = others[l][mine.column(c)];
        if constexpr (kFactors) f[c] = factors[l][mine.column(c)];
      }
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        if constexpr (kCenters) totals[i] += a[i];
#pragma unroll
        for (int c = 0; c < kOwn; ++c) {
          const T difference = z[c] - own[i][c];
          if constexpr (kCenters) {
            const T product = a[i] * difference;
            sums[i][c] += product;
            squares[i][c] = fused(product, difference, squares[i][c]);
          } else {
            sums[i][c] = fused(a[i], kFactors ? f[c] * difference : difference, sums[i][c]);
          }
        }
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    const int64_t o = first_owner + local + mine.row(i);
    if (local + mine.row(i) >= owners) continue;
    const auto add = [&](void* to, int64_t at, T value) {
      T& kept = static_cast<T*>(to)[at];
      kept = task.first ? value : kept + value;
    };
    // The sums of rows are those of the block's rows only.
    const int64_t at = kCenters ? o : o - block.first_row;
#pragma unroll
    for (int c = 0; c < kOwn; ++c) {
      const int64_t k = k0 + mine.column(c);
      if (k >= in.d) continue;
      add(task.sums, at * in.d + k, sums[i][c]);
      if constexpr (kCenters) {
        if (task.squares) add(task.squares, at * in.d + k, squares[i][c]);
      }
    }
    if constexpr (kCenters) {
      if (k0 == 0 && mine.across == 0) add(task.totals, at, totals[i]);
    }
  }
}

// A thread an element: the sums of a block's rows, as gradients or, without `grad` and from `offset` or y_0
// on, as means.
// budget: registers 24, occupancy 100%
template <class T>
__global__ void __launch_bounds__(kMixtureThreads)
    mixture_store_kernel(const MixtureInputs in, int64_t first_row, int64_t rows, const T* sums,
                         const double* value, const double* grad, const float* offset, const int* multiplied,
                         void* to, Storage storage) {
  const int64_t e = static_cast<int64_t>(blockIdx.x) * kMixtureThreads + static_cast<int>(threadIdx.x);
  if (e >= rows * in.d || (multiplied && *multiplied)) return;
  double result = static_cast<double>(sums[e]);
  const int64_t row = first_row + e / in.d;
  if (grad) {
    if (grad[row] == 0.0) result = 0.0;
  } else {
    result += offset ? static_cast<double>(offset[e % in.d])
                     : finite_or(element<double>(in.centers, in.storage, e % in.d), 0.0);
    // No centre has a weight.
    if (value[row] == -kInfinity<double>) result = std::numeric_limits<double>::quiet_NaN();
  }
  store_element(result, to, storage, first_row * in.d + e);
}

}  // namespace refine_ext::cuda
