// Weights of pairs and sums of differences, for the means of log_mixture and for its gradients.
#include "log_mixture_launch.cuh"

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
                    const WeightBlock& block, void* stream) {
  with_compute_and_dims(in, false, [&](auto tag, auto dims) {
    using T = decltype(tag);
    const int64_t tiles = ceil_div(block.rows, PairTile<T>::kRows) * (block.stride / PairTile<T>::kColumns);
    launch(op, mixture_weights_kernel<T, decltype(dims)::value>, tiles, kMixtureThreads, stream, in, rows,
           block);
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

void launch_store(const char* op, const MixtureInputs& in, const WeightBlock& block, const void* sums,
                  const RowLogarithm& rows, void* to, Storage storage, void* stream) {
  with_compute(in, [&](auto tag) {
    using T = decltype(tag);
    launch(op, mixture_store_kernel<T>, ceil_div(block.rows * in.d, kMixtureThreads), kMixtureThreads, stream,
           in, block.first_row, block.rows, static_cast<const T*>(sums), rows.value, rows.grad, to, storage);
  });
}

}  // namespace refine_ext::cuda
