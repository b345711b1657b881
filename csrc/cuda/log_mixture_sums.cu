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
                         const ProductOperand& others, float* parts, float* sums, bool first, void* stream) {
  ProductSums task{static_cast<const uint4*>(block.weights), others.pieces, parts, 0, 0, 0, 0, in.d, 0};
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
  const int64_t each = task.owners * in.d;
  launch(op, mixture_add_kernel, ceil_div(each, kMixtureThreads), kMixtureThreads, stream,
         Additions{{{parts, sums, task.parts, each, first}}});
}

void launch_offset(const char* op, const MixtureInputs& in, float* offset, void* stream) {
  launch(op, mixture_offset_kernel, ceil_div(in.d, kMixtureThreads), kMixtureThreads, stream, in, offset);
}

void launch_split(const char* op, const MixtureInputs& in, const float* offset, bool centers,
                  const ProductOperand& to, void* stream) {
  const int64_t padded = whole(centers ? in.n : in.m, kProductTile);
  launch(op, mixture_split_kernel, ceil_div(padded, kMixtureThreads / kWarp), kMixtureThreads, stream, in,
         offset, ceil_div(in.d, kProductSlice), centers, to, padded);
}

void launch_store(const char* op, const MixtureInputs& in, const WeightBlock& block, const void* sums,
                  const RowLogarithm& rows, const float* offset, void* to, Storage storage, void* stream) {
  with_compute(in, [&](auto tag) {
    using T = decltype(tag);
    launch(op, mixture_store_kernel<T>, ceil_div(block.rows * in.d, kMixtureThreads), kMixtureThreads, stream,
           in, block.first_row, block.rows, static_cast<const T*>(sums), rows.value, rows.grad, offset, to,
           storage);
  });
}

}  // namespace refine_ext::cuda
