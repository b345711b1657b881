// Checks and allocation that the log-mixture ops of every device share.
#pragma once

#include <optional>
#include <tuple>

#include "../math/log_mixture_problem.h"
#include "common.h"

namespace refine_ext::ops::mixture {

// What log_mixture_backward is asked for, a sum of these.
enum Wanted : int64_t { kWantX = 1, kWantCenters = 2, kWantScale = 4, kWantLogWeights = 8, kWantAll = 15 };

inline ScalarType compute_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// The tensors of a call, contiguous.
struct Inputs {
  Tensor x, centers, scale;
  std::optional<Tensor> log_weights, exclude;
  MixtureInputs plain;
};

inline Inputs checked_inputs(const Tensor& x_in, const Tensor& centers_in, const Tensor& scale_in,
                             const std::optional<Tensor>& log_weights_in,
                             const std::optional<Tensor>& exclude_in, const char* op) {
  require(x_in.dim() == 2, op, ": x must be [M, d], got shape ", shape_of(x_in));
  require(centers_in.dim() == 2, op, ": centers must be [N, d], got shape ", shape_of(centers_in));
  const int64_t m = x_in.size(0), d = x_in.size(1), n = centers_in.size(0);
  require(centers_in.size(1) == d, op, ": x and centers must have the same d, got shapes ", shape_of(x_in),
          " and ", shape_of(centers_in));
  require(n > 0 && d > 0, op, ": centers must not be empty, got shape ", shape_of(centers_in));
  const Storage storage = storage_of(x_in, op, "x");
  require(centers_in.scalar_type() == x_in.scalar_type(), op, ": x and centers must have the same dtype");
  const ScalarType compute = compute_type(x_in);
  const char* name = compute == ScalarType::Double ? "float64" : "float32";
  require(scale_in.scalar_type() == compute, op, ": scale must be ", name);
  const int64_t dims = scale_in.dim();
  const bool shared = scale_in.numel() == 1 && dims <= 1;
  require(shared || (dims == 1 && scale_in.size(0) == n) ||
              (dims == 2 && scale_in.size(0) == n && scale_in.size(1) == d),
          op, ": scale must be one value, [N] or [N, d], got shape ", shape_of(scale_in), " for centers ",
          shape_of(centers_in));
  Inputs in{as_contiguous(x_in), as_contiguous(centers_in), as_contiguous(scale_in), {}, {}, {}};
  if (log_weights_in) {
    require(log_weights_in->dim() == 1 && log_weights_in->size(0) == n &&
                log_weights_in->scalar_type() == compute,
            op, ": log_weights must be ", name, " [", n, "], got shape ", shape_of(*log_weights_in));
    in.log_weights = as_contiguous(*log_weights_in);
  }
  if (exclude_in) {
    require(
        exclude_in->dim() == 1 && exclude_in->size(0) == m && exclude_in->scalar_type() == ScalarType::Long,
        op, ": exclude must be int64 [", m, "], got shape ", shape_of(*exclude_in));
    in.exclude = as_contiguous(*exclude_in);
  }
  in.plain = {in.x.const_data_ptr(),
              in.centers.const_data_ptr(),
              in.scale.const_data_ptr(),
              in.log_weights ? in.log_weights->const_data_ptr() : nullptr,
              in.exclude ? static_cast<const int64_t*>(in.exclude->const_data_ptr()) : nullptr,
              storage,
              shared      ? MixtureScale::shared
              : dims == 1 ? MixtureScale::per_center
                          : MixtureScale::per_dimension,
              m,
              n,
              d};
  return in;
}

inline Tensor matrix(int64_t rows, int64_t columns, ScalarType type, const Tensor& like) {
  const int64_t sizes[2] = {rows, columns};
  return allocate(sizes, 2, type, like);
}

struct Results {
  Tensor value, mean, stats, top;
  LogMixtureProblem problem;
};

inline Results allocate_results(const Inputs& in, bool mean, bool stats) {
  const int64_t m = in.plain.m, counted = stats ? m : 0;
  Results out{allocate(&m, 1, ScalarType::Double, in.x),
              matrix(mean ? m : 0, in.plain.d, compute_type(in.x), in.x),
              matrix(counted, 2, ScalarType::Double, in.x),
              allocate(&counted, 1, ScalarType::Long, in.x),
              {}};
  out.problem = {in.plain, static_cast<double*>(out.value.mutable_data_ptr()),
                 mean ? out.mean.mutable_data_ptr() : nullptr,
                 stats ? static_cast<double*>(out.stats.mutable_data_ptr()) : nullptr,
                 stats ? static_cast<int64_t*>(out.top.mutable_data_ptr()) : nullptr};
  return out;
}

struct Gradients {
  Tensor x, centers, scale, log_weights;
  LogMixtureBackwardProblem problem;
};

// Empty where it is not wanted.
inline Gradients allocate_gradients(const Inputs& in, const Tensor& grad, const Tensor& value, int64_t wanted,
                                    const char* op) {
  const int64_t m = in.plain.m, n = in.plain.n, d = in.plain.d, none = 0;
  for (const Tensor* each : {&grad, &value}) {
    require(each->dim() == 1 && each->size(0) == m && each->scalar_type() == ScalarType::Double &&
                each->is_contiguous(),
            op, ": grad and value must be contiguous float64 [", m, "]");
  }
  require(wanted >= 0 && wanted <= kWantAll, op, ": unknown gradients ", wanted);
  const bool x = wanted & kWantX, centers = wanted & kWantCenters, scale = wanted & kWantScale;
  const bool log_weights = wanted & kWantLogWeights;
  const ScalarType compute = compute_type(in.x);
  Gradients out{matrix(x ? m : 0, d, in.x.scalar_type(), in.x),
                matrix(centers ? n : 0, d, in.x.scalar_type(), in.x),
                scale ? allocate_like(in.scale) : allocate(&none, 1, compute, in.x),
                allocate(log_weights ? &n : &none, 1, compute, in.x),
                {}};
  out.problem = {in.plain,
                 static_cast<const double*>(grad.const_data_ptr()),
                 static_cast<const double*>(value.const_data_ptr()),
                 x ? out.x.mutable_data_ptr() : nullptr,
                 centers ? out.centers.mutable_data_ptr() : nullptr,
                 scale ? out.scale.mutable_data_ptr() : nullptr,
                 log_weights ? out.log_weights.mutable_data_ptr() : nullptr};
  return out;
}

}  // namespace refine_ext::ops::mixture
