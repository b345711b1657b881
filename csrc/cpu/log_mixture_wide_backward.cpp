// Gradients of the Gaussian log-mixture in many dimensions (log_mixture_wide.h), from the distances that the
// values are made of.
//
// Memory beside inputs and results, for each thread: 12 bytes for each value of a block of rows and 4 for
// each of a block of centres, and what the values take.
#include <algorithm>
#include <cmath>
#include <limits>

#include "dispatch.h"
#include "log_mixture_backward.h"
#include "log_mixture_blocks.h"
#include "log_mixture_wide_pairs.h"

#define REFINE_EXT_ISA isa_baseline
#include "log_mixture_row_gradient.h"

namespace refine_ext {

REFINE_EXT_KERNEL_TABLE(WideGradientKernels, wide_gradient_kernels)

const WideGradientKernels& wide_gradient_kernels_of_cpu() { return wide_gradient_kernels_table(); }

namespace {

// Blocks of as many as a float32 sum takes well.
constexpr int64_t kBlockRows = 256, kBlockCenters = 512;
static_assert(kBlockRows % kRowBlock == 0 && kRowBlock % kGradientRows == 0);

class WideBlocks {
 public:
  WideBlocks(const MixtureBackwardPlan& plan, const WidePairs& pairs)
      : plan_(plan),
        in_(plan.problem.in),
        pairs_(pairs),
        stride_(pairs.centers().stride),
        memory_(pairs.memory(kBlockCenters)),
        x_(kRowBlock * stride_),
        row_sums_(plan.problem.grad_x ? kRowBlock * stride_ : 0),
        total_(plan.problem.grad_x ? plan.rows * stride_ : 0),
        center_sums_(plan.slopes ? plan.centers * stride_ : 0),
        w_(kRowBlock * plan.centers),
        packed_(kGradientRows * (plan.centers + kGradientTile)),
        index_(plan.centers + kGradientTile) {}

  void begin(int64_t) { std::fill_n(total_.data(), plan_.problem.grad_x ? plan_.rows * stride_ : 0, 0.0); }

  void block(int64_t row_block, int64_t center_block) {
    const int64_t first = center_block * plan_.centers, n = std::min(plan_.centers, in_.n - first);
    const int64_t begin = row_block * plan_.rows, end = std::min(begin + plan_.rows, in_.m);
    std::fill_n(touched_, n, false);
    for (int64_t i = begin; i < end; i += kRowBlock) add(i, std::min(end, i + kRowBlock), begin, first, n);
    float* slopes = static_cast<float*>(plan_.slopes);
    for (int64_t j = 0; slopes && j < n; ++j) {
      if (!touched_[j]) continue;
      const float* from = center_sums_.data() + j * stride_;
      float* to = slopes + (first + j) * in_.d;
      for (int64_t k = 0; k < in_.d; ++k) to[k] += from[k];
    }
  }

  void finish(int64_t row_block) {
    if (!plan_.problem.grad_x) return;
    const int64_t begin = row_block * plan_.rows, rows = std::min(plan_.rows, in_.m - begin);
    isa_baseline::with_storage(in_.storage, [&](auto tag) {
      using T = decltype(tag);
      // Never: float64 has no float32 sums.
      if constexpr (sizeof(T) < 8) write(static_cast<T*>(plan_.problem.grad_x), begin, rows);
    });
  }

 private:
  // Rows [i, end) of the block from `begin` on and n centres from `first` on.
  void add(int64_t i, int64_t end, int64_t begin, int64_t first, int64_t n) {
    int64_t rows[kRowBlock], count = 0;
    double least[kRowBlock];
    WideRow row[kRowBlock];
    for (; i < end; ++i) {
      const double grad = plan_.problem.grad[i], value = plan_.problem.value[i];
      // No gradient, whatever x is: a row without centres stays without.
      if (grad == 0.0 || value == -HUGE_VAL) continue;
      if (value != value) {
        set_unknown(i - begin, first, n);
        continue;
      }
      const double log2_value = kLog2E * value;
      least[count] = log2_value - kGradientSpan;
      row[count] = {log2_value, plan_.over_rows() ? grad : 1.0, least[count]};
      rows[count++] = i;
    }
    if (count == 0) return;
    const auto at = [&](double* sums) { return sums ? sums + first : nullptr; };
    double *const weights = at(plan_.weights), *const squares = at(plan_.squares);
    const bool with_rate = in_.scale_kind == MixtureScale::per_center;
    bool some = false;
    // Sums over rows take them in order, and those that are screened come before those that are not.
    pairs_.visit(memory_, rows, count, first, n, least,
                 [&](int64_t r, const float* distances, const int32_t* chosen, int64_t those) {
                   some |= wide_gradient_kernels_table().weights(
                       pairs_.centers(), first, n, with_rate, memory_.x[r], memory_.exclude[r], distances,
                       chosen, those, row[r], memory_.t.data(), w_.data() + r * n, weights, squares);
                 });
    if (!some) return;
    const bool of_x = plan_.problem.grad_x != nullptr;
    const int64_t padded = divide_up(count, kGradientTile) * kGradientTile;
    for (int64_t r = 0; r < count; ++r) std::copy_n(pairs_.row(rows[r]), stride_, x_.data() + r * stride_);
    std::fill(x_.data() + count * stride_, x_.data() + padded * stride_, 0.0f);
    if (of_x) std::fill_n(row_sums_.data(), padded * stride_, 0.0f);
    wide_gradient_kernels_table().sums(
        {pairs_.centers(), first, n, x_.data(), count, w_.data(), of_x ? row_sums_.data() : nullptr,
         plan_.slopes ? center_sums_.data() : nullptr, touched_, index_.data(), packed_.data()});
    for (int64_t r = 0; of_x && r < count; ++r) {
      const float* from = row_sums_.data() + r * stride_;
      double* to = total_.data() + (rows[r] - begin) * stride_;
      for (int64_t k = 0; k < in_.d; ++k) to[k] += from[k];
    }
  }

  // All that a row of NaN has a part in. Not by its weights: where there is no weight there may be infinity.
  void set_unknown(int64_t r, int64_t first, int64_t n) {
    const double nan = std::numeric_limits<double>::quiet_NaN();
    if (plan_.problem.grad_x) std::fill_n(total_.data() + r * stride_, stride_, nan);
    if (plan_.weights) std::fill_n(plan_.weights + first, n, nan);
    if (plan_.squares) std::fill_n(plan_.squares + first, n, nan);
    if (plan_.slopes) std::fill_n(static_cast<float*>(plan_.slopes) + first * in_.d, n * in_.d, nan);
  }

  template <class T>
  void write(T* out, int64_t begin, int64_t rows) const {
    const isa_baseline::RowGradient gradient(in_);
    for (int64_t r = 0; r < rows; ++r) {
      const double grad = plan_.over_rows() ? 1.0 : plan_.problem.grad[begin + r];
      gradient.write(out + (begin + r) * in_.d, grad, total_.data() + r * stride_);
    }
  }

  const MixtureBackwardPlan& plan_;
  const MixtureInputs& in_;
  const WidePairs& pairs_;
  const int64_t stride_;
  PairMemory memory_;
  Scratch<float> x_, row_sums_;  // [kRowBlock][stride]
  Scratch<double> total_;        // [plan.rows][stride]
  Scratch<float> center_sums_;   // [plan.centers][stride]
  Scratch<float> w_, packed_;
  Scratch<int32_t> index_;
  bool touched_[kBlockCenters];
};

}  // namespace

void log_mixture_wide_sums(const MixtureBackwardPlan& given) {
  MixtureBackwardPlan plan = given;
  const MixtureInputs& in = plan.problem.in;
  // Rows of a gradient of x alone do not meet.
  plan.rows = plan.over_rows() ? kBlockRows : kRowBlock;
  plan.centers = std::min(kBlockCenters, divide_up(in.n, 64) * 64);
  const WidePairs pairs(in);
  run_blocks(plan, [&] { return WideBlocks(plan, pairs); });
}

}  // namespace refine_ext
