// normal_pair of csrc/math/normal.h on given words, for test_philox_normal.py: as SIMD vectors and as a
// scalar.
#include "../csrc/cpu/normal_simd.h"

using namespace refine_ext;
using namespace refine_ext::REFINE_EXT_ISA;

extern "C" void single(const uint32_t* radius, const uint32_t* angle, float* cosine, float* sine, long n) {
  for (long i = 0; i < n; i += Vec<float>::kWidth) {
    Unsigned words[2];
    std::memcpy(&words[0], radius + i, sizeof(Unsigned));
    std::memcpy(&words[1], angle + i, sizeof(Unsigned));
    const auto pair = normal_pair<Vec<float>>(words[0], words[1]);
    pair.cosine.store(cosine + i);
    pair.sine.store(sine + i);
  }
}

extern "C" void wide(const uint32_t* radius, const uint32_t* angle, double* cosine, double* sine, long n) {
  for (long i = 0; i < n; i += Vec<double>::kWidth) {
    Lanes::Native words[2];
    for (int l = 0; l < Vec<double>::kWidth; ++l) {
      // The upper half of a lane is anything.
      words[0][l] = radius[i + l] | uint64_t{0xdeadbeef} << 32;
      words[1][l] = angle[i + l] | uint64_t{0xfeedface} << 32;
    }
    const auto pair = normal_pair<Vec<double>>(words[0], words[1]);
    pair.cosine.store(cosine + i);
    pair.sine.store(sine + i);
  }
}

extern "C" void scalar(const uint32_t* radius, const uint32_t* angle, double* cosine, double* sine, long n) {
  for (long i = 0; i < n; ++i) {
    const auto pair = normal_pair<double>(radius[i], angle[i]);
    cosine[i] = pair.cosine;
    sine[i] = pair.sine;
  }
}
