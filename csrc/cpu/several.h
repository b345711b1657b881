// Several vectors as one arithmetic type. A formula of csrc/math on it becomes that many chains of
// instructions side by side, which keep a processor busy that looks about a hundred instructions ahead.
// Included by sources that are compiled once per instruction set.
#pragma once

#include <type_traits>

#include "philox_simd.h"

namespace refine_ext::REFINE_EXT_ISA {

template <class T, int N>
struct Several {
  T part[N];
};

// f(0), f(1), ...
template <int N, class F>
REFINE_EXT_INLINE auto several(F&& f) {
  Several<std::decay_t<decltype(f(0))>, N> result;
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) result.part[i] = f(i);
  return result;
}

#define REFINE_EXT_OPERATOR(op)                                                        \
  template <class T, int N>                                                            \
  REFINE_EXT_INLINE auto operator op(const Several<T, N>& a, const Several<T, N>& b) { \
    return several<N>([&](int i) { return a.part[i] op b.part[i]; });                  \
  }
REFINE_EXT_OPERATOR(+)
REFINE_EXT_OPERATOR(-)
REFINE_EXT_OPERATOR(*)
REFINE_EXT_OPERATOR(<)
REFINE_EXT_OPERATOR(^)
#undef REFINE_EXT_OPERATOR

// With one number for all.
#define REFINE_EXT_OPERATOR(op)                                                                 \
  template <class T, int N, class Number, class = std::enable_if_t<std::is_integral_v<Number>>> \
  REFINE_EXT_INLINE auto operator op(const Several<T, N>& a, Number b) {                        \
    return several<N>([&](int i) { return a.part[i] op b; });                                   \
  }
REFINE_EXT_OPERATOR(+)
REFINE_EXT_OPERATOR(^)
REFINE_EXT_OPERATOR(<<)
#undef REFINE_EXT_OPERATOR

template <int N>
REFINE_EXT_INLINE void multiply_wide(const Several<Lanes, N>& a, uint32_t b, Several<Lanes, N>& high,
                                     Several<Lanes, N>& low) {
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) multiply_wide(a.part[i], b, high.part[i], low.part[i]);
}

}  // namespace refine_ext::REFINE_EXT_ISA

namespace refine_ext {

// What Box-Muller asks of it (csrc/math/normal.h).
template <class V, int N>
struct Arithmetic<REFINE_EXT_ISA::Several<V, N>> {
  using One = Arithmetic<V>;
  using Scalar = typename One::Scalar;
  using Values = REFINE_EXT_ISA::Several<V, N>;
  using Mask = REFINE_EXT_ISA::Several<typename One::Mask, N>;
  static REFINE_EXT_INLINE Values splat(double value) {
    return REFINE_EXT_ISA::several<N>([&](int) { return One::splat(value); });
  }
  static REFINE_EXT_INLINE Values select(const Mask& mask, const Values& yes, const Values& no) {
    return REFINE_EXT_ISA::several<N>(
        [&](int i) { return One::select(mask.part[i], yes.part[i], no.part[i]); });
  }
  static REFINE_EXT_INLINE Values log(const Values& x) {
    return REFINE_EXT_ISA::several<N>([&](int i) { return One::log(x.part[i]); });
  }
  static REFINE_EXT_INLINE Values sqrt(const Values& x) {
    return REFINE_EXT_ISA::several<N>([&](int i) { return One::sqrt(x.part[i]); });
  }
};

}  // namespace refine_ext
