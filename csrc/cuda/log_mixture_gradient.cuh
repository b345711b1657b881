// Gradients where d is small, in registers: of a thread's rows, or, with the roles exchanged, of its centres,
// from recomputed weights. A pair takes 3 d + 5 instructions of the schedulers for the first and 3 d + 7 for
// the second, where an ex2 leaves time for 8.
#pragma once

#include "log_mixture_sums.cuh"
#include "reduce.cuh"

namespace refine_ext::cuda {

inline constexpr int kGradientStage = 256;  // of the other side, in shared memory
// From here on squared distances may overflow; pairs with such coordinates are special where they are needed.
inline constexpr float kWide = 1152921504606846976.0f;  // 2^60

struct GradientTask {
  MixtureInputs in;
  RowLogarithm rows;
  void* grad_x;                 // of rows that one block has all chunks of
  int64_t tiles, chunk, parts;  // chunk: in members of the other side; parts: blocks that share a tile
  double* sums;                 // [parts][owners][kD or kD + 2]
};

// A row whose centres are all infinitely far, or left out, has no gradient, whatever it is itself.
// budget: registers 16, occupancy 100%
__global__ void __launch_bounds__(kMixtureThreads)
    mixture_row_gradients_kernel(int64_t rows, const double* value, const double* grad, double* to) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kMixtureThreads + static_cast<int>(threadIdx.x);
  if (i < rows) to[i] = value[i] == -kInfinity<double> ? 0.0 : grad[i];
}

// What is summed over the other side: w d_k for a row, with w = p slope; a d_k, a q and a for a centre.
template <int kD, bool kCenters>
inline constexpr int kGradientSums = kCenters ? kD + 2 : kD;

template <int kD>
__device__ __forceinline__ void write_gradient(const GradientTask& task, int64_t row,
                                               const double (&sums)[kD]) {
  // d L / d x_k = sum_j p_j (y_jk - x_k) / s_j^2, and slope = -log2(e) / (2 s^2).
  const double factor = 2.0 * kLn2 * task.rows.grad[row];
#pragma unroll
  for (int k = 0; k < kD; ++k)
    store_element(factor == 0.0 ? 0.0 : factor * sums[k], task.grad_x, task.in.storage, row * kD + k);
}

// budget: registers 256 (d=2 168, d=1 168), shared 6144 (d=3 5120, d=2 4096, d=1 3072, d=4 centers 8192,
//     d=3 centers 7168, d=2 centers 6144, d=1 centers 5120), occupancy 12% (d=2 18%, d=1 18%)
template <int kD, bool kCenters>
__global__ void __launch_bounds__(kMixtureThreads, kD <= 2 ? 3 : 2)
    mixture_gradient_kernel(const GradientTask task) {
  using C = float;
  using Tile = PairTile<C>;
  constexpr int kOwn = Tile::kOwn, kColumns = Tile::kColumns, kStage = kGradientStage;
  constexpr int kSums = kGradientSums<kD, kCenters>;
  // Of the other side: a centre's slope and log-weight, or a row's logarithm, gradient, and whether its pairs
  // are special.
  REFINE_EXT_SHARED(C, others, [kD][kStage]);
  REFINE_EXT_SHARED(C, slopes, [kCenters ? 4 : kStage]);
  REFINE_EXT_SHARED(C, weights, [kCenters ? 4 : kStage]);
  REFINE_EXT_SHARED(C, highs, [kCenters ? kStage : 4]);
  REFINE_EXT_SHARED(C, lows, [kCenters ? kStage : 4]);
  REFINE_EXT_SHARED(C, grads, [kCenters ? kStage : 4]);
  REFINE_EXT_SHARED(int, specials, [kCenters ? kStage : 4]);
  const MixtureInputs& in = task.in;
  const Tile mine;
  const int64_t part = blockIdx.x / task.tiles;
  const int64_t first_owner = (blockIdx.x - part * task.tiles) * Tile::kRows;
  const int64_t owners = kCenters ? in.n : in.m, count = kCenters ? in.m : in.n;
  const void* const owner_data = kCenters ? in.centers : in.x;
  const void* const other_data = kCenters ? in.x : in.centers;
  const C shared = shared_slope<C>(in);

  C own[kD][kOwn], high[kOwn], low[kOwn], slope[kOwn], weight[kOwn];
  unsigned careful = 0;
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    const int64_t o = first_owner + mine.row(i);
    const bool exists = o < owners;
#pragma unroll
    for (int k = 0; k < kD; ++k) {
      own[k][i] = exists ? element<C>(owner_data, in.storage, o * kD + k) : C(0);
      if constexpr (kCenters) {
        own[k][i] = finite_or(own[k][i], kFar<C>);
        careful |= ::fabs(own[k][i]) < kWide ? 0u : 1u << i;
      }
    }
    high[i] = low[i] = slope[i] = weight[i] = C(0);
    if (!exists) continue;
    if constexpr (kCenters) {
      slope[i] = in.scale_kind == MixtureScale::per_center ? slope_of_scale(scale_of<C>(in, o)) : shared;
      weight[i] = log2_weight_of<C>(in, o);
    } else {
      task.rows.parts(o, high[i], low[i]);
      careful |= is_coarse(high[i]) ? 1u << i : 0u;
    }
  }

  double total[kSums] = {};
  const int64_t chunks = (count + task.chunk - 1) / task.chunk;
  const bool alone = task.parts == 1;
#pragma unroll 1
  for (int64_t chunk = alone ? 0 : part; chunk < (alone ? chunks : part + 1); ++chunk) {
    const int64_t begin = chunk * task.chunk;
    const int64_t end = begin + task.chunk < count ? begin + task.chunk : count;
    C sums[kSums][kOwn];
#pragma unroll
    for (int s = 0; s < kSums; ++s) {
#pragma unroll
      for (int i = 0; i < kOwn; ++i) sums[s][i] = C(0);
    }
#pragma unroll 1
    for (int64_t first = begin; first < end; first += kStage) {
      const int here = static_cast<int>(end - first < kStage ? end - first : kStage);
      __syncthreads();
      if constexpr (!kCenters) load_weights<C, false>(in, first, shared, slopes, weights);
#pragma unroll 1
      for (int o = static_cast<int>(threadIdx.x); o < kStage; o += kMixtureThreads) {
        const int64_t other = first + o;
        bool exists = o < here;
        // Nothing of a row whose gradient is zero, NaN neither.
        if (kCenters && exists) exists = task.rows.grad[other] != 0.0;
#pragma unroll
        for (int k = 0; k < kD; ++k) {
          others[k][o] = exists ? element<C>(other_data, in.storage, other * kD + k) : C(0);
          if constexpr (!kCenters) others[k][o] = finite_or(others[k][o], kFar<C>);
        }
        if constexpr (kCenters) {
          highs[o] = -kInfinity<C>;
          lows[o] = grads[o] = C(0);
          specials[o] = 1;
          if (!exists) continue;
          C row_high, row_low;
          task.rows.parts(other, row_high, row_low);
          highs[o] = row_high;
          lows[o] = row_low;
          grads[o] = task.rows.gradient<C>(other);
          const int64_t place = (in.exclude ? in.exclude[other] : int64_t{-1}) - first_owner;
          bool special = is_coarse(row_high) || (place >= 0 && place < Tile::kRows);
#pragma unroll
          for (int k = 0; k < kD; ++k) special |= !(::fabs(others[k][o]) < kWide);
          specials[o] = special;
        }
      }
      __syncthreads();
      unsigned near = 0;
      const auto excluding = [&](int64_t from, int columns) {
        unsigned rows = 0;
#pragma unroll
        for (int i = 0; i < kOwn; ++i) {
          const int64_t row = first_owner + mine.row(i);
          const int64_t place = (in.exclude && row < in.m ? in.exclude[row] : int64_t{-1}) - from;
          rows |= place >= 0 && place < columns ? 1u << i : 0u;
        }
        return rows;
      };
      if constexpr (!kCenters) {
        if (in.exclude) near = excluding(first, kStage);
      }
#pragma unroll 1
      for (int step = 0; step < here; step += kColumns) {
        C y[kD][kOwn], first_of[kOwn], second_of[kOwn], third_of[kOwn];
        unsigned special = careful | (here - step < kColumns ? 1u : 0u);
        if (near) special |= excluding(first + step, kColumns);
#pragma unroll
        for (int c = 0; c < kOwn; ++c) {
          const int column = step + mine.column(c);
#pragma unroll
          for (int k = 0; k < kD; ++k) y[k][c] = others[k][column];
          first_of[c] = kCenters ? highs[column] : slopes[column];
          second_of[c] = kCenters ? lows[column] : weights[column];
          third_of[c] = kCenters ? grads[column] : C(0);
          if constexpr (kCenters) special |= static_cast<unsigned>(specials[column]);
        }
        const auto add_pairs = [&](auto is_special) {
#pragma unroll
          for (int i = 0; i < kOwn; ++i) {
            if constexpr (decltype(is_special)::value) {
#pragma unroll
              for (int k = 0; k < kD; ++k) forget(own[k][i]);
            }
#pragma unroll
            for (int c = 0; c < kOwn; ++c) {
              C z[kD], q = C(0);
#pragma unroll
              for (int k = 0; k < kD; ++k) {
                // The forward's operations, x - y, so that the weights are the forward's.
                z[k] = kCenters ? y[k][c] - own[k][i] : own[k][i] - y[k][c];
                q = k == 0 ? z[k] * z[k] : fused(z[k], z[k], q);
              }
              const C s = kCenters ? slope[i] : first_of[c], w = kCenters ? weight[i] : second_of[c];
              const C h = kCenters ? first_of[c] : high[i], l = kCenters ? second_of[c] : low[i];
              C p;
              if constexpr (decltype(is_special)::value) {
                const int place = step + mine.column(c);
                const int64_t owner = first_owner + mine.row(i), other = first + place;
                const int64_t row = kCenters ? other : owner, center = kCenters ? owner : other;
                const bool out =
                    place >= here || owner >= owners || (in.exclude && in.exclude[row] == center);
                p = out            ? C(0)
                    : is_coarse(h) ? coarse_weight(q, s, w, h, l)
                                   : power_of_two(exponent(q, s, w, h) - l);
              } else {
                p = power_of_two(exponent(q, s, w, h) - l);
              }
              const C a = p * (kCenters ? third_of[c] : s);
#pragma unroll
              for (int k = 0; k < kD; ++k) sums[k][i] = fused(a, z[k], sums[k][i]);
              if constexpr (kCenters) {
                const C square = decltype(is_special)::value && a == C(0) ? C(0) : q;
                sums[kD][i] = fused(a, square, sums[kD][i]);
                sums[kD + 1][i] += a;
              }
            }
          }
        };
        if (special) {
          add_pairs(std::true_type{});
        } else {
          add_pairs(std::false_type{});
        }
      }
    }
    // Eight threads share an owner; the sums of each are added to the first's in their order, in all alike.
#pragma unroll 1
    for (int distance = 1; distance < kMixtureAcross; distance *= 2) {
      const bool second = mine.across & distance;
#pragma unroll
      for (int s = 0; s < kSums; ++s) {
#pragma unroll
        for (int i = 0; i < kOwn; ++i) {
          const C from = __shfl_xor_sync(kFullMask, sums[s][i], distance);
          sums[s][i] = second ? from + sums[s][i] : sums[s][i] + from;
        }
      }
    }
#pragma unroll
    for (int s = 0; s < kSums; ++s) {
#pragma unroll
      for (int i = 0; i < kOwn; ++i) total[s] += mine.across == i ? static_cast<double>(sums[s][i]) : 0.0;
    }
  }
  const int64_t o = first_owner + mine.row(mine.across);
  if (o >= owners) return;
  if (!kCenters && alone) {
    if constexpr (!kCenters) write_gradient<kD>(task, o, total);
  } else {
#pragma unroll
    for (int s = 0; s < kSums; ++s) task.sums[(part * owners + o) * kSums + s] = total[s];
  }
}

// A thread an owner: the parts' sums in their order; a centre's are left in the first part.
// budget: registers 32, occupancy 100%
template <int kD, bool kCenters>
__global__ void __launch_bounds__(kMixtureThreads) mixture_add_parts_kernel(const GradientTask task) {
  constexpr int kSums = kGradientSums<kD, kCenters>;
  const int64_t owners = kCenters ? task.in.n : task.in.m;
  const int64_t o = static_cast<int64_t>(blockIdx.x) * kMixtureThreads + static_cast<int>(threadIdx.x);
  if (o >= owners) return;
  double total[kSums] = {};
  for (int64_t part = 0; part < task.parts; ++part) {
#pragma unroll
    for (int s = 0; s < kSums; ++s) total[s] += task.sums[(part * owners + o) * kSums + s];
  }
  if constexpr (kCenters) {
#pragma unroll
    for (int s = 0; s < kSums; ++s) task.sums[o * kSums + s] = total[s];
  } else {
    write_gradient<kD>(task, o, total);
  }
}

// The gradients of centres, scales and log-weights from the sums of each centre, found in either of the two
// forms: of `own` next to each other in float64, or of arrays in the compute type.
struct CenterGradients {
  LogMixtureBackwardProblem p;
  const double* own;                           // [n][d + 2], or nullptr:
  const void *differences, *squares, *totals;  // [n][d], [n][d], [n]
  double* scale_parts;                         // [n], for a scale that all share
  // Where they may be sums of products: whether they are, sum_i a_ij x'_i instead of differences, and [n] of
  // squares; x' is from the offset on, and the former with the factor 1 / s^2 or without.
  const int* multiplied;
  const float *offset, *square_sums;
  bool factored;
};

// A warp a centre.
// budget: registers 64 (float32 56), occupancy 50% (float32 56%)
template <class T>
__global__ void __launch_bounds__(kMixtureThreads)
    mixture_center_gradients_kernel(const CenterGradients task) {
  const LogMixtureBackwardProblem& p = task.p;
  const MixtureInputs& in = p.in;
  const Team team = my_team({kWarp, 1});
  const int64_t j = team.row;
  if (j >= in.n) return;
  const Storage compute = sizeof(T) == 8 ? Storage::float64 : Storage::float32;
  const bool per_dimension = in.scale_kind == MixtureScale::per_dimension;
  const bool multiplied = sizeof(T) == 4 && task.multiplied && *task.multiplied;
  double squares[1] = {0.0}, scale = per_dimension ? 1.0 : scale_of<double>(in, j), factor = 1.0;
  if (multiplied && task.factored)
    factor = static_cast<double>(weight_factor(slope_of_scale(static_cast<float>(scale))));
  for (int64_t k = team.rank; k < in.d; k += kWarp) {
    const int64_t at = j * in.d + k;
    if (per_dimension) scale = compute_element<double>(in.scale, in.storage, at);
    double difference = task.own ? task.own[j * (in.d + 2) + k]
                                 : static_cast<double>(static_cast<const T*>(task.differences)[at]);
    if (multiplied) {
      const double from = static_cast<double>(task.offset[k]);
      const double y =
          static_cast<float>(finite_or(element<double>(in.centers, in.storage, at), from) - from);
      difference = difference / factor - static_cast<double>(static_cast<const T*>(task.totals)[j]) * y;
    }
    if (p.grad_centers) store_element(difference / scale / scale, p.grad_centers, in.storage, at);
    if (!p.grad_scale || task.own || multiplied) continue;
    const double square = static_cast<double>(static_cast<const T*>(task.squares)[at]);
    if (per_dimension) store_element(square / scale / scale / scale, p.grad_scale, compute, at);
    squares[0] += square;
  }
  reduce_warp<Sum>(squares);
  if (team.rank > 0) return;
  if (multiplied && p.grad_scale) squares[0] = static_cast<double>(task.square_sums[j]);
  if (p.grad_log_weights) {
    const double total = task.own ? task.own[j * (in.d + 2) + in.d + 1]
                                  : static_cast<double>(static_cast<const T*>(task.totals)[j]);
    store_element(total, p.grad_log_weights, compute, j);
  }
  if (!p.grad_scale || per_dimension) return;
  const double square = (task.own ? task.own[j * (in.d + 2) + in.d] : squares[0]) / scale / scale / scale;
  if (in.scale_kind == MixtureScale::shared) {
    task.scale_parts[j] = square;
  } else {
    store_element(square, p.grad_scale, compute, j);
  }
}

// One block: the gradient of a scale that all centres share.
// budget: registers 32, shared 128, occupancy 100%
__global__ void __launch_bounds__(kMaxThreads)
    mixture_shared_scale_kernel(const LogMixtureBackwardProblem p, const double* parts) {
  const Team team = my_team({kMaxThreads, 1});
  double sum[1] = {0.0};
  for (int64_t j = team.rank; j < p.in.n; j += kMaxThreads) sum[0] += parts[j];
  reduce<Sum>(team, sum);
  const Storage compute = p.in.storage == Storage::float64 ? Storage::float64 : Storage::float32;
  if (team.rank == 0) store_element(sum[0], p.grad_scale, compute, 0);
}

}  // namespace refine_ext::cuda
