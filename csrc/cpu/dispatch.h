// Which of the compiled instruction sets this process runs: the best the CPU has, or what REFINE_EXT_SIMD
// asks for.
#pragma once

#include <string>
#include <vector>

namespace refine_ext {

enum class Simd : int { baseline, avx2, avx512 };

Simd simd_level();
const char* simd_name(Simd level);
std::vector<std::string> simd_compiled();

// Declares NAME in each compiled instruction set's namespace and defines NAME_table(), which picks one.
#if defined(__x86_64__)
#define REFINE_EXT_KERNEL_TABLE(Type, name) \
  namespace isa_baseline {                  \
  extern const Type name;                   \
  }                                         \
  namespace isa_avx2 {                      \
  extern const Type name;                   \
  }                                         \
  namespace isa_avx512 {                    \
  extern const Type name;                   \
  }                                         \
  inline const Type& name##_table() {       \
    switch (simd_level()) {                 \
      case Simd::avx512:                    \
        return isa_avx512::name;            \
      case Simd::avx2:                      \
        return isa_avx2::name;              \
      default:                              \
        return isa_baseline::name;          \
    }                                       \
  }
#else
#define REFINE_EXT_KERNEL_TABLE(Type, name) \
  namespace isa_baseline {                  \
  extern const Type name;                   \
  }                                         \
  inline const Type& name##_table() { return isa_baseline::name; }
#endif

}  // namespace refine_ext
