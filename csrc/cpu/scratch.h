// Uninitialised working memory. Large blocks ask for huge pages: faulting in 4 KB pages costs more than the
// arithmetic.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace refine_ext {

template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t count) {
    constexpr size_t kHuge = size_t{2} << 20;
    const size_t bytes = static_cast<size_t>(count) * sizeof(T);
    const size_t alignment = bytes >= 2 * kHuge ? kHuge : 64;
    const size_t rounded = (bytes + alignment - 1) / alignment * alignment;
    data_ = static_cast<T*>(std::aligned_alloc(alignment, rounded ? rounded : alignment));
    if (!data_) throw std::bad_alloc();
#if defined(__linux__)
    if (alignment == kHuge) madvise(data_, rounded, MADV_HUGEPAGE);
#endif
  }
  ~Scratch() { std::free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* data() const { return data_; }

 private:
  T* data_;
};

}  // namespace refine_ext
