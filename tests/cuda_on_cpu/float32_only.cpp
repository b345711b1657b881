// Stands in for the storage types that the race check does not compile.
#include <cstdlib>

#include "../../csrc/cuda/density_ratio_launch.cuh"

namespace refine_ext::cuda {

template <class T>
void DensityRatioLaunches<T>::run(const RowProblem&, RatioStats*, const BoundArguments&, void*, void*) {
  std::abort();
}
template <class T>
void DensityRatioLaunches<T>::bound_backward(const RowProblem&, const RatioStats*, const void*, bool, void*) {
  std::abort();
}
template <class T>
void DensityRatioLaunches<T>::backward(const RowProblem&, const void*, const void*, const RatioStats*,
                                       const double*, double*, void*) {
  std::abort();
}
template <class T>
void DensityRatioLaunches<T>::output(const void*, void*, int64_t, const Family&, Storage, void*) {
  std::abort();
}
template <class T>
void DensityRatioLaunches<T>::slope(const void*, const void*, const void*, bool, void*, int64_t, int64_t,
                                    const Family&, bool, Storage, void*) {
  std::abort();
}
template <class T>
void DensityRatioLaunches<T>::sum(const void*, int64_t, int64_t, const Family&, bool, Storage, double*,
                                  void*) {
  std::abort();
}

template struct DensityRatioLaunches<double>;
template struct DensityRatioLaunches<Half>;
template struct DensityRatioLaunches<BFloat16>;

}  // namespace refine_ext::cuda
