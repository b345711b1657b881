// The pairs that log_mixture_wide_pairs.h describes.
#include "log_mixture_wide_pairs.h"

#include <algorithm>
#include <cmath>

#include "dispatch.h"
#include "log_mixture.h"
#include "parallel.h"

namespace refine_ext {

REFINE_EXT_KERNEL_TABLE(WideKernels, wide_kernels)
REFINE_EXT_KERNEL_TABLE(ScreenKernels, mixture_screen_kernels)
REFINE_EXT_KERNEL_TABLE(LogMixtureKernels, log_mixture_kernels)

const WideKernels& wide_kernels_of_cpu() { return wide_kernels_table(); }

bool is_wide(const MixtureInputs& in) {
  return in.d >= 256 && in.storage != Storage::float64 && in.scale_kind != MixtureScale::per_dimension &&
         !log_mixture_kernels_table().plan(in, false).in_double;
}

WideRows::WideRows(const void* from, Storage storage, int64_t rows, int64_t d)
    : stride_(divide_up(d, kPadding) * kPadding) {
  if (storage == Storage::float32 && stride_ == d) {
    data_ = static_cast<const float*>(from);
    return;
  }
  const int64_t bytes = storage == Storage::float32 ? 4 : 2;
  copy_ = std::make_unique<Scratch<float>>(rows * stride_);
  data_ = copy_->data();
  parallel_for(0, rows, divide_up(int64_t{1} << 16, stride_), [&](int64_t begin, int64_t end) {
    wide_kernels_table().widen(static_cast<const char*>(from) + begin * d * bytes, storage, end - begin, d,
                               copy_->data() + begin * stride_, stride_);
  });
}

// The centres rounded, where that may pay.
class WideScreen {
 public:
  WideScreen(const WideCenters& centers, int64_t d)
      : kernels_(mixture_screen_kernels_table()),
        panels_(divide_up(centers.n, kernels_.panel)),
        values_(panels_ * kernels_.panel_bytes(d)),
        arrays_(6 * panels_ * kernels_.panel),
        mean_(centers.stride),
        d_(d) {
    const int64_t stride = centers.stride, whole = panels_ * kernels_.panel;
    // Any point between the centres would do.
    const int64_t step = divide_up(centers.n, 512), counted = divide_up(centers.n, step);
    std::vector<double> sums(stride);
    for (int64_t j = 0; j < centers.n; j += step) {
      for (int64_t k = 0; k < stride; ++k) sums[k] += centers.row(j)[k];
    }
    for (int64_t k = 0; k < stride; ++k)
      mean_[k] = static_cast<float>(sums[k] / static_cast<double>(counted));
    float* part = arrays_.data();
    plain_.mean = mean_.data();
    plain_.values = values_.data();
    for (float** each :
         {&plain_.base, &plain_.gain, &plain_.rate, &plain_.residual, &plain_.size, &plain_.slack}) {
      *each = part;
      part += whole;
    }
    plain_.unit = *std::max_element(centers.rate, centers.rate + centers.n);
    parallel_for(0, panels_, 8, [&](int64_t begin, int64_t end) {
      const Scratch<float> scratch(2 * stride);
      kernels_.round_centers(centers, d, plain_, begin, end, scratch.data());
    });
    // What is not finite must reach every row's sum, and bounds that are not finite choose nothing.
    const float* finite[] = {plain_.gain, plain_.rate, plain_.residual, plain_.size, plain_.slack};
    for (const float* each : finite)
      known_ = known_ && std::all_of(each, each + whole, [](float v) { return std::isfinite(v); });
    known_ = known_ && std::all_of(plain_.base, plain_.base + whole, [](float v) { return v < HUGE_VALF; });
  }

  bool known() const { return known_; }
  int64_t scratch_floats() const { return kernels_.scratch_floats(d_); }
  void choose(const WideCenters& centers, const float* const* x, int64_t rows, const int64_t* exclude,
              const double* least, int64_t first, int64_t n, int64_t most, int64_t room, float* scratch,
              int32_t* chosen, int64_t* count) const {
    kernels_.choose(centers, plain_, d_, x, rows, exclude, least, first, n, most, room, scratch, chosen,
                    count);
  }

 private:
  const ScreenKernels& kernels_;
  int64_t panels_;
  Scratch<char> values_;
  Scratch<float> arrays_;
  std::vector<float> mean_;
  int64_t d_;
  ScreenCenters plain_;
  bool known_ = true;
};

WidePairs::WidePairs(const MixtureInputs& in, double span)
    : in_(in),
      x_(in.x, in.storage, in.m, in.d),
      y_(in.centers, in.storage, in.n, in.d),
      rate_(in.n),
      log2_weight_(in.n) {
  const float *scale = static_cast<const float*>(in.scale),
              *weight = static_cast<const float*>(in.log_weights);
  for (int64_t j = 0; j < in.n; ++j) {
    const double s = scale[in.scale_kind == MixtureScale::shared ? 0 : j];
    rate_[j] = kLog2E / (2.0 * s * s);
    log2_weight_[j] = weight ? kLog2E * weight[j] : 0.0;
  }
  centers_ = {y_.row(0),    y_.stride(),         in.n,
              rate_.data(), log2_weight_.data(), span + std::log2(static_cast<double>(in.n))};
  if (worth_screening()) {
    screen_ = std::make_unique<WideScreen>(centers_, in.d);
    if (!screen_->known()) screen_.reset();
  }
}

WidePairs::~WidePairs() = default;

PairMemory WidePairs::memory(int64_t most) const {
  const int64_t room = std::min(most, divide_up(in_.n, 64) * 64);
  return {{},
          {},
          {},
          room,
          Scratch<float>(std::max(kRowBlock * room, screen_ ? screen_->scratch_floats() : 0)),
          Scratch<double>(room + kPadding),
          Scratch<int32_t>(screen_ ? kRowBlock * room : 0)};
}

// The share of a chunk's centres from which on summing all distances costs less than those that may count.
constexpr double kDense = 0.2;

// Whether rows count few of the centres: asked of some rows and the first chunk.
bool WidePairs::worth_screening() const {
  constexpr int64_t kAsked = 4, kFewestRows = 64, kFewestCenters = 128;
  const int64_t m = in_.m, n = std::min(kChunk, in_.n);
  if (m < kFewestRows || n < kFewestCenters) return false;
  if (mixture_screen_kernels_table().panel_bytes(in_.d) == 0) return false;
  PairMemory own = memory(kChunk);
  const Scratch<int32_t> index(own.room + kPadding);
  const Scratch<float> weight(own.room + kPadding);
  KeptCenters kept{index.data(), weight.data(), 0};
  int64_t rows[kAsked], counted = 0;
  for (int64_t r = 0; r < kAsked; ++r) rows[r] = (2 * r + 1) * m / (2 * kAsked);
  visit(own, rows, kAsked, 0, n, nullptr,
        [&](int64_t r, const float* distances, const int32_t* chosen, int64_t count) {
          wide_kernels_table().reduce(centers_, 0, own.x[r], own.exclude[r], distances, chosen, count,
                                      own.t.data(), kept);
          counted += kept.count;
        });
  return static_cast<double>(counted) < kDense * static_cast<double>(kAsked * n);
}

void WidePairs::begin(PairMemory& own, const int64_t* rows, int64_t count, int64_t first, int64_t n,
                      const double* least) const {
  for (int64_t r = 0; r < count; ++r) {
    own.x[r] = x_.row(rows[r]);
    const int64_t exclude = in_.exclude ? in_.exclude[rows[r]] - first : -1;
    own.exclude[r] = exclude >= 0 && exclude < n ? exclude : -1;
  }
  constexpr int64_t kTried = 6;
  const int64_t most = static_cast<int64_t>(kDense * static_cast<double>(n));
  std::fill(own.count, own.count + count, -1);
  for (int64_t r = 0; screen_ && r < count;) {
    // The first rows tell whether it pays for the others of their block.
    const int64_t some = r == 0 ? std::min(kTried, count) : count - r;
    screen_->choose(centers_, own.x + r, some, own.exclude + r, least ? least + r : nullptr, first, n, most,
                    own.room, own.distances.data(), own.chosen.data() + r * own.room, own.count + r);
    r += some;
    if (2 * std::count(own.count, own.count + r, -1) > r) break;
  }
}

}  // namespace refine_ext
