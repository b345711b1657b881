// Which kernels a Gaussian log-mixture gets, where their memory is, and how the launches are divided among
// files that the build compiles side by side.
#pragma once

#include <type_traits>

#include "log_mixture_rows.cuh"
#include "log_mixture_sums.cuh"

namespace refine_ext::cuda {

#if defined(REFINE_EXT_CUDA_ON_CPU)
// So small that small tests take several of everything.
inline constexpr int64_t kLeastChunk = 256, kBlockRows = 256, kBlockCenters = 256, kSumBlocks = 4;
#else
inline constexpr int64_t kLeastChunk = 2048, kBlockRows = 2048, kBlockCenters = 2048, kSumBlocks = 128;
#endif
// A few chunks are enough for any GPU; their number bounds the memory for their sums.
inline constexpr int64_t kMostChunks = 64;
inline constexpr int kFewDimensions = 4;        // that have kernels of their own
inline constexpr int64_t kManyDimensions = 64;  // that are multiplied

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t whole(int64_t count, int64_t of) { return ceil_div(count, of) * of; }

// Of `count` centres (or rows), by this number alone.
inline int64_t chunk_of(int64_t count) {
  return whole(ceil_div(count > 0 ? count : 1, kMostChunks), kLeastChunk);
}
// Chunks get blocks of their own where tiles alone would not fill the GPU.
inline bool is_divided(int64_t tiles, int64_t chunks) { return chunks > 1 && tiles < 2 * multiprocessors(); }

inline bool in_float32(const MixtureInputs& in) { return in.storage != Storage::float64; }
inline bool is_small(const MixtureInputs& in) {
  return in_float32(in) && in.d <= kFewDimensions && in.scale_kind != MixtureScale::per_dimension;
}
// Whether values alone are made of products, and the sums of means and gradients.
inline bool multiplies(const MixtureInputs& in) {
  return in_float32(in) && in.d >= kManyDimensions && in.scale_kind != MixtureScale::per_dimension;
}
// Blocks that share a tile of sums on the tensor cores, so that kSumBlocks have something to do.
inline int64_t sum_parts(int64_t d) {
  const int64_t parts = kSumBlocks / (kBlockRows / kProductTile * ceil_div(d, kProductTile));
  return parts > 0 ? parts : 1;
}

template <class F>
void with_compute(const MixtureInputs& in, F&& f) {
  if (in_float32(in)) return f(float{});
  f(double{});
}
template <class F>
void with_flag(bool flag, F&& f) {
  if (flag) return f(std::true_type{});
  f(std::false_type{});
}
template <class F>
void with_dimension(int64_t d, F&& f) {
  switch (d) {
    case 1:
      return f(std::integral_constant<int, 1>{});
    case 2:
      return f(std::integral_constant<int, 2>{});
    case 3:
      return f(std::integral_constant<int, 3>{});
    default:
      return f(std::integral_constant<int, 4>{});
  }
}

// Arrays of a workspace one after the other, each on a 16-byte boundary; without memory it only counts.
struct Arrays {
  void* memory;
  int64_t used = 0;

  template <class T>
  T* take(int64_t count) {
    T* const array = memory && count > 0 ? reinterpret_cast<T*>(static_cast<char*>(memory) + used) : nullptr;
    used += whole(count * static_cast<int64_t>(sizeof(T)), 16);
    return array;
  }
  void* take_bytes(int64_t bytes) { return take<char>(bytes); }
};

// The memory of a block, whose weights are for the tensor cores (parts) or in the compute type.
inline WeightBlock block_of(const MixtureInputs& in, bool parts, Arrays& arrays) {
  WeightBlock block{};
  const int64_t rows = least(kBlockRows, in.m), centers = least(kBlockCenters, in.n);
  block.stride = whole(centers, parts ? kProductTile : PairTile<float>::kColumns);
  block.weights = parts ? arrays.take_bytes(whole(rows, kProductTile) * block.stride * kProductParts * 2)
                        : arrays.take_bytes(rows * block.stride * (in_float32(in) ? 4 : 8));
  return block;
}

// An array of rows or centres in parts.
inline ProductOperand operand_of(const MixtureInputs& in, int64_t count, Arrays& arrays) {
  const int64_t tiles = ceil_div(count, kProductTile), slices = ceil_div(in.d, kProductSlice);
  return {arrays.take<uint4>(tiles * slices * kPiecePacks), arrays.take<float>(tiles * kProductTile),
          nullptr};
}

// f(block) for the blocks of all pairs, those of the same rows one after the other.
template <class F>
void for_blocks(const MixtureInputs& in, WeightBlock block, F&& f) {
  // Once without rows too, so that sums are zero.
  for (block.first_row = 0; block.first_row == 0 || block.first_row < in.m; block.first_row += kBlockRows) {
    block.rows = least(kBlockRows, in.m - block.first_row);
    for (block.first_center = 0; block.first_center < in.n; block.first_center += kBlockCenters) {
      block.centers = least(kBlockCenters, in.n - block.first_center);
      f(block);
    }
  }
}

// log_mixture_small.cu: the rows' sums where is_small.
void launch_small(const MixtureTask& task, void* stream);

// log_mixture.cu: the sums of chunks that had blocks of their own; of so many dimensions of a mean.
void launch_merge(const MixtureTask& task, int64_t mean_dimension, void* stream);

template <class C, int kD, bool kDims, bool kWeighted, bool kMean, bool kStats>
void launch_rows(const MixtureTask& task, void* stream) {
  launch("log_mixture", mixture_kernel<C, kD, kDims, kWeighted, kMean, kStats>,
         task.row_tiles * (task.parts ? task.chunks : 1), kMixtureThreads, stream, task);
  if (task.parts) launch_merge(task, kMean ? kD : 0, stream);
}

// log_mixture.cu: values from differences whatever the dimension.
int64_t direct_values_workspace(const MixtureInputs& in);
void launch_direct_values(const MixtureInputs& in, double* value, void* memory, void* stream);

// Sums over a block's rows, or centres, on the tensor cores, added to what is there unless it is the first.
struct SumsOfProducts {
  const uint4* others;      // all of them, in parts
  float* parts;             // [sum_parts][owners][d], working memory
  float* sums;              // [owners][d]
  float *totals, *squares;  // [owners] of the weights, and with the squared distances, or nullptr
  bool first;
};

// log_mixture_sums.cu. Without grad: means, by rows only. parts: weights for the tensor cores.
void launch_weights(const char* op, const MixtureInputs& in, const RowLogarithm& rows,
                    const WeightBlock& block, bool parts, void* stream);
void launch_sums(const char* op, const MixtureInputs& in, bool centers, const double* grad,
                 const SumsOfDifferences& task, void* stream);
void launch_store(const char* op, const MixtureInputs& in, const WeightBlock& block, const void* sums,
                  const RowLogarithm& rows, const float* offset, void* to, Storage storage, void* stream);
// About the middle of the centres; rows (but those whose `grad` is zero) or centres in parts, this offset
// subtracted; whether gradients are made of them; sums; gradients of rows from the sums.
void launch_offset(const char* op, const MixtureInputs& in, float* offset, void* stream);
void launch_split(const char* op, const MixtureInputs& in, const double* grad, const float* offset,
                  bool centers, const ProductOperand& to, void* stream);
void launch_choice(const char* op, const MixtureInputs& in, const ProductOperand& rows,
                   const ProductOperand& centers, int* multiplied, void* stream);
void launch_product_sums(const char* op, const MixtureInputs& in, bool centers, const WeightBlock& block,
                         const SumsOfProducts& of, void* stream);
void launch_product_store(const char* op, const MixtureInputs& in, const WeightBlock& block,
                          const float* offset, const SumsOfProducts& of, const double* grad, void* to,
                          void* stream);

// log_mixture_exact.cu: once more what the compute type could not hold. scale_parts: [n], of a scale that all
// centres share.
void launch_exact(const LogMixtureProblem& p, void* stream);
int64_t exact_gradients_workspace(const MixtureInputs& in);
void launch_exact_gradients(const LogMixtureBackwardProblem& p, double* scale_parts, void* memory,
                            void* stream);

}  // namespace refine_ext::cuda
