// How a block walks over the samples of a row: packs of 16 bytes, the next ones on their way while these are
// computed, and single samples where the row's ends are not aligned. The formulas come as an `op`:
//
//   void op.inspect(const C* x)    sees every sample of a pack (at most 16 bytes of them),
//   void op.prepare()              then comes this,
//   C op.sample(const C* x)        then each sample again; the result is written if there is an output
//   void op.flush()                moves the pack's partial sums from C to float64
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

// The base of every op: nothing to inspect, nothing to flush.
struct Pass {
  template <class C>
  __device__ __forceinline__ void inspect(const C*) {}
  __device__ __forceinline__ void prepare() {}
  __device__ __forceinline__ void flush() {}
};

// kAhead packs of each input are on their way while as many are computed. in[k] == nullptr stands for a row
// of ones.
template <int kAhead, bool kWrite, int kInputs, class C, class T, class Op>
__device__ __forceinline__ void for_samples(const T* const (&in)[kInputs], T* out, int64_t n,
                                            const Team& team, Op& op) {
  constexpr int kWidth = kLanes<T>;
  const int64_t misaligned = static_cast<int64_t>((reinterpret_cast<uintptr_t>(in[0]) % 16) / sizeof(T));
  const int64_t before = misaligned == 0 ? 0 : kWidth - misaligned;
  const int64_t head = before < n ? before : n;
  const int64_t packs = (n - head) / kWidth, tail = head + packs * kWidth;

  // Fewer edges than a warp has threads.
  if (team.first < head + (n - tail)) {
    const int64_t i = team.first < head ? team.first : tail + (team.first - head);
    C x[kInputs];
#pragma unroll
    for (int k = 0; k < kInputs; ++k) x[k] = in[k] ? static_cast<C>(widen(in[k][i])) : C(1);
    op.inspect(x);
    op.prepare();
    const C value = op.sample(x);
    if constexpr (kWrite) narrow(value, out[i]);
    op.flush();
  }

  bool aligned[kInputs];
#pragma unroll
  for (int k = 0; k < kInputs; ++k) aligned[k] = is_aligned(in[k] + head);
  [[maybe_unused]] const bool out_aligned = kWrite && is_aligned(out + head);

  const auto fetch = [&](int64_t pack, uint4(&raw)[kInputs]) {
#pragma unroll
    for (int k = 0; k < kInputs; ++k) {
      if (in[k]) raw[k] = load_pack(in[k] + head + pack * kWidth, aligned[k]);
    }
  };
  const auto process = [&](int64_t pack, const uint4(&raw)[kInputs]) {
    T lanes[kInputs][kWidth], results[kWidth];
    C x[kWidth][kInputs];
#pragma unroll
    for (int k = 0; k < kInputs; ++k) memcpy(lanes[k], &raw[k], sizeof(uint4));
#pragma unroll
    for (int lane = 0; lane < kWidth; ++lane) {
#pragma unroll
      for (int k = 0; k < kInputs; ++k) x[lane][k] = in[k] ? static_cast<C>(widen(lanes[k][lane])) : C(1);
      op.inspect(x[lane]);
    }
    op.prepare();
#pragma unroll
    for (int lane = 0; lane < kWidth; ++lane) {
      const C value = op.sample(x[lane]);
      if constexpr (kWrite) narrow(value, results[lane]);
    }
    if constexpr (kWrite) store_pack(out + head + pack * kWidth, out_aligned, results);
    op.flush();
  };

  const int64_t step = team.stride * kAhead;
  int64_t pack = team.first;
  uint4 next[kAhead][kInputs], current[kAhead][kInputs];
#pragma unroll
  for (int u = 0; u < kAhead; ++u) {
    if (pack + u * team.stride < packs) fetch(pack + u * team.stride, next[u]);
  }
  while (pack < packs) {
    const int64_t at = pack;
    memcpy(current, next, sizeof(next));
    pack += step;
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      if (pack + u * team.stride < packs) fetch(pack + u * team.stride, next[u]);
    }
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      if (at + u * team.stride < packs) process(at + u * team.stride, current[u]);
    }
  }
}

}  // namespace refine_ext::cuda
