// The pairs of rows and centres of a log-mixture in many dimensions, for the drivers of its values and of its
// gradients: float32 copies, the centres rounded for screening, and the distances of those that may count.
#pragma once

#include <memory>
#include <vector>

#include "log_mixture_wide.h"
#include "scratch.h"

namespace refine_ext {

const WideKernels& wide_kernels_of_cpu();
const WideGradientKernels& wide_gradient_kernels_of_cpu();

// Rows of float32, each padded with zeros to `stride`.
class WideRows {
 public:
  WideRows(const void* from, Storage storage, int64_t rows, int64_t d);
  const float* row(int64_t i) const { return data_ + i * stride_; }
  int64_t stride() const { return stride_; }

 private:
  int64_t stride_;
  const float* data_;
  std::unique_ptr<Scratch<float>> copy_;
};

// What a thread needs for a block of rows and a chunk of at most `room` centres, in whole panels.
struct PairMemory {
  const float* x[kRowBlock];
  int64_t exclude[kRowBlock];
  int64_t count[kRowBlock];
  int64_t room;
  Scratch<float> distances;  // [kRowBlock][room], or what screening works in
  Scratch<double> t;
  Scratch<int32_t> chosen;  // [kRowBlock][room]
};

class WideScreen;

class WidePairs {
 public:
  // The span counts where `visit` is given none.
  explicit WidePairs(const MixtureInputs& in, double span = kValueSpan);
  ~WidePairs();

  const WideCenters& centers() const { return centers_; }
  const float* row(int64_t i) const { return x_.row(i); }
  // Of the first `most` centres at most, in whole panels.
  PairMemory memory(int64_t most) const;

  // f(r, distances, chosen, count) for rows[r], r < count <= kRowBlock, and the n centres from `first` on, a
  // multiple of 64: distances of the `count` chosen ones, or of all n where chosen is null. own.x and
  // own.exclude are set. least: of each row the exponent that counts, or null: the largest less the span.
  template <class F>
  void visit(PairMemory& own, const int64_t* rows, int64_t count, int64_t first, int64_t n,
             const double* least, F&& f) const {
    begin(own, rows, count, first, n, least);
    const WideKernels& kernels = wide_kernels_of_cpu();
    const float* dense[kRowBlock];
    int64_t place[kRowBlock], others = 0;
    for (int64_t r = 0; r < count; ++r) {
      if (own.count[r] < 0) {
        place[others] = r;
        dense[others++] = own.x[r];
        continue;
      }
      const int32_t* chosen = own.chosen.data() + r * own.room;
      kernels.chosen_distances(own.x[r], centers_.row(first), chosen, own.count[r], centers_.stride,
                               own.distances.data());
      f(r, own.distances.data(), chosen, own.count[r]);
    }
    if (others > 0) {
      kernels.distances(dense, others, centers_.row(first), n, centers_.stride, own.distances.data(),
                        own.room);
    }
    for (int64_t c = 0; c < others; ++c)
      f(place[c], own.distances.data() + c * own.room, static_cast<const int32_t*>(nullptr), n);
  }

 private:
  bool worth_screening() const;
  // Sets x, exclude, and in own.chosen own.count[r] centres for each row, or -1: all of them.
  void begin(PairMemory& own, const int64_t* rows, int64_t count, int64_t first, int64_t n,
             const double* least) const;

  const MixtureInputs& in_;
  WideRows x_, y_;
  std::vector<double> rate_, log2_weight_;
  WideCenters centers_;
  std::unique_ptr<WideScreen> screen_;
};

}  // namespace refine_ext
