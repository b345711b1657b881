// Arithmetic<float> as the CUDA kernels use it, over arrays, for test_float_arithmetic.py.
#include "../csrc/math/normal.h"

using Float = refine_ext::Arithmetic<float>;

extern "C" void exp_and_expm1(const float* x, float* e, float* em1, long n) {
  for (long i = 0; i < n; ++i) Float::exp_and_expm1(x[i], e[i], em1[i]);
}
extern "C" void log1p_of(const float* x, float* y, long n) {
  for (long i = 0; i < n; ++i) y[i] = Float::log1p(x[i]);
}
extern "C" void log_of(const float* x, float* y, long n) {
  for (long i = 0; i < n; ++i) y[i] = Float::log(x[i]);
}
extern "C" void squared_radius_of(const uint32_t* w, float* y, long n) {
  for (long i = 0; i < n; ++i) y[i] = refine_ext::squared_radius<float>(w[i]);
}
