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
  bool multiplied = false;  // values are made of products
  ProductTask product{};
  // What a mean is summed of on the tensor cores.
  SumsOfProducts products{};
  ProductOperand centers{};
  float* offset = nullptr;
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
      const int64_t sums_of = least(kBlockRows, in.m) * in.d;
      block = block_of(in, multiplies(in), arrays);
      sums = arrays.take_bytes(sums_of * compute);
      if (multiplies(in)) {
        centers = operand_of(in, in.n, arrays);
        offset = arrays.take<float>(in.d);
        products.others = centers.pieces;
        products.parts = arrays.take<float>(sum_parts(in.d) * sums_of);
        products.sums = static_cast<float*>(sums);
      }
    }
    multiplied = !direct && multiplies(in) && !p.mean && !p.stats;
    if (multiplied) {
      const int64_t row_tiles = ceil_div(in.m, kProductTile);
      product.mixture = task;
      product.mixture.row_tiles = row_tiles;
      product.mixture.parts = nullptr;
      if (is_divided(row_tiles, task.chunks))
        product.mixture.parts =
            arrays.take_bytes(task.chunks * in.m * static_cast<int64_t>(sizeof(RowSums<0>)));
      product.slices = ceil_div(in.d, kProductSlice);
      product.rows = operand_of(in, in.m, arrays);
      product.centers = operand_of(in, in.n, arrays);
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
  launch_offset(op, in, const_cast<float*>(task.offset), stream);
  launch_split(op, in, nullptr, task.offset, false, task.rows, stream);
  launch_split(op, in, nullptr, task.offset, true, task.centers, stream);
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
  const bool multiplied = plan.offset != nullptr;
  if (multiplied) {
    launch_offset(op, in, plan.offset, stream);
    launch_split(op, in, nullptr, plan.offset, true, plan.centers, stream);
  }
  for_blocks(in, plan.block, [&](const WeightBlock& block) {
    const bool first = block.first_center == 0;
    launch_weights(op, in, rows, block, multiplied, stream);
    if (multiplied) {
      SumsOfProducts task = plan.products;
      task.first = first;
      launch_product_sums(op, in, false, block, task, stream);
    } else {
      launch_sums(op, in, false, nullptr, {block, plan.sums, nullptr, nullptr, first}, stream);
    }
    if (block.first_center + block.centers < in.n) return;
    launch_store(op, in, block, plan.sums, rows, plan.offset, p.mean, compute, stream);
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
