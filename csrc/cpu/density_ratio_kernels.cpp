// The two passes over a group's outputs, compiled once per instruction set: extremes and sums of
// exponentials, then ratios at an anchor. They hold the loops; the formulas are in csrc/math, and what to run
// in which order in density_ratio.cpp.
#include "density_ratio_dispatch.h"

namespace refine_ext::REFINE_EXT_ISA {
namespace {

// ---- first pass

// What both first passes check: NaN and +inf are refused, -inf is a sample of ratio zero and allowed.
template <class V>
REFINE_EXT_INLINE V invalid_output(V x, V lowest) {
  return Arithmetic<V>::select(x == lowest, Arithmetic<V>::splat(0.0), x - x);
}
template <class V>
REFINE_EXT_INLINE V invalid_weight(V w) {
  using A = Arithmetic<V>;
  return A::select(w < A::splat(0.0), A::splat(std::numeric_limits<double>::quiet_NaN()), w - w);
}

// Loads vectors of h and weights at each offset of a block and hands them to step(x, w, offset, u); the last,
// partial vector is padded with samples of ratio and weight zero.
template <class S, class T, bool kWeighted, int kUnroll, class Step>
REFINE_EXT_INLINE void for_samples(const T* h, const T* weights, int64_t begin, int64_t end, Step&& step) {
  using V = Vec<S>;
  constexpr int kWidth = V::kWidth;
  const V zero = V::splat(0);
  for_vectors<kWidth, kUnroll>(
      begin, end,
      [&](int64_t i, int u) { step(load_as<S>(h + i), kWeighted ? load_as<S>(weights + i) : zero, i, u); },
      [&](int64_t i, int64_t count) {
        T lanes[2 * kWidth], weight_lanes[2 * kWidth];
        for (int lane = 0; lane < 2 * kWidth; ++lane) {
          lanes[lane] = lane < count ? h[i + lane] : encode<T>(-HUGE_VALF);
          if constexpr (kWeighted) weight_lanes[lane] = lane < count ? weights[i + lane] : encode<T>(0.0f);
        }
        step(load_as<S>(lanes), kWeighted ? load_as<S>(weight_lanes) : zero, i, 0);
      });
}

template <class T, bool kWeighted>
ScanSums scan_range(const RangeArguments& arguments) {
  using S = typename ComputeOf<T>::type;
  using V = Vec<S>;
  constexpr int kUnroll = 4;
  const V lowest = V::splat(-std::numeric_limits<S>::infinity()), zero = V::splat(0);
  ScanSums sums{-HUGE_VAL, 0.0, 0.0, 0.0, 0.0, false};
  V invalid = zero;
  for (int64_t block = arguments.begin; block < arguments.end; block += kBlock) {
    const int64_t end = block + kBlock < arguments.end ? block + kBlock : arguments.end;
    V best[kUnroll], mass[kUnroll];
    for (int u = 0; u < kUnroll; ++u) best[u] = lowest, mass[u] = zero;
    for_samples<S, T, kWeighted, kUnroll>(static_cast<const T*>(arguments.h),
                                          static_cast<const T*>(arguments.weights), block, end,
                                          [&](V x, V w, int64_t, int u) {
                                            invalid = invalid + invalid_output(x, lowest);
                                            if constexpr (kWeighted) {
                                              invalid = invalid + invalid_weight(w);
                                              x = select(w > zero, x, lowest);
                                              mass[u] = mass[u] + w;
                                            }
                                            best[u] = max_or_second(x, best[u]);
                                          });
    const double maximum =
        horizontal_max(max_or_second(max_or_second(best[0], best[1]), max_or_second(best[2], best[3])));
    if (arguments.block_maxima) arguments.block_maxima[(block - arguments.begin) / kBlock] = maximum;
    sums.weight += kWeighted ? horizontal_sum((mass[0] + mass[1]) + (mass[2] + mass[3]))
                             : static_cast<double>(end - block);
    if (maximum > sums.maximum) sums.maximum = maximum;
  }
  sums.invalid = any(invalid != invalid);
  return sums;
}

// Sums of w e^{h - reference} in one read: the reference is a maximum of what came before, and a block that
// exceeds it by so much that float32 squares could overflow is summed again from its own maximum.
template <class T, bool kWeighted>
ScanSums scan_exponential_range(const RangeArguments& arguments) {
  // The square of a weighted ratio leaves float32 as soon as the weights spread over 19 decades.
  using S = std::conditional_t<kWeighted, double, typename ComputeOf<T>::type>;
  using V = Vec<S>;
  using A = Arithmetic<V>;
  constexpr int kUnroll = 4;
  constexpr double kHeadroom = 20.0;  // e^40 times a block is far from float32's 3e38
  const T* h = static_cast<const T*>(arguments.h);
  const T* weights = static_cast<const T*>(arguments.weights);
  const V lowest = V::splat(-std::numeric_limits<S>::infinity()), zero = V::splat(0);
  ScanSums sums{-HUGE_VAL, 0.0, 0.0, 0.0, 0.0, false};
  double reference = -HUGE_VAL;
  V invalid = zero;
  for (int64_t block = arguments.begin; block < arguments.end; block += kBlock) {
    const int64_t end = block + kBlock < arguments.end ? block + kBlock : arguments.end;
    while (true) {
      const bool known = reference > -HUGE_VAL;
      const V origin = V::splat(known ? static_cast<S>(reference) : S(0));
      V best = lowest, largest = zero, total[kUnroll], square[kUnroll], mass = zero;
      for (int u = 0; u < kUnroll; ++u) total[u] = square[u] = zero;
      if (known) {
        for_samples<S, T, kWeighted, kUnroll>(h, weights, block, end, [&](V x, V w, int64_t i, int u) {
          // The arithmetic hides the next block's way from memory.
          __builtin_prefetch(h + i + kBlock);
          if constexpr (kWeighted) {
            invalid = invalid + invalid_output(x, lowest) + invalid_weight(w);
            x = select(w > zero, x, lowest);
            mass = mass + w;
          }
          best = max_or_second(x, best);
          V e = A::exp(x - origin);
          if constexpr (kWeighted) {
            e = select(w > zero, e * w, zero);
            largest = max_or_second(e, largest);
          }
          total[u] = total[u] + e;
          square[u] = square[u] + e * e;
        });
      } else {
        for_samples<S, T, kWeighted, kUnroll>(h, weights, block, end, [&](V x, V w, int64_t, int) {
          if constexpr (kWeighted) x = select(w > zero, x, lowest);
          best = max_or_second(x, best);
        });
      }
      const double maximum = horizontal_max(best);
      if (maximum > reference + (known ? kHeadroom : 0.0) && maximum < HUGE_VAL) {
        const double shrink = ::exp(reference - maximum);
        sums.exp_sum *= shrink;
        sums.exp_square *= shrink * shrink;
        sums.exp_largest *= shrink;
        reference = maximum;
        continue;
      }
      if (maximum > sums.maximum) sums.maximum = maximum;
      // A block without a reference holds nothing but -inf and NaN; the latter shows in x - x only.
      if (!known) {
        for_samples<S, T, kWeighted, kUnroll>(h, weights, block, end, [&](V x, V w, int64_t, int) {
          invalid = invalid + invalid_output(x, lowest);
          if constexpr (kWeighted) invalid = invalid + invalid_weight(w), mass = mass + w;
        });
      }
      const V sum = (total[0] + total[1]) + (total[2] + total[3]);
      if constexpr (!kWeighted) invalid = invalid + (sum - sum);  // NaN and +inf samples come out here
      sums.exp_sum += horizontal_sum(sum);
      sums.exp_square += horizontal_sum((square[0] + square[1]) + (square[2] + square[3]));
      if (const double best_weighted = horizontal_max(largest); best_weighted > sums.exp_largest) {
        sums.exp_largest = best_weighted;
      }
      sums.weight += kWeighted ? horizontal_sum(mass) : static_cast<double>(end - block);
      break;
    }
  }
  if (reference > -HUGE_VAL) {
    // From the reference to the maximum, which lies up to kHeadroom above it.
    const double shrink = ::exp(reference - sums.maximum);
    sums.exp_sum *= shrink;
    sums.exp_square *= shrink * shrink;
    sums.exp_largest = kWeighted ? sums.exp_largest * shrink : 1.0;
  }
  sums.invalid = sums.maximum == HUGE_VAL || any(invalid != invalid);
  return sums;
}

// ---- later passes

template <Form kForm, class T, bool kWeighted, Output kOutput, bool kConjugate>
RatioSums ratio_range(const RangeArguments& arguments, const Family& family, const Anchor& anchor) {
  using S = std::conditional_t<kForm == Form::power, double, typename ComputeOf<T>::type>;
  using V = Vec<S>;
  using A = Arithmetic<V>;
  constexpr int kWidth = V::kWidth, kUnroll = 4;
  // The exponential form has all its sums from the first pass.
  constexpr bool kSummed = kForm != Form::exponential;
  constexpr bool kMayStream = sizeof(T) >= 4 && sizeof(S) == sizeof(T);
  const T* h = static_cast<const T*>(arguments.h);
  const T* weights = static_cast<const T*>(arguments.weights);
  T* out = static_cast<T*>(arguments.out);
  const RatioEvaluator<kForm, V> evaluate(family, anchor);
  const V high = A::splat(anchor.high), low = A::splat(anchor.low), zero = A::splat(0.0);
  const V scale = A::splat(arguments.scale);

  RatioSums sums{0.0, 0.0, 0.0, 0.0, 0.0, false};
  V largest = zero;
  const bool streamed = arguments.stream;
  WideSum<S> total;
  for (int64_t block = arguments.begin; block < arguments.end; block += kBlock) {
    const int64_t end = block + kBlock < arguments.end ? block + kBlock : arguments.end;
    V moment[2], square[2], dual[2], pending[kUnroll];
    for (int u = 0; u < 2; ++u) moment[u] = square[u] = dual[u] = zero;

    const auto process = [&](V x, V w, int u) {
      const RatioPoint<V> point = evaluate((high - x) + low);
      V r = point.ratio, m = point.moment, f = point.conjugate;
      if constexpr (kWeighted) {
        // A sample of weight zero takes no part, even where its ratio overflows.
        r = A::select(w > zero, w * r, zero);
        m = A::select(w > zero, w * m, zero);
        if constexpr (kConjugate) f = A::select(w > zero, w * f, zero);
      }
      if constexpr (kSummed) {
        pending[u] = r;
        u %= 2;
        moment[u] = moment[u] + m;
        if constexpr (kOutput != Output::none) {
          square[u] = square[u] + r * r;
          largest = max_or_second(r, largest);
        }
        if constexpr (kConjugate) dual[u] = dual[u] + f;
      }
      return kOutput == Output::log_ratio ? point.log_ratio : point.ratio * scale;
    };
    const auto whole_vector = [&](int64_t i, int u) {
      const V value = process(load_as<S>(h + i), kWeighted ? load_as<S>(weights + i) : zero, u);
      if constexpr (kOutput != Output::none) {
        if constexpr (kMayStream) {
          if (streamed) {
            value.stream(reinterpret_cast<S*>(out) + i);
            return;
          }
        }
        store_as<S>(out + i, value);
      }
    };
    int64_t i = block;
    for (; i + kUnroll * kWidth <= end; i += kUnroll * kWidth) {
#pragma GCC unroll 4
      for (int u = 0; u < kUnroll; ++u) whole_vector(i + u * kWidth, u);
      if constexpr (kSummed) total.add((pending[0] + pending[1]) + (pending[2] + pending[3]));
    }
    for (; i + kWidth <= end; i += kWidth) {
      whole_vector(i, 0);
      if constexpr (kSummed) total.add(pending[0]);
    }
    if (const int64_t count = end - i; count > 0) {
      T lanes[2 * kWidth], weight_lanes[2 * kWidth];
      for (int lane = 0; lane < 2 * kWidth; ++lane) {
        // Padding repeats the last sample, so that it is finite wherever the data are.
        lanes[lane] = h[i + (lane < count ? lane : count - 1)];
        if constexpr (kWeighted) weight_lanes[lane] = weights[i + (lane < count ? lane : count - 1)];
      }
      const VecMask<S> inside = first_lanes<S>(count);
      const V before[3] = {moment[0], square[0], dual[0]};
      const V value = process(load_as<S>(lanes), kWeighted ? load_as<S>(weight_lanes) : zero, 0);
      if constexpr (kSummed) total.add(A::select(inside, pending[0], zero));
      moment[0] = A::select(inside, moment[0], before[0]);
      square[0] = A::select(inside, square[0], before[1]);
      dual[0] = A::select(inside, dual[0], before[2]);
      if constexpr (kOutput != Output::none) {
        store_as<S>(lanes, value);
        for (int64_t lane = 0; lane < count; ++lane) out[i + lane] = lanes[lane];
      }
    }
    sums.moment += horizontal_sum(moment[0] + moment[1]);
    sums.square += horizontal_sum(square[0] + square[1]);
    if constexpr (kConjugate) sums.conjugate += horizontal_sum(dual[0] + dual[1]);
  }
  if (arguments.stream && kMayStream) stream_fence();
  sums.ratio = total.total();
  sums.largest = horizontal_max(largest);
  // Ratios are not negative, so that only a NaN among them makes one of their sum.
  sums.not_a_number = sums.ratio != sums.ratio;
  return sums;
}

ScanSums scan(Storage storage, const RangeArguments& arguments, bool exponential) {
  return with_storage(storage, [&](auto tag) {
    using T = decltype(tag);
    if (arguments.weights) {
      return exponential ? scan_exponential_range<T, true>(arguments) : scan_range<T, true>(arguments);
    }
    return exponential ? scan_exponential_range<T, false>(arguments) : scan_range<T, false>(arguments);
  });
}

template <Form kForm, class T, bool kWeighted>
RatioSums pass_of(const RangeArguments& arguments, const Family& family, const Anchor& anchor, Output output,
                  bool conjugated) {
  if (conjugated) return ratio_range<kForm, T, kWeighted, Output::none, true>(arguments, family, anchor);
  switch (output) {
    case Output::log_ratio:
      return ratio_range<kForm, T, kWeighted, Output::log_ratio, false>(arguments, family, anchor);
    case Output::ratio:
      return ratio_range<kForm, T, kWeighted, Output::ratio, false>(arguments, family, anchor);
    default:
      return ratio_range<kForm, T, kWeighted, Output::none, false>(arguments, family, anchor);
  }
}

RatioSums pass(Storage storage, const RangeArguments& arguments, const Family& family, const Anchor& anchor,
               Output output, bool conjugated) {
  return with_form(family.form, [&](auto form) {
    return with_storage(storage, [&](auto tag) {
      using T = decltype(tag);
      constexpr Form kForm = decltype(form)::value;
      return arguments.weights ? pass_of<kForm, T, true>(arguments, family, anchor, output, conjugated)
                               : pass_of<kForm, T, false>(arguments, family, anchor, output, conjugated);
    });
  });
}

}  // namespace

extern const DensityRatioKernels density_ratio_kernels;
const DensityRatioKernels density_ratio_kernels = {scan, pass};

}  // namespace refine_ext::REFINE_EXT_ISA
