// Gradients of the Gaussian log-mixture.
#include "log_mixture.h"
#include "log_mixture_gradient.cuh"
#include "log_mixture_launch.cuh"

namespace refine_ext::cuda {
namespace {

struct BackwardPlan {
  LogMixtureBackwardProblem p;
  const double* given;  // p.grad as it came; p has that of the rows with a centre
  double* grad;
  double* direct = nullptr;  // [m], the values once more
  void* direct_memory = nullptr;
  bool centers;  // anything but x
  GradientTask of_rows, of_centers;
  WeightBlock block;
  SumsOfDifferences row_sums, center_sums;
  // The same of products, where there are many dimensions: a kernel finds out whether they will do.
  int* multiplied = nullptr;
  float* offset = nullptr;
  ProductOperand rows{}, all_centers{};
  SumsOfProducts row_products{}, center_products{};
  CenterGradients last;
  void* exact_memory;
  int64_t used;

  BackwardPlan(const LogMixtureBackwardProblem& problem, void* memory)
      : p(problem),
        given(problem.grad),
        of_rows{},
        of_centers{},
        block{},
        row_sums{},
        center_sums{},
        last{},
        exact_memory(nullptr) {
    const MixtureInputs& in = p.in;
    const int64_t compute = in_float32(in) ? 4 : 8;
    Arrays arrays{memory};
    p.grad = grad = arrays.take<double>(in.m);
    if (multiplies(in)) {
      // A value made of products is up to kProductTolerance of itself off, which each weight would be off by:
      // only the rounding of the differences that it is made of itself cancels.
      p.value = direct = arrays.take<double>(in.m);
      direct_memory = arrays.take_bytes(direct_values_workspace(in));
    }
    centers = p.grad_centers || p.grad_scale || p.grad_log_weights;
    last.p = p;
    exact_memory = arrays.take_bytes(exact_gradients_workspace(in));
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
      block = block_of(in, multiplies(in), arrays);
      if (p.grad_x) row_sums.sums = arrays.take_bytes(least(kBlockRows, in.m) * in.d * compute);
      if (centers) {
        center_sums.sums = arrays.take_bytes(in.n * in.d * compute);
        if (p.grad_scale) center_sums.squares = arrays.take_bytes(in.n * in.d * compute);
        center_sums.totals = arrays.take_bytes(in.n * compute);
      }
      if (multiplies(in)) plan_products(arrays);
      last.differences = center_sums.sums;
      last.squares = center_sums.squares;
      last.totals = center_sums.totals;
    }
    used = arrays.used;
  }

  void plan_products(Arrays& arrays) {
    const MixtureInputs& in = p.in;
    const int64_t block_rows = least(kBlockRows, in.m), block_centers = least(kBlockCenters, in.n);
    block.multiplied = multiplied = arrays.take<int>(1);
    block.factored = in.scale_kind == MixtureScale::per_center;
    offset = arrays.take<float>(in.d);
    float* const parts = arrays.take<float>(sum_parts(in.d) *
                                            (block_rows > block_centers ? block_rows : block_centers) * in.d);
    // Widths are wanted of both.
    if (centers) rows = operand_of(in, in.m, arrays);
    if (p.grad_x) all_centers = operand_of(in, in.n, arrays);
    rows.widths = arrays.take<float>(whole(in.m, kProductTile));
    all_centers.widths = arrays.take<float>(whole(in.n, kProductTile));
    if (p.grad_x) {
      block.row_totals = arrays.take<float>(block.stride / PairTile<float>::kColumns * block_rows);
      row_products = {all_centers.pieces,
                      parts,
                      static_cast<float*>(row_sums.sums),
                      arrays.take<float>(block_rows),
                      nullptr,
                      false};
    }
    if (centers) {
      const int64_t of_tiles = ceil_div(block_rows, kProductTile) * block.stride;
      block.center_totals = arrays.take<float>(of_tiles);
      block.center_squares = arrays.take<float>(of_tiles);
      center_products = {rows.pieces,
                         parts,
                         static_cast<float*>(center_sums.sums),
                         static_cast<float*>(center_sums.totals),
                         arrays.take<float>(in.n),
                         false};
    }
    last.multiplied = multiplied;
    last.offset = offset;
    last.square_sums = center_products.squares;
    last.factored = block.factored;
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

int64_t log_mixture_backward_workspace(const LogMixtureBackwardProblem& p) {
  return BackwardPlan(p, nullptr).used;
}

void log_mixture_backward(const LogMixtureBackwardProblem& problem, void* memory, void* stream) {
  const char* op = "log_mixture_backward";
  const BackwardPlan plan(problem, memory);
  const LogMixtureBackwardProblem& p = plan.p;
  const MixtureInputs& in = p.in;
  if (!p.grad_x && !plan.centers) return;
  if (plan.direct) launch_direct_values(in, plan.direct, plan.direct_memory, stream);
  launch(op, mixture_row_gradients_kernel, ceil_div(in.m, kMixtureThreads), kMixtureThreads, stream, in.m,
         p.value, plan.given, plan.grad);
  if (is_small(in)) {
    with_dimension(in.d, [&](auto dimension) {
      constexpr int kD = decltype(dimension)::value;
      if (p.grad_x) launch_gradient<kD, false>(plan.of_rows, stream);
      if (plan.centers) launch_gradient<kD, true>(plan.of_centers, stream);
    });
  } else {
    const bool products = plan.multiplied != nullptr;
    if (products) {
      launch_offset(op, in, plan.offset, stream);
      launch_split(op, in, p.grad, plan.offset, false, plan.rows, stream);
      launch_split(op, in, nullptr, plan.offset, true, plan.all_centers, stream);
      launch_choice(op, in, plan.rows, plan.all_centers, plan.multiplied, stream);
    }
    for_blocks(in, plan.block, [&](const WeightBlock& block) {
      launch_weights(op, in, {p.value, p.grad}, block, products, stream);
      if (p.grad_x) {
        SumsOfDifferences task = plan.row_sums;
        task.block = block;
        task.first = block.first_center == 0;
        launch_sums(op, in, false, p.grad, task, stream);
        SumsOfProducts of = plan.row_products;
        of.first = task.first;
        if (products) launch_product_sums(op, in, false, block, of, stream);
        if (block.first_center + block.centers == in.n) {
          launch_store(op, in, block, task.sums, {p.value, p.grad}, nullptr, p.grad_x, in.storage, stream);
          if (products) launch_product_store(op, in, block, plan.offset, of, p.grad, p.grad_x, stream);
        }
      }
      if (plan.centers) {
        SumsOfDifferences task = plan.center_sums;
        task.block = block;
        task.first = block.first_row == 0;
        launch_sums(op, in, true, p.grad, task, stream);
        if (!products) return;
        SumsOfProducts of = plan.center_products;
        of.sums += block.first_center * in.d;
        of.totals += block.first_center;
        of.squares += block.first_center;
        of.first = task.first;
        launch_product_sums(op, in, true, block, of, stream);
      }
    });
  }
  if (plan.centers) {
    with_compute(in, [&](auto tag) {
      launch(op, mixture_center_gradients_kernel<decltype(tag)>, ceil_div(in.n, kMixtureThreads / kWarp),
             kMixtureThreads, stream, plan.last);
    });
  }
  launch_exact_gradients(p, plan.last.scale_parts, plan.exact_memory, stream);
  if (plan.centers && p.grad_scale && in.scale_kind == MixtureScale::shared) {
    launch(op, mixture_shared_scale_kernel, 1, kMaxThreads, stream, p,
           static_cast<const double*>(plan.last.scale_parts));
  }
}

}  // namespace refine_ext::cuda
