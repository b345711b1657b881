// log1p_unit of csrc/cpu/simd.h over arrays of whole vectors, for test_vector_arithmetic.py.
#include "../csrc/cpu/simd.h"

using namespace refine_ext;
using namespace refine_ext::REFINE_EXT_ISA;

template <class S>
void log1p_unit_of(const S* x, S* y, long n) {
  using V = Vec<S>;
  for (long i = 0; i < n; i += V::kWidth) Arithmetic<V>::log1p_unit(V::load(x + i)).store(y + i);
}

extern "C" void single(const float* x, float* y, long n) { log1p_unit_of(x, y, n); }
extern "C" void wide(const double* x, double* y, long n) { log1p_unit_of(x, y, n); }
