#include "dispatch.h"

#include <cstdlib>
#include <cstring>

namespace refine_ext {
namespace {

Simd detect() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  // The sets that -march=x86-64-v3 and -v4 let the compiler use, beyond the one each is named for.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  const Simd best = avx512 ? Simd::avx512 : avx2 ? Simd::avx2 : Simd::baseline;
  if (const char* wanted = std::getenv("REFINE_EXT_SIMD")) {
    for (Simd level : {Simd::baseline, Simd::avx2, Simd::avx512}) {
      if (std::strcmp(wanted, simd_name(level)) == 0 && level <= best) return level;
    }
  }
  return best;
#else
  return Simd::baseline;
#endif
}

}  // namespace

Simd simd_level() {
  static const Simd level = detect();
  return level;
}

const char* simd_name(Simd level) {
  switch (level) {
    case Simd::avx512:
      return "avx512";
    case Simd::avx2:
      return "avx2";
    default:
      return "baseline";
  }
}

std::vector<std::string> simd_compiled() {
#if defined(__x86_64__)
  return {"baseline", "avx2", "avx512"};
#else
  return {"baseline"};
#endif
}

}  // namespace refine_ext
