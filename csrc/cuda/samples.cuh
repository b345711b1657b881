// How a block walks over the samples of a row: packs of 16 bytes, the next ones on their way while these are
// computed. Single samples where the row's ends are not aligned, and everywhere if its inputs are not
// misaligned alike. The formulas come as an `op`:
//
//   void op.run(const C (&x)[N][kInputs], C (&y)[N])   takes N samples at a time, or
//   C op.sample(const C* x)                            one; the result is written if there is an output
//   void op.flush()                                    moves partial sums from C to float64, every 8 samples
#pragma once

#include "storage.cuh"

namespace refine_ext::cuda {

// Which threads work on which row. A row is cut into `parts`, each for a team of `team` threads: one warp,
// several of which share a block, or a whole block.
struct Layout {
  int team;
  int64_t parts;
};

struct Team {
  int rank;   // in [0, size)
  int size;   // kWarp, or the block
  int index;  // among the teams of the block
  int64_t row;
  int64_t part;
  int64_t first;   // of the threads that share the row: this one's rank,
  int64_t stride;  // and their number
};

__device__ __forceinline__ Team my_team(const Layout& layout) {
  const int in_block = static_cast<int>(threadIdx.x) / layout.team;
  const int64_t teams = blockDim.x / static_cast<unsigned>(layout.team);
  const int64_t index = static_cast<int64_t>(blockIdx.x) * teams + in_block;
  Team team;
  team.size = layout.team;
  team.index = in_block;
  team.rank = static_cast<int>(threadIdx.x) - in_block * layout.team;
  team.row = layout.parts == 1 ? index : index / layout.parts;
  team.part = layout.parts == 1 ? 0 : index - team.row * layout.parts;
  team.first = team.part * team.size + team.rank;
  team.stride = layout.parts * team.size;
  return team;
}

// The base of every op: nothing to flush.
struct Pass {
  __device__ __forceinline__ void flush() {}
};

template <class Op, class C, int N, int K>
__device__ __forceinline__ void run(Op& op, const C (&x)[N][K], C (&y)[N]) {
  if constexpr (requires { op.run(x, y); }) {
    op.run(x, y);
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) y[i] = op.sample(x[i]);
  }
}

// kAhead packs of each input are on their way while as many are computed. The last of several inputs may be
// nullptr, for a row of ones.
template <int kAhead, bool kWrite, int kInputs, class C, class T, class Op>
__device__ __forceinline__ void for_samples(const T* const (&in)[kInputs], T* out, int64_t n,
                                            const Team& team, Op& op) {
  constexpr int kWidth = kLanes<T>;
  const auto given = [&](int k) { return kInputs == 1 || k + 1 < kInputs || in[k]; };
  const int64_t misaligned = static_cast<int64_t>((reinterpret_cast<uintptr_t>(in[0]) % 16) / sizeof(T));
  const int64_t before = misaligned == 0 ? 0 : kWidth - misaligned;
  const int64_t head = before < n ? before : n;
  [[maybe_unused]] const bool out_aligned = kWrite && is_aligned(out + head);
  bool packed = true;
#pragma unroll
  for (int k = 0; k < kInputs; ++k) packed = packed && (!given(k) || is_aligned(in[k] + head));
  const int64_t packs = packed ? (n - head) / kWidth : 0, inside = packs * kWidth;

  for (int64_t edge = team.first; edge < n - inside; edge += team.stride) {
    const int64_t i = edge < head ? edge : edge + inside;
    C x[1][kInputs], y[1];
#pragma unroll
    for (int k = 0; k < kInputs; ++k) x[0][k] = given(k) ? static_cast<C>(widen(in[k][i])) : C(1);
    run(op, x, y);
    if constexpr (kWrite) narrow(y[0], out[i]);
    op.flush();
  }

  if (team.first >= packs) return;
  // 32 bits count the packs of one thread.
  int left = static_cast<int>((packs - team.first - 1) / team.stride) + 1;
  const uint4* from[kInputs];
#pragma unroll
  for (int k = 0; k < kInputs; ++k) {
    from[k] = given(k) ? reinterpret_cast<const uint4*>(in[k] + head) + team.first : nullptr;
  }
  [[maybe_unused]] T* to = kWrite ? out + head + team.first * kWidth : nullptr;
  uint4 next[kAhead][kInputs];
  const auto fetch = [&](int u) {
#pragma unroll
    for (int k = 0; k < kInputs; ++k) {
      if (given(k)) next[u][k] = from[k][u * team.stride];
    }
  };
#pragma unroll
  for (int u = 0; u < kAhead; ++u) {
    if (u < left) fetch(u);
  }
  const auto unpack = [&](int u, C(*x)[kInputs]) {
#pragma unroll
    for (int k = 0; k < kInputs; ++k) {
      T lanes[kWidth];
      memcpy(lanes, &next[u][k], sizeof(uint4));
#pragma unroll
      for (int lane = 0; lane < kWidth; ++lane) {
        x[lane][k] = given(k) ? static_cast<C>(widen(lanes[lane])) : C(1);
      }
    }
  };
  const auto store = [&](int u, const C* y) {
    if constexpr (kWrite) {
      T lanes[kWidth];
#pragma unroll
      for (int lane = 0; lane < kWidth; ++lane) narrow(y[lane], lanes[lane]);
      store_pack(to + u * team.stride * kWidth, out_aligned, lanes);
    }
  };
#pragma unroll 1
  for (; left >= kAhead; left -= kAhead) {
    C x[kAhead * kWidth][kInputs], y[kAhead * kWidth];
#pragma unroll
    for (int k = 0; k < kInputs; ++k) {
      if (given(k)) from[k] += kAhead * team.stride;
    }
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      unpack(u, x + u * kWidth);
      if (left > kAhead + u) fetch(u);
    }
    run(op, x, y);
#pragma unroll
    for (int u = 0; u < kAhead; ++u) store(u, y + u * kWidth);
    if constexpr (kWrite) to += kAhead * team.stride * kWidth;
    op.flush();
  }
#pragma unroll
  for (int u = 0; u + 1 < kAhead; ++u) {
    if (u >= left) break;
    C x[kWidth][kInputs], y[kWidth];
    unpack(u, x);
    run(op, x, y);
    store(u, y);
    op.flush();
  }
}

}  // namespace refine_ext::cuda
