// The Gaussian log-mixture: values, posterior means and statistics.
#include "hopper.h"
#include "log_mixture.h"
#include "log_mixture_hopper.cuh"
#include "log_mixture_launch.cuh"
#include "log_mixture_product.cuh"

namespace refine_ext::cuda {
namespace {

// What the sums of a row's centres go through.
struct ForwardPlan {
  MixtureTask task;
  WeightBlock block;
  void* sums;
  bool multiplied = false;
  ProductTask product{};
  int64_t used;

  // direct: from differences whatever the dimension.
  ForwardPlan(const LogMixtureProblem& p, void* memory, bool direct = false)
      : task{p, 0, 0, 0, nullptr, nullptr}, block{}, sums(nullptr) {
    const MixtureInputs& in = p.in;
    const int64_t tile_rows = in_float32(in) ? PairTile<float>::kRows : PairTile<double>::kRows;
    const int64_t compute = in_float32(in) ? 4 : 8;
    Arrays arrays{memory};
    task.row_tiles = ceil_div(in.m, tile_rows);
    task.chunk = chunk_of(in.n);
    task.chunks = ceil_div(in.n, task.chunk);
    if (is_divided(task.row_tiles, task.chunks)) {
      const int64_t values = is_small(in) && (p.mean || p.stats) ? in.d : 1;
      task.parts = arrays.take_bytes(
          task.chunks * in.m * static_cast<int64_t>(sizeof(MixtureState) + 8 * static_cast<size_t>(values)));
    }
    if (p.mean && !is_small(in)) {
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
      if (is_divided(row_tiles, task.chunks))
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

void launch_products(const char* op, const ProductTask& task, void* stream) {
  const int64_t blocks = task.mixture.row_tiles * (task.mixture.parts ? task.mixture.chunks : 1);
  if constexpr (kHopperIsBuilt) {
    if (use_hopper()) return launch_hopper_products(op, task, blocks, stream);
  }
  launch_with_shared(op, mixture_product_kernel, blocks, kProductThreads, kProductBytes<WarpProducts>, stream,
                     task);
}

void launch_multiplied(const ForwardPlan& plan, void* stream) {
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
  launch_products(op, task, stream);
  if (mixture.parts) {
    launch(op, mixture_product_merge_kernel, ceil_div(in.m, kMixtureThreads), kMixtureThreads, stream, task);
  }
}

void launch_mean(const ForwardPlan& plan, void* stream) {
  const char* op = "log_mixture";
  const LogMixtureProblem& p = plan.task.p;
  const MixtureInputs& in = p.in;
  const RowLogarithm rows{p.value, nullptr};
  const Storage compute = in_float32(in) ? Storage::float32 : Storage::float64;
  for_blocks(in, plan.block, [&](const WeightBlock& block) {
    launch_weights(op, in, rows, block, stream);
    launch_sums(op, in, false, nullptr, {block, plan.sums, nullptr, nullptr, block.first_center == 0},
                stream);
    if (block.first_center + block.centers < in.n) return;
    launch_store(op, in, block, plan.sums, rows, p.mean, compute, stream);
  });
}

void launch_forward(const ForwardPlan& plan, void* stream) {
  const LogMixtureProblem& p = plan.task.p;
  if (is_small(p.in)) {
    launch_small(plan.task, stream);
  } else {
    if (plan.multiplied) launch_multiplied(plan, stream);
    with_compute(p.in, [&](auto tag) {
      with_flag(p.in.scale_kind == MixtureScale::per_dimension, [&](auto dims) {
        with_flag(p.stats, [&](auto stats) {
          launch_rows<decltype(tag), 0, decltype(dims)::value, true, false, decltype(stats)::value>(plan.task,
                                                                                                    stream);
        });
      });
    });
    if (p.mean) launch_mean(plan, stream);
  }
  launch_exact(p, stream);
}

}  // namespace

void launch_merge(const MixtureTask& task, int64_t mean_dimension, void* stream) {
  const char* op = "log_mixture";
  const int64_t blocks = ceil_div(task.p.in.m, kMixtureThreads);
  if (mean_dimension == 0) return launch(op, mixture_merge_kernel<0>, blocks, kMixtureThreads, stream, task);
  with_dimension(mean_dimension, [&](auto dimension) {
    launch(op, mixture_merge_kernel<decltype(dimension)::value>, blocks, kMixtureThreads, stream, task);
  });
}

int64_t direct_values_workspace(const MixtureInputs& in) {
  return ForwardPlan({in, nullptr, nullptr, nullptr, nullptr}, nullptr, true).used;
}

void launch_direct_values(const MixtureInputs& in, double* value, void* memory, void* stream) {
  launch_forward(ForwardPlan({in, value, nullptr, nullptr, nullptr}, memory, true), stream);
}

int64_t log_mixture_workspace(const LogMixtureProblem& p) { return ForwardPlan(p, nullptr).used; }

void log_mixture(const LogMixtureProblem& p, void* memory, void* stream) {
  if (p.in.m > 0) launch_forward(ForwardPlan(p, memory), stream);
}

}  // namespace refine_ext::cuda
