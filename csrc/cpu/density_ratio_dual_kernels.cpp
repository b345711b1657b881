// Elementwise kernels of the density-ratio family, compiled once per instruction set: the gradient of log r
// with respect to h, and f'(e^x) of logits with its sums and slopes.
#include "density_ratio_dispatch.h"

namespace refine_ext::REFINE_EXT_ISA {
namespace {

// ---- gradient of log r with respect to h

template <Form kForm, class V>
REFINE_EXT_INLINE V factor_at(Family family, V log_ratio) {
  family.form = kForm;  // lets the switch in score_factor fold
  using A = Arithmetic<V>;
  const V factor = score_factor(family, log_ratio);
  // Where the ratio is clipped to zero it does not move: c = 0, not k 0^c.
  if (family.c < 0.0) {
    return A::select(log_ratio == A::splat(-HUGE_VAL), A::splat(0.0), factor);
  }
  return factor;
}

// The first `count` of a vector, the last of them in its other lanes.
template <class T>
REFINE_EXT_INLINE Vec<typename ComputeOf<T>::type> load_first(const T* p, int64_t count) {
  T lanes[Vec<typename ComputeOf<T>::type>::kWidth];
  for (int lane = 0; lane < Vec<typename ComputeOf<T>::type>::kWidth; ++lane) {
    lanes[lane] = p[lane < count ? lane : count - 1];
  }
  return load(lanes);
}

// For the body of a loop that costs little more than a call would.
#define REFINE_EXT_INLINED __attribute__((always_inline))

template <class T, class Body>
REFINE_EXT_INLINE void for_elements(int64_t begin, int64_t end, const T* const* inputs, int count, T* out,
                                    Body&& body) {
  using V = Vec<typename ComputeOf<T>::type>;
  constexpr int kWidth = V::kWidth;
  for_vectors<kWidth, 1>(
      begin, end,
      [&](int64_t i, int) {
        V x[3];
        for (int k = 0; k < count; ++k) x[k] = load(inputs[k] + i);
        const V value = body(x, kWidth);
        if (out) store(out + i, value);
      },
      [&](int64_t i, int64_t rest) {
        V x[3];
        for (int k = 0; k < count; ++k) x[k] = load_first(inputs[k] + i, rest);
        const V value = body(x, rest);
        if (out) {
          T lanes[kWidth];
          store(lanes, value);
          for (int64_t lane = 0; lane < rest; ++lane) out[i + lane] = lanes[lane];
        }
      });
}

template <Form kForm, class T>
void backward_sums_range(const T* grad, const T* log_ratio, const T* weights, int64_t begin, int64_t end,
                         const Family& family, double sums[2]) {
  using S = typename ComputeOf<T>::type;
  using V = Vec<S>;
  using A = Arithmetic<V>;
  const T* inputs[3] = {grad, log_ratio, weights};
  const V zero = A::splat(0.0);
  sums[0] = sums[1] = 0.0;
  for (int64_t block = begin; block < end; block += kBlock) {
    V through = zero, slope = zero;
    for_elements<T>(block, block + kBlock < end ? block + kBlock : end, inputs, weights ? 3 : 2,
                    static_cast<T*>(nullptr), [&](const V* x, int64_t count) {
                      const V c = factor_at<kForm>(family, x[1]);
                      V share = A::exp(x[1]);
                      share = A::select(share == zero, zero, share * c);
                      if (weights) share = A::select(x[2] > zero, share * x[2], zero);
                      const VecMask<S> inside = first_lanes<S>(count);
                      // A clipped sample passes nothing on, whatever its upstream gradient (inf * 0); neither
                      // does one of weight zero outside the domain, whose log r is NaN, unless it is asked
                      // for.
                      const V moved = A::select(x[0] == zero, zero, A::select(c == zero, zero, c * x[0]));
                      through = through + A::select(inside, moved, zero);
                      slope = slope + A::select(inside, share, zero);
                      return zero;
                    });
    sums[0] += horizontal_sum(through);
    sums[1] += horizontal_sum(slope);
  }
}

template <Form kForm, class T>
void backward_range(const T* grad, const T* log_ratio, const T* weights, T* out, int64_t begin, int64_t end,
                    const Family& family, double through_ratio) {
  using V = Vec<typename ComputeOf<T>::type>;
  using A = Arithmetic<V>;
  const T* inputs[3] = {grad, log_ratio, weights};
  const V scale = A::splat(through_ratio), zero = A::splat(0.0);
  for_elements<T>(begin, end, inputs, weights ? 3 : 2, out, [&](const V* x, int64_t) {
    const V c = factor_at<kForm>(family, x[1]);
    V share = A::exp(x[1]) * scale;
    if (weights) share = A::select(x[2] > zero, share * x[2], zero);
    const V total = x[0] + share;
    return A::select(total == zero, zero, A::select(c == zero, zero, c * total));
  });
}

// ---- f'(e^x) of logits

template <Form kForm, class T>
void dual_output_range(const T* x, T* out, int64_t begin, int64_t end, Family family) {
  using V = Vec<typename ComputeOf<T>::type>;
  family.form = kForm;
  const T* inputs[3] = {x, nullptr, nullptr};
  for_elements<T>(begin, end, inputs, 1, out,
                  [&](const V* v, int64_t) REFINE_EXT_INLINED { return dual_output(family, v[0]); });
}

template <Form kForm, class T>
void dual_slope_range(const T* x, const T* grad, double scale, T* out, int64_t begin, int64_t end,
                      Family family, bool conjugated) {
  using V = Vec<typename ComputeOf<T>::type>;
  family.form = kForm;
  const T* inputs[3] = {x, grad, nullptr};
  const V factor = Arithmetic<V>::splat(scale);
  for_elements<T>(begin, end, inputs, grad ? 2 : 1, out, [&](const V* v, int64_t) REFINE_EXT_INLINED {
    const V slope = conjugated ? conjugate_slope(family, v[0]) : dual_slope(family, v[0]);
    return (grad ? v[1] * factor : factor) * slope;
  });
}

// A sum of softplus(x) in float64. Of the logarithms it takes one, of the product 1 + p of all 1 + y: another
// factor adds y + p y to p, both at least 0, so that the smallest y counts.
template <class S>
struct SoftplusSum {
  using D = Vec<double>;
  static constexpr int64_t kMost = 1000;  // vectors: each doubles the product at most, which is a double
  WideSum<S> linear;
  WideLanes p{D::splat(0.0), D::splat(0.0)};

  REFINE_EXT_INLINE void add(Vec<S> x) {
    const SoftplusParts<Vec<S>> parts = softplus_parts(x);
    linear.add(parts.linear);
    const WideLanes y = wide_lanes(parts.excess);
    p.low = p.low + (y.low + p.low * y.low);
    if constexpr (sizeof(S) == 4) p.high = p.high + (y.high + p.high * y.high);
  }
  REFINE_EXT_INLINE double total() const {
    D logarithm = Arithmetic<D>::log1p(p.low);
    if constexpr (sizeof(S) == 4) logarithm = logarithm + Arithmetic<D>::log1p(p.high);
    return linear.total() + horizontal_sum(logarithm);
  }
};

// Of sign * x.
template <class T>
double softplus_sum(const T* x, int64_t begin, int64_t end, double sign) {
  using S = typename ComputeOf<T>::type;
  using V = Vec<S>;
  constexpr int64_t kWidth = V::kWidth, kMost = SoftplusSum<S>::kMost * kWidth;
  const V factor = V::splat(static_cast<S>(sign)), none = V::splat(-std::numeric_limits<S>::infinity());
  double total = 0.0;
  for (int64_t block = begin; block < end; block += kMost) {
    const int64_t stop = block + kMost < end ? block + kMost : end;
    SoftplusSum<S> sum;
    int64_t i = block;
    for (; i + kWidth <= stop; i += kWidth) sum.add(factor * load(x + i));
    if (i < stop) sum.add(select(first_lanes<S>(stop - i), factor * load_first(x + i, stop - i), none));
    total += sum.total();
  }
  return total;
}

template <Form kForm, class T>
double dual_sum_range(const T* x, int64_t begin, int64_t end, Family family, bool conjugated) {
  if constexpr (kForm == Form::logistic) {
    const double n = static_cast<double>(end - begin);
    const double sum = softplus_sum(x, begin, end, conjugated ? 1.0 : -1.0);
    return conjugated ? sum + n * family.conjugate_offset : n * family.supremum - sum;
  }
  using S = typename ComputeOf<T>::type;
  using V = Vec<S>;
  using A = Arithmetic<V>;
  family.form = kForm;
  const T* inputs[3] = {x, nullptr, nullptr};
  // In float64: outputs may share an offset, which the mean of f* takes off again.
  WideSum<S> total;
  for_elements<T>(begin, end, inputs, 1, static_cast<T*>(nullptr),
                  [&](const V* v, int64_t count) REFINE_EXT_INLINED {
                    const V value = conjugated ? conjugate(family, v[0]) : dual_output(family, v[0]);
                    total.add(A::select(first_lanes<S>(count), value, A::splat(0.0)));
                    return value;
                  });
  return total.total();
}

void backward_sums(Storage storage, const void* grad, const void* log_ratio, const void* weights,
                   int64_t begin, int64_t end, const Family& family, double sums[2]) {
  with_form(family.form, [&](auto form) {
    with_storage(storage, [&](auto tag) {
      using T = decltype(tag);
      backward_sums_range<decltype(form)::value>(static_cast<const T*>(grad),
                                                 static_cast<const T*>(log_ratio),
                                                 static_cast<const T*>(weights), begin, end, family, sums);
    });
  });
}

void backward(Storage storage, const void* grad, const void* log_ratio, const void* weights, void* out,
              int64_t begin, int64_t end, const Family& family, double through_ratio) {
  with_form(family.form, [&](auto form) {
    with_storage(storage, [&](auto tag) {
      using T = decltype(tag);
      backward_range<decltype(form)::value>(static_cast<const T*>(grad), static_cast<const T*>(log_ratio),
                                            static_cast<const T*>(weights), static_cast<T*>(out), begin, end,
                                            family, through_ratio);
    });
  });
}

void dual_output_pass(Storage storage, const void* x, void* out, int64_t begin, int64_t end,
                      const Family& family) {
  with_form(family.form, [&](auto form) {
    with_storage(storage, [&](auto tag) {
      using T = decltype(tag);
      dual_output_range<decltype(form)::value>(static_cast<const T*>(x), static_cast<T*>(out), begin, end,
                                               family);
    });
  });
}

void dual_slope_pass(Storage storage, const void* x, const void* grad, double scale, void* out, int64_t begin,
                     int64_t end, const Family& family, bool conjugated) {
  with_form(family.form, [&](auto form) {
    with_storage(storage, [&](auto tag) {
      using T = decltype(tag);
      dual_slope_range<decltype(form)::value>(static_cast<const T*>(x), static_cast<const T*>(grad), scale,
                                              static_cast<T*>(out), begin, end, family, conjugated);
    });
  });
}

double dual_sum(Storage storage, const void* x, int64_t begin, int64_t end, const Family& family,
                bool conjugated) {
  return with_form(family.form, [&](auto form) {
    return with_storage(storage, [&](auto tag) {
      using T = decltype(tag);
      return dual_sum_range<decltype(form)::value>(static_cast<const T*>(x), begin, end, family, conjugated);
    });
  });
}

}  // namespace

extern const DualKernels density_ratio_dual_kernels;
const DualKernels density_ratio_dual_kernels = {backward_sums, backward, dual_output_pass, dual_slope_pass,
                                                dual_sum};

}  // namespace refine_ext::REFINE_EXT_ISA
