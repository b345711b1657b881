// Checks and allocation that the Rademacher ops of every device share.
#pragma once

#include <tuple>

#include "../math/normal.h"
#include "../math/rademacher_problem.h"
#include "common.h"

namespace refine_ext::ops::complexity {

inline constexpr int64_t kMostDraws = int64_t{1} << 40;

// Columns contiguous; rows any non-negative stride apart.
inline Tensor with_contiguous_columns(const Tensor& outputs, const char* op) {
  require(outputs.dim() == 2, op, ": outputs must be [n, m], got shape ", shape_of(outputs));
  require(outputs.size(0) > 0 && outputs.size(1) > 0, op, ": outputs must not be empty, got shape ",
          shape_of(outputs));
  const bool usable = outputs.size(1) == 1 || outputs.stride(1) == 1;
  return usable && outputs.stride(0) >= 0 ? outputs : torch::stable::contiguous(outputs);
}

inline int64_t row_stride(const Tensor& outputs) { return outputs.stride(0); }

inline void check_draws(int64_t draws, int64_t first_draw, const char* op) {
  require(draws >= 1 && draws <= kMostDraws, op, ": draws must be between 1 and 2^40, got ", draws);
  require(first_draw >= 0 && first_draw <= kMostDraws, op, ": first_draw must be between 0 and 2^40, got ",
          first_draw);
}

inline void check_first_row(int64_t first_row, const char* op) {
  require(first_row >= 0 && first_row % kSignBlock == 0, op, ": first_row must be a multiple of ", kSignBlock,
          ", got ", first_row);
}

struct Suprema {
  Tensor suprema, index, largest;
};

inline Suprema allocate_suprema(const Tensor& outputs, int64_t draws) {
  const int64_t m = outputs.size(1);
  return {allocate(&draws, 1, ScalarType::Double, outputs), allocate(&draws, 1, ScalarType::Long, outputs),
          allocate(&m, 1, ScalarType::Double, outputs)};
}

inline RademacherProblem suprema_problem(const Tensor& outputs, int64_t draws, int64_t first_draw,
                                         int64_t seed, int64_t supremum, int64_t digits, const Suprema& out,
                                         const char* op) {
  check_draws(draws, first_draw, op);
  require(supremum >= 0 && supremum < kSuprema, op, ": unknown supremum code ", supremum);
  require(digits >= 1 && digits <= 3, op, ": precision must be 1, 2 or 3, got ", digits);
  return {outputs.const_data_ptr(),
          storage_of(outputs, op, "outputs"),
          outputs.size(0),
          outputs.size(1),
          row_stride(outputs),
          draws,
          static_cast<uint64_t>(first_draw),
          static_cast<uint64_t>(seed),
          static_cast<Supremum>(supremum),
          static_cast<int>(digits),
          static_cast<double*>(out.suprema.mutable_data_ptr()),
          static_cast<int64_t*>(out.index.mutable_data_ptr()),
          static_cast<double*>(out.largest.mutable_data_ptr())};
}

inline RademacherSumsProblem sums_problem(const Tensor& sums, const Tensor& outputs, int64_t first_row,
                                          int64_t first_draw, int64_t seed, const char* op) {
  require(sums.dim() == 2 && sums.scalar_type() == ScalarType::Double && sums.is_contiguous() &&
              sums.size(1) == outputs.size(1),
          op, ": sums must be a contiguous float64 tensor [draws, ", outputs.size(1), "], got shape ",
          shape_of(sums));
  check_draws(sums.size(0), first_draw, op);
  check_first_row(first_row, op);
  return {outputs.const_data_ptr(),
          storage_of(outputs, op, "outputs"),
          outputs.size(0),
          outputs.size(1),
          row_stride(outputs),
          sums.size(0),
          static_cast<uint64_t>(first_draw),
          static_cast<uint64_t>(seed),
          first_row,
          static_cast<double*>(sums.mutable_data_ptr())};
}

inline RademacherBackwardProblem backward_problem(const Tensor& grad, const Tensor& index, int64_t first_draw,
                                                  int64_t seed, const Tensor& out, const char* op) {
  require(grad.dim() == 1 && grad.scalar_type() == ScalarType::Double, op, ": grad must be float64 [draws]");
  require(index.dim() == 1 && index.scalar_type() == ScalarType::Long && index.size(0) == grad.size(0), op,
          ": index must be int64 [draws]");
  check_draws(grad.size(0), first_draw, op);
  return {static_cast<const double*>(grad.const_data_ptr()),
          static_cast<const int64_t*>(index.const_data_ptr()),
          out.size(0),
          out.size(1),
          grad.size(0),
          static_cast<uint64_t>(first_draw),
          static_cast<uint64_t>(seed),
          out.mutable_data_ptr(),
          storage_of(out, op, "outputs")};
}

inline Tensor allocate_multipliers(const Tensor& like, int64_t n, int64_t draws, const char* op) {
  check_draws(draws, 0, op);
  require(n >= 0, op, ": n must not be negative, got ", n);
  const int64_t sizes[2] = {draws, n};
  return allocate(sizes, 2, like.scalar_type(), like);
}

inline MultipliersProblem multipliers_problem(const Tensor& out, int64_t first_row, int64_t first_draw,
                                              int64_t seed, bool normal, const char* op) {
  check_draws(out.size(0), first_draw, op);
  check_first_row(first_row, op);
  require(!normal || first_row + out.size(1) <= kMostElements, op, ": a draw has at most 2^34 normals, got ",
          first_row + out.size(1));
  return {out.size(1),
          out.size(0),
          static_cast<uint64_t>(first_draw),
          static_cast<uint64_t>(seed),
          first_row,
          normal,
          out.mutable_data_ptr(),
          storage_of(out, op, "like")};
}

}  // namespace refine_ext::ops::complexity
