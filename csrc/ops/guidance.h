// Checks and allocation that the guidance ops of every device share.
#pragma once

#include <cmath>
#include <limits>

#include "../math/guidance_problem.h"
#include "common.h"

namespace refine_ext::ops {

// The tensors that a problem's pointers are into.
struct StepInputs {
  std::vector<Tensor> tensors;
  GuidedStepProblem problem{};
};

struct FactorInputs {
  std::vector<Tensor> tensors;
  GuidanceFactorProblem problem{};
};

namespace guidance {

inline int64_t bytes_of(const Tensor& tensor) {
  return static_cast<int64_t>(tensor.numel()) * static_cast<int64_t>(tensor.element_size());
}

inline bool same_shape(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim()) return false;
  for (int64_t d = 0; d < a.dim(); ++d) {
    if (a.size(d) != b.size(d)) return false;
  }
  return true;
}

// The same handle where the elements of each sample are contiguous already.
inline Tensor with_contiguous_samples(const Tensor& tensor) {
  int64_t expected = 1;
  for (int64_t d = tensor.dim() - 1; d >= 1; --d) {
    if (tensor.size(d) != 1 && tensor.stride(d) != expected) return torch::stable::contiguous(tensor);
    expected *= tensor.size(d);
  }
  return tensor;
}

inline StepTensor step_tensor(const Tensor& tensor, const char* argument) {
  return {tensor.const_data_ptr(), tensor.size(0) > 1 ? tensor.stride(0) : 0,
          storage_of(tensor, "guided_step", argument)};
}

inline bool storages_fit(Storage state, Storage term) {
  if (term == state) return true;
  return state == Storage::float64 ? term == Storage::float32
                                   : state == Storage::float32 && term != Storage::float64;
}

inline const char* name_of(Storage storage) {
  switch (storage) {
    case Storage::float64:
      return "float64";
    case Storage::float32:
      return "float32";
    case Storage::float16:
      return "float16";
    default:
      return "bfloat16";
  }
}

inline StepInputs gather_step(const Tensor& x_in, const std::vector<Tensor>& terms,
                              const std::optional<Tensor>& coefficients, const std::vector<double>& scalars,
                              const std::optional<Tensor>& factor, const std::optional<Tensor>& seeds,
                              int64_t seed, int64_t step, bool noisy) {
  const char* op = "guided_step";
  StepInputs inputs;
  std::vector<Tensor>& kept = inputs.tensors;
  GuidedStepProblem& problem = inputs.problem;
  kept.reserve(terms.size() + 4);
  require(x_in.dim() >= 1, op, ": x must have a batch dimension, got a 0-dim tensor");
  kept.push_back(with_contiguous_samples(x_in));
  const Tensor& x = kept[0];
  problem.rows = x.size(0);
  problem.n = 1;
  for (int64_t d = 1; d < x.dim(); ++d) problem.n *= x.size(d);
  problem.x = step_tensor(x, "x");
  const int64_t count = static_cast<int64_t>(terms.size());
  require(count <= kMostTerms, op, ": at most ", kMostTerms, " terms are supported, got ", count);
  problem.terms = static_cast<int>(count);
  for (int64_t k = 0; k < count; ++k) {
    require(same_shape(terms[k], x), op, ": terms[", k, "] must have the shape of x, ", shape_of(x), ", got ",
            shape_of(terms[k]));
    kept.push_back(with_contiguous_samples(terms[k]));
    problem.term[k] = step_tensor(kept.back(), "terms");
    require(storages_fit(problem.x.storage, problem.term[k].storage), op, ": terms[", k, "] is ",
            name_of(problem.term[k].storage), ", which does not go with a state of ",
            name_of(problem.x.storage), "; allowed are its own dtype, float32 with float64, and float16 or ",
            "bfloat16 with float32");
  }
  problem.noisy = noisy;
  const int64_t columns = count + (noisy ? 2 : 1);
  if (coefficients) {
    require(coefficients->scalar_type() == ScalarType::Double, op,
            ": a tensor of coefficients must be float64");
    const int64_t dims = coefficients->dim();
    const bool fits =
        (dims == 1 || (dims == 2 && (coefficients->size(0) == problem.rows || coefficients->size(0) == 1))) &&
        coefficients->size(dims - 1) == columns;
    require(fits, op, ": coefficients must have shape [", columns, "] or [", problem.rows, ", ", columns,
            "] (of x, the ", count, " terms", noisy ? " and the noise" : "", "), got ",
            shape_of(*coefficients));
    const bool dense = coefficients->stride(dims - 1) == 1 || columns == 1;
    kept.push_back(dense ? *coefficients : torch::stable::contiguous(*coefficients));
    problem.table = static_cast<const double*>(kept.back().const_data_ptr());
    problem.table_stride = dims == 2 && kept.back().size(0) > 1 ? kept.back().stride(0) : 0;
  } else {
    require(static_cast<int64_t>(scalars.size()) == columns, op, ": coefficients must be ", columns,
            " numbers (of x, the ", count, " terms", noisy ? " and the noise" : "", "), got ",
            scalars.size());
    for (int64_t k = 0; k < columns; ++k) problem.scalars[k] = scalars[k];
  }
  if (factor) {
    require(count > 0, op, ": factor multiplies the last term, and there are no terms");
    require(factor->scalar_type() == ScalarType::Double, op, ": factor must be float64");
    require(static_cast<int64_t>(factor->numel()) == problem.rows, op, ": factor must have shape [",
            problem.rows, "], got ", shape_of(*factor));
    kept.push_back(as_contiguous(*factor));
    problem.factor = static_cast<const double*>(kept.back().const_data_ptr());
  }
  if (noisy) {
    require(step >= 0 && step < int64_t{1} << 32, op, ": step must be between 0 and 2^32 - 1, got ", step);
    require(problem.n <= kMostElements, op, ": a sample of noise has at most 2^34 elements, got ", problem.n);
    problem.seed = seed;
    problem.step = step;
    if (seeds) {
      require(seeds->scalar_type() == ScalarType::Long, op, ": a tensor of seeds must be int64");
      require(seeds->dim() == 0 || (seeds->dim() == 1 && seeds->size(0) == problem.rows), op,
              ": seed must be one number or have shape [", problem.rows, "], got ", shape_of(*seeds));
      kept.push_back(as_contiguous(*seeds));
      problem.seeds = static_cast<const int64_t*>(kept.back().const_data_ptr());
      problem.seed_stride = seeds->dim();
    }
  }
  return inputs;
}

// out of guided_step_out: written as it is, so it must match; inputs may lie under it element by element or
// not at all.
inline void check_step_out(const StepInputs& inputs, const Tensor& out, const Tensor& x) {
  const char* op = "guided_step";
  require(out.scalar_type() == x.scalar_type() && same_shape(out, x), op,
          ": out must have the shape and dtype of x, ", shape_of(x), ", got ", shape_of(out));
  require(out.is_contiguous(), op, ": out must be contiguous");
  const char* begin = static_cast<const char*>(out.const_data_ptr());
  const char* end = begin + bytes_of(out);
  for (const Tensor& tensor : inputs.tensors) {
    if (tensor.numel() == 0) continue;
    const char* data = static_cast<const char*>(tensor.const_data_ptr());
    int64_t last = 0;
    for (int64_t d = 0; d < tensor.dim(); ++d) last += (tensor.size(d) - 1) * tensor.stride(d);
    const bool apart =
        data + (last + 1) * static_cast<int64_t>(tensor.element_size()) <= begin || data >= end;
    const bool identical = data == begin && tensor.scalar_type() == out.scalar_type() &&
                           same_shape(tensor, out) && tensor.is_contiguous();
    require(apart || identical, op,
            ": out overlaps an input; it may be x or a term itself, or apart from all");
  }
}

inline FactorInputs gather_factor(const Tensor& h, const std::optional<Tensor>& shift,
                                  const std::optional<Tensor>& weight, const std::optional<Tensor>& sigma,
                                  const std::optional<Tensor>& alpha, const std::vector<double>& constants,
                                  int64_t divergence, double alpha_divergence, bool logit, bool flow,
                                  int64_t parametrization) {
  const char* op = "guidance_factor";
  require(constants.size() == 6, op,
          ": constants must be shift, weight, sigma, alpha, sigma_min and sigma_max");
  require(divergence >= 0 && divergence < kDivergences, op, ": unknown divergence code ", divergence);
  require(parametrization >= 0 && parametrization < kParametrizations, op, ": unknown parametrization code ",
          parametrization);
  FactorInputs inputs;
  inputs.tensors.reserve(5);
  GuidanceFactorProblem& problem = inputs.problem;
  problem.rows = static_cast<int64_t>(h.numel());
  const auto values = [&](const std::optional<Tensor>& given, double constant, const char* argument) {
    if (!given) return SampleValues{nullptr, 0, Storage::float64, constant};
    const int64_t count = static_cast<int64_t>(given->numel());
    require(count == 1 || count == problem.rows, op, ": ", argument, " must hold one value or ", problem.rows,
            ", one for each sample, got shape ", shape_of(*given));
    inputs.tensors.push_back(as_contiguous(*given));
    return SampleValues{inputs.tensors.back().const_data_ptr(), count == 1 ? 0 : 1,
                        storage_of(*given, op, argument), 0.0};
  };
  problem.h = values(h, 0.0, "h");
  problem.shift = values(shift, constants[0], "shift");
  problem.weight = values(weight, constants[1], "weight");
  problem.sigma = values(sigma, constants[2], "sigma");
  problem.alpha = values(alpha, constants[3], "alpha");
  problem.has_sigma = sigma || !std::isnan(constants[2]);
  problem.sigma_min = constants[4];
  problem.sigma_max = constants[5];
  problem.family = make_family(static_cast<Divergence>(divergence), alpha_divergence);
  problem.logit = logit;
  problem.flow = flow;
  problem.parametrization = static_cast<Parametrization>(parametrization);
  require(problem.has_sigma || problem.parametrization == Parametrization::score, op,
          ": sigma is needed for every parametrization but score");
  return inputs;
}

// float64, shaped as h.
inline Tensor new_factor(const Tensor& h) {
  std::vector<int64_t> sizes(h.dim());
  for (size_t d = 0; d < sizes.size(); ++d) sizes[d] = h.size(static_cast<int64_t>(d));
  return allocate(sizes.data(), h.dim(), ScalarType::Double, h);
}

}  // namespace guidance
}  // namespace refine_ext::ops
