// Weights of pairs and sums of differences, for the means of log_mixture and for its gradients.
#include "log_mixture_launch.cuh"
#include "log_mixture_product_sums.cuh"
#include "log_mixture_split.cuh"

namespace refine_ext::cuda {
namespace {

template <class F>
void with_compute_and_dims(const MixtureInputs& in, bool means, F&& f) {
  with_compute(in, [&](auto tag) {
    with_flag(in.scale_kind == MixtureScale::per_dimension && !means, [&](auto dims) { f(tag, dims); });
  });
}

}  // namespace

void launch_weights(const char* op, const MixtureInputs& in, const RowLogarithm& rows,
                    const WeightBlock& block, bool parts, void* stream) {
  const auto launched = [&](auto tag, auto kernel) {
    using Tile = PairTile<decltype(tag)>;
    launch(op, kernel, ceil_div(block.rows, Tile::kRows) * (block.stride / Tile::kColumns), kMixtureThreads,
           stream, in, rows, block);
  };
  if (parts) return launched(float{}, mixture_weights_kernel<float, false, true>);
  with_compute_and_dims(in, false, [&](auto tag, auto dims) {
    launched(tag, mixture_weights_kernel<decltype(tag), decltype(dims)::value, false>);
  });
}

void launch_sums(const char* op, const MixtureInputs& in, bool centers, const double* grad,
                 const SumsOfDifferences& task, void* stream) {
  const bool means = grad == nullptr;
  const int64_t owners = centers ? task.block.centers : task.block.rows;
  with_compute_and_dims(in, means, [&](auto tag, auto dims) {
    using T = decltype(tag);
    const int64_t tiles = ceil_div(owners, PairTile<T>::kRows) * ceil_div(in.d, PairTile<T>::kColumns);
    with_flag(centers, [&](auto of_centers) {
      launch(op, mixture_sums_kernel<T, decltype(of_centers)::value, decltype(dims)::value>, tiles,
             kMixtureThreads, stream, in, grad, means, task);
    });
  });
}

void launch_product_sums(const char* op, const MixtureInputs& in, bool centers, const WeightBlock& block,
                         const SumsOfProducts& of, void* stream) {
  ProductSums task{};
  task.multiplied = block.multiplied;
  task.weights = static_cast<const uint4*>(block.weights);
  task.others = of.others;
  task.sums = of.parts;
  task.d = in.d;
  task.owners = centers ? block.centers : block.rows;
  task.count = centers ? block.rows : block.centers;
  task.weight_slices = block.stride / kProductSlice;
  task.slices = ceil_div(in.d, kProductSlice);
  task.parts = sum_parts(in.d);
  task.others += (centers ? block.first_row : block.first_center) / kProductTile * task.slices * kPiecePacks;
  const int64_t tiles = ceil_div(task.owners, kProductTile) * ceil_div(in.d, kProductTile);
  with_flag(centers, [&](auto of_centers) {
    launch_with_shared(op, mixture_product_sums_kernel<decltype(of_centers)::value>, tiles * task.parts,
                       kProductThreads, kProductShared, stream, task);
  });
  const int64_t each = task.owners * in.d, tiles_of_rows = ceil_div(block.rows, kProductTile);
  Additions all{block.multiplied, of.first, {{of.parts, of.sums, task.parts, each, each}}};
  int64_t elements = each;
  const auto add = [&](Addition& to, const float* parts, float* sums, int64_t count, int64_t apart) {
    if (!sums) return;
    to = {parts, sums, count, task.owners, apart};
    elements += task.owners;
  };
  if (centers) {
    add(all.of[1], block.center_totals, of.totals, tiles_of_rows, block.stride);
    add(all.of[2], block.center_squares, of.squares, tiles_of_rows, block.stride);
  } else {
    add(all.of[1], block.row_totals, of.totals, block.stride / PairTile<float>::kColumns, block.rows);
  }
  launch(op, mixture_add_kernel, ceil_div(elements, kMixtureThreads), kMixtureThreads, stream, all);
}

void launch_product_store(const char* op, const MixtureInputs& in, const WeightBlock& block,
                          const float* offset, const SumsOfProducts& of, const double* grad, void* to,
                          void* stream) {
  launch(op, mixture_product_store_kernel, ceil_div(block.rows * in.d, kMixtureThreads), kMixtureThreads,
         stream, in, block, offset, static_cast<const float*>(of.sums), static_cast<const float*>(of.totals),
         grad, to);
}

void launch_choice(const char* op, const MixtureInputs& in, const ProductOperand& rows,
                   const ProductOperand& centers, int* multiplied, void* stream) {
  launch(op, mixture_choice_kernel, 1, kMaxThreads, stream, in, static_cast<const float*>(rows.widths),
         static_cast<const float*>(centers.widths), multiplied);
}

void launch_offset(const char* op, const MixtureInputs& in, float* offset, void* stream) {
  launch(op, mixture_offset_kernel, ceil_div(in.d, kMixtureThreads), kMixtureThreads, stream, in, offset);
}

void launch_split(const char* op, const MixtureInputs& in, const double* grad, const float* offset,
                  bool centers, const ProductOperand& to, void* stream) {
  const int64_t padded = whole(centers ? in.n : in.m, kProductTile);
  launch(op, mixture_split_kernel, ceil_div(padded, kMixtureThreads / kWarp), kMixtureThreads, stream, in,
         grad, offset, ceil_div(in.d, kProductSlice), centers, to, padded);
}

void launch_store(const char* op, const MixtureInputs& in, const WeightBlock& block, const void* sums,
                  const RowLogarithm& rows, const float* offset, void* to, Storage storage, void* stream) {
  with_compute(in, [&](auto tag) {
    using T = decltype(tag);
    launch(op, mixture_store_kernel<T>, ceil_div(block.rows * in.d, kMixtureThreads), kMixtureThreads, stream,
           in, block.first_row, block.rows, static_cast<const T*>(sums), rows.value, rows.grad, offset,
           block.multiplied, to, storage);
  });
}

}  // namespace refine_ext::cuda
