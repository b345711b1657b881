// Launchers of the Gaussian log-mixture.
#include "log_mixture.h"
#include "log_mixture_exact.cuh"
#include "log_mixture_gradient.cuh"
#include "log_mixture_product.cuh"
#include "log_mixture_rows.cuh"

namespace refine_ext::cuda {
namespace {

#if defined(REFINE_EXT_CUDA_ON_CPU)
// So small that small tests take several of everything.
constexpr int64_t kLeastChunk = 256, kBlockRows = 128, kBlockCenters = 128;
#else
constexpr int64_t kLeastChunk = 2048, kBlockRows = 2048, kBlockCenters = 2048;
#endif
// A few chunks are enough for any GPU; their number bounds the memory for their sums.
constexpr int64_t kMostChunks = 64;
constexpr int kFewDimensions = 4;        // that have kernels of their own
constexpr int64_t kManyDimensions = 64;  // that are multiplied

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t whole(int64_t count, int64_t of) { return ceil_div(count, of) * of; }

// Of `count` centres (or rows), by this number alone.
int64_t chunk_of(int64_t count) { return whole(ceil_div(count > 0 ? count : 1, kMostChunks), kLeastChunk); }
// Chunks get blocks of their own where tiles alone would not fill the GPU.
bool is_divided(int64_t tiles, int64_t chunks) { return chunks > 1 && tiles < 2 * multiprocessors(); }

bool in_float32(const MixtureInputs& in) { return in.storage != Storage::float64; }
bool is_small(const MixtureInputs& in) {
  return in_float32(in) && in.d <= kFewDimensions && in.scale_kind != MixtureScale::per_dimension;
}
// Whether values alone are made of products.
bool multiplies(const MixtureInputs& in) {
  return in_float32(in) && in.d >= kManyDimensions && in.scale_kind != MixtureScale::per_dimension;
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

// What the sums of a row's centres go through.
struct ForwardPlan {
  MixtureTask task;
  bool fused_mean;  // by the same kernel
  WeightBlock block;
  void* sums;
  bool divided = false;  // chunks have blocks of their own
  bool multiplied = false;
  ProductTask product{};
  bool product_divided = false;
  int64_t used;

  // direct: from differences whatever the dimension.
  ForwardPlan(const LogMixtureProblem& p, void* memory, bool direct = false)
      : task{p, 0, 0, 0, nullptr, nullptr}, block{}, sums(nullptr) {
    const MixtureInputs& in = p.in;
    const int64_t tile_rows = in_float32(in) ? PairTile<float>::kRows : PairTile<double>::kRows;
    const int64_t compute = in_float32(in) ? 4 : 8;
    Arrays arrays{memory};
    fused_mean = p.mean && is_small(in);
    task.row_tiles = ceil_div(in.m, tile_rows);
    task.chunk = chunk_of(in.n);
    task.chunks = ceil_div(in.n, task.chunk);
    if (is_divided(task.row_tiles, task.chunks)) {
      const int64_t values = is_small(in) && (p.mean || p.stats) ? in.d : 1;
      task.parts = arrays.take_bytes(
          task.chunks * in.m * static_cast<int64_t>(sizeof(MixtureState) + 8 * static_cast<size_t>(values)));
      divided = true;
    }
    if (p.mean && !fused_mean) {
      const int64_t rows = least(kBlockRows, in.m);
      block.stride = whole(least(kBlockCenters, in.n), PairTile<float>::kColumns);
      block.weights = arrays.take_bytes(rows * block.stride * compute);
      sums = arrays.take_bytes(rows * in.d * compute);
    }
    multiplied = !direct && multiplies(in) && !p.mean && !p.stats;
    if (multiplied) {
      const int64_t row_tiles = ceil_div(in.m, kProductTile), center_tiles = ceil_div(in.n, kProductTile);
      product.mixture = task;
      product.mixture.row_tiles = row_tiles;
      product.mixture.parts = nullptr;
      product_divided = is_divided(row_tiles, task.chunks);
      if (product_divided)
        product.mixture.parts =
            arrays.take_bytes(task.chunks * in.m * static_cast<int64_t>(sizeof(RowSums<0>)));
      product.slices = ceil_div(in.d, kProductSlice);
      product.rows = {arrays.take<uint4>(row_tiles * product.slices * kPiecePacks),
                      arrays.take<float>(row_tiles * kProductTile)};
      product.centers = {arrays.take<uint4>(center_tiles * product.slices * kPiecePacks),
                         arrays.take<float>(center_tiles * kProductTile)};
      product.offset = arrays.take<float>(in.d);
      product.direct = arrays.take<int>(in.m);
      task.only = product.direct;
    }
    used = arrays.used;
  }
};

void launch_product(const ForwardPlan& plan, void* stream) {
  const char* op = "log_mixture";
  const ProductTask& task = plan.product;
  const MixtureTask& mixture = task.mixture;
  const MixtureInputs& in = mixture.p.in;
  launch(op, mixture_offset_kernel, ceil_div(in.d, kMixtureThreads), kMixtureThreads, stream, in,
         const_cast<float*>(task.offset));
  for (const bool centers : {false, true}) {
    const int64_t padded = whole(centers ? in.n : in.m, kProductTile);
    launch(op, mixture_split_kernel, ceil_div(padded, kMixtureThreads / kWarp), kMixtureThreads, stream, task,
           centers, int64_t{0}, padded);
  }
  launch_with_shared(op, mixture_product_kernel,
                     mixture.row_tiles * (plan.product_divided ? mixture.chunks : 1), kProductThreads,
                     kProductShared, stream, task);
  if (plan.product_divided) {
    launch(op, mixture_product_merge_kernel, ceil_div(in.m, kMixtureThreads), kMixtureThreads, stream, task);
  }
}

template <class C, int kD, bool kDims, bool kWeighted, bool kMean, bool kStats>
void launch_rows(const ForwardPlan& plan, void* stream) {
  const char* op = "log_mixture";
  const MixtureTask& task = plan.task;
  const int64_t blocks = task.row_tiles * (plan.divided ? task.chunks : 1);
  launch(op, mixture_kernel<C, kD, kDims, kWeighted, kMean, kStats>, blocks, kMixtureThreads, stream, task);
  if (!plan.divided) return;
  launch(op, mixture_merge_kernel < kMean ? kD : 0 >, ceil_div(task.p.in.m, kMixtureThreads), kMixtureThreads,
         stream, task);
}

void launch_small(const ForwardPlan& plan, void* stream) {
  const LogMixtureProblem& p = plan.task.p;
  with_dimension(p.in.d, [&](auto dimension) {
    constexpr int kD = decltype(dimension)::value;
    if (p.stats) return launch_rows<float, kD, false, true, true, true>(plan, stream);
    with_flag(p.in.log_weights, [&](auto weighted) {
      with_flag(plan.fused_mean, [&](auto mean) {
        launch_rows<float, kD, false, decltype(weighted)::value, decltype(mean)::value, false>(plan, stream);
      });
    });
  });
}

template <class T>
void launch_weights(const char* op, const MixtureInputs& in, const RowLogarithm& rows,
                    const WeightBlock& block, void* stream) {
  const int64_t tiles = ceil_div(block.rows, PairTile<T>::kRows) * (block.stride / PairTile<T>::kColumns);
  with_flag(in.scale_kind == MixtureScale::per_dimension, [&](auto dims) {
    launch(op, mixture_weights_kernel<T, decltype(dims)::value>, tiles, kMixtureThreads, stream, in, rows,
           block);
  });
}
template <class T, bool kCenters>
void launch_sums(const char* op, const MixtureInputs& in, const double* grad, const SumsOfDifferences& task,
                 void* stream) {
  const bool mean = grad == nullptr;
  const int64_t owners = kCenters ? task.block.centers : task.block.rows;
  const int64_t tiles = ceil_div(owners, PairTile<T>::kRows) * ceil_div(in.d, PairTile<T>::kColumns);
  with_flag(in.scale_kind == MixtureScale::per_dimension && !mean, [&](auto dims) {
    launch(op, mixture_sums_kernel<T, kCenters, decltype(dims)::value>, tiles, kMixtureThreads, stream, in,
           grad, mean, task);
  });
}
template <class T>
void launch_store(const char* op, const MixtureInputs& in, const WeightBlock& block, const void* sums,
                  const RowLogarithm& rows, void* to, Storage storage, void* stream) {
  launch(op, mixture_store_kernel<T>, ceil_div(block.rows * in.d, kMixtureThreads), kMixtureThreads, stream,
         in, block.first_row, block.rows, static_cast<const T*>(sums), rows.value, rows.grad, to, storage);
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

void launch_mean(const ForwardPlan& plan, void* stream) {
  const char* op = "log_mixture";
  const LogMixtureProblem& p = plan.task.p;
  const MixtureInputs& in = p.in;
  const RowLogarithm rows{p.value, nullptr};
  with_compute(in, [&](auto tag) {
    using T = decltype(tag);
    const Storage compute = in_float32(in) ? Storage::float32 : Storage::float64;
    for_blocks(in, plan.block, [&](const WeightBlock& block) {
      launch_weights<T>(op, in, rows, block, stream);
      launch_sums<T, false>(op, in, nullptr, {block, plan.sums, nullptr, nullptr, block.first_center == 0},
                            stream);
      if (block.first_center + block.centers < in.n) return;
      launch_store<T>(op, in, block, plan.sums, rows, p.mean, compute, stream);
    });
  });
}

void launch_forward(const ForwardPlan& plan, void* stream) {
  const LogMixtureProblem& p = plan.task.p;
  if (is_small(p.in)) {
    launch_small(plan, stream);
  } else {
    if (plan.multiplied) launch_product(plan, stream);
    with_compute(p.in, [&](auto tag) {
      with_flag(p.in.scale_kind == MixtureScale::per_dimension, [&](auto dims) {
        with_flag(p.stats, [&](auto stats) {
          launch_rows<decltype(tag), 0, decltype(dims)::value, true, false, decltype(stats)::value>(plan,
                                                                                                    stream);
        });
      });
    });
    if (p.mean) launch_mean(plan, stream);
  }
  launch("log_mixture", mixture_exact_kernel, ceil_div(p.in.m, kMixtureThreads), kMixtureThreads, stream, p);
}

struct BackwardPlan {
  LogMixtureBackwardProblem p;
  LogMixtureProblem direct{};  // the values once more, or of no rows
  void* direct_memory = nullptr;
  bool centers;  // anything but x
  GradientTask of_rows, of_centers;
  WeightBlock block;
  SumsOfDifferences row_sums, center_sums;
  CenterGradients last;
  int* extremes;
  RowReference* exact_rows;
  int64_t used;

  BackwardPlan(const LogMixtureBackwardProblem& problem, void* memory)
      : p(problem),
        of_rows{},
        of_centers{},
        block{},
        row_sums{},
        center_sums{},
        last{},
        extremes(nullptr),
        exact_rows(nullptr) {
    const MixtureInputs& in = p.in;
    const int64_t compute = in_float32(in) ? 4 : 8;
    Arrays arrays{memory};
    if (multiplies(in)) {
      // A value made of products is up to kProductTolerance of itself off, which each weight would be off by:
      // only the rounding of the differences that it is made of itself cancels.
      direct.in = in;
      p.value = direct.value = arrays.take<double>(in.m);
      direct_memory = arrays.take_bytes(ForwardPlan(direct, nullptr, true).used);
    }
    centers = p.grad_centers || p.grad_scale || p.grad_log_weights;
    last.p = p;
    extremes = arrays.take<int>(2 * kExtremeBlocks);
    exact_rows = arrays.take<RowReference>(in.m);
    if (centers && p.grad_scale && in.scale_kind == MixtureScale::shared)
      last.scale_parts = arrays.take<double>(in.n);
    if (is_small(in)) {
      const auto plan = [&](int64_t owners, int64_t count, int64_t sums, bool always) {
        GradientTask task{in, {p.value, p.grad}, p.grad_x, 0, 0, 1, nullptr};
        task.tiles = ceil_div(owners, PairTile<float>::kRows);
        task.chunk = chunk_of(count);
        const int64_t chunks = ceil_div(count, task.chunk);
        if (is_divided(task.tiles, chunks)) task.parts = chunks;
        if (always || task.parts > 1) task.sums = arrays.take<double>(task.parts * owners * sums);
        return task;
      };
      if (p.grad_x) of_rows = plan(in.m, in.n, in.d, false);
      if (centers) of_centers = plan(in.n, in.m, in.d + 2, true);
      last.own = of_centers.sums;
    } else {
      const int64_t rows = least(kBlockRows, in.m);
      block.stride = whole(least(kBlockCenters, in.n), PairTile<float>::kColumns);
      block.weights = arrays.take_bytes(rows * block.stride * compute);
      if (p.grad_x) row_sums.sums = arrays.take_bytes(rows * in.d * compute);
      if (centers) {
        center_sums.sums = arrays.take_bytes(in.n * in.d * compute);
        if (p.grad_scale) center_sums.squares = arrays.take_bytes(in.n * in.d * compute);
        center_sums.totals = arrays.take_bytes(in.n * compute);
      }
      last.differences = center_sums.sums;
      last.squares = center_sums.squares;
      last.totals = center_sums.totals;
    }
    used = arrays.used;
  }
};

template <int kD, bool kCenters>
void launch_gradient(const GradientTask& task, void* stream) {
  const char* op = "log_mixture_backward";
  launch(op, mixture_gradient_kernel<kD, kCenters>, task.tiles * task.parts, kMixtureThreads, stream, task);
  if (task.parts == 1) return;
  launch(op, mixture_add_parts_kernel<kD, kCenters>,
         ceil_div(kCenters ? task.in.n : task.in.m, kMixtureThreads), kMixtureThreads, stream, task);
}

}  // namespace

int64_t log_mixture_workspace(const LogMixtureProblem& p) { return ForwardPlan(p, nullptr).used; }

void log_mixture(const LogMixtureProblem& p, void* memory, void* stream) {
  if (p.in.m > 0) launch_forward(ForwardPlan(p, memory), stream);
}

int64_t log_mixture_backward_workspace(const LogMixtureBackwardProblem& p) {
  return BackwardPlan(p, nullptr).used;
}

void log_mixture_backward(const LogMixtureBackwardProblem& problem, void* memory, void* stream) {
  const char* op = "log_mixture_backward";
  const BackwardPlan plan(problem, memory);
  const LogMixtureBackwardProblem& p = plan.p;
  const MixtureInputs& in = p.in;
  if (plan.direct.in.m > 0 && (p.grad_x || plan.centers))
    launch_forward(ForwardPlan(plan.direct, plan.direct_memory, true), stream);
  if (is_small(in)) {
    with_dimension(in.d, [&](auto dimension) {
      constexpr int kD = decltype(dimension)::value;
      if (p.grad_x) launch_gradient<kD, false>(plan.of_rows, stream);
      if (plan.centers) launch_gradient<kD, true>(plan.of_centers, stream);
    });
  } else if (p.grad_x || plan.centers) {
    with_compute(in, [&](auto tag) {
      using T = decltype(tag);
      for_blocks(in, plan.block, [&](const WeightBlock& block) {
        launch_weights<T>(op, in, {p.value, p.grad}, block, stream);
        if (p.grad_x) {
          SumsOfDifferences task = plan.row_sums;
          task.block = block;
          task.first = block.first_center == 0;
          launch_sums<T, false>(op, in, p.grad, task, stream);
          if (block.first_center + block.centers == in.n)
            launch_store<T>(op, in, block, task.sums, {p.value, p.grad}, p.grad_x, in.storage, stream);
        }
        if (plan.centers) {
          SumsOfDifferences task = plan.center_sums;
          task.block = block;
          task.first = block.first_row == 0;
          launch_sums<T, true>(op, in, p.grad, task, stream);
        }
      });
    });
  }
  if (plan.centers) {
    with_compute(in, [&](auto tag) {
      launch(op, mixture_center_gradients_kernel<decltype(tag)>, ceil_div(in.n, kMixtureThreads / kWarp),
             kMixtureThreads, stream, plan.last);
    });
  }
  if (p.grad_x || plan.centers) {
    const int* const extremes = plan.extremes;
    launch(op, mixture_extremes_kernel, kExtremeBlocks, kMixtureThreads, stream, p, plan.extremes);
    launch(op, mixture_exact_values_kernel, least(in.m, kExtremeBlocks), kMixtureThreads, stream, in,
           extremes, plan.exact_rows);
    const auto exact = [&](auto kernel, int64_t owners) {
      launch(op, kernel, least(owners, kExtremeBlocks), kMixtureThreads, stream, p, extremes,
             static_cast<const RowReference*>(plan.exact_rows), plan.last.scale_parts);
    };
    if (p.grad_x) exact(mixture_exact_gradient_kernel<false>, in.m);
    if (plan.centers) exact(mixture_exact_gradient_kernel<true>, in.n);
  }
  if (plan.centers && p.grad_scale && in.scale_kind == MixtureScale::shared) {
    launch(op, mixture_shared_scale_kernel, 1, kMaxThreads, stream, p,
           static_cast<const double*>(plan.last.scale_parts));
  }
}

}  // namespace refine_ext::cuda
