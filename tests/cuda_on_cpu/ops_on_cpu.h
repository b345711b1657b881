// What csrc/ops/cuda.h takes from torch, for ops whose kernels run on the host.
#pragma once

#include <cstring>
#include <exception>
#include <memory>

namespace refine_ext::ops {

struct [[maybe_unused]] DeviceGuard {
  explicit DeviceGuard(int32_t) {}
};

inline void* current_stream(const Tensor&) { return nullptr; }

// Memory of exactly `bytes` bytes, NaN to whoever reads before writing, between two stretches that nothing
// may touch: an op that asked for too little fails.
class Scratch {
 public:
  Scratch(int64_t bytes, const Tensor&) : bytes_(static_cast<size_t>(bytes)) {
    if (bytes == 0) return;
    memory_ = std::make_unique<unsigned char[]>(bytes_ + 2 * kMargin);
    std::memset(memory_.get(), kUntouched, bytes_ + 2 * kMargin);
    std::memset(data(), 0xff, bytes_);
  }
  ~Scratch() noexcept(false) {
    for (size_t i = 0; memory_ && i < kMargin; ++i) {
      const bool untouched = memory_[i] == kUntouched && memory_[kMargin + bytes_ + i] == kUntouched;
      if (!untouched && std::uncaught_exceptions() == 0)
        fail("a kernel wrote beyond its workspace of ", bytes_, " bytes");
    }
  }
  unsigned char* data() const { return memory_ ? memory_.get() + kMargin : nullptr; }

 private:
  static constexpr size_t kMargin = 256;
  static constexpr unsigned char kUntouched = 0xa5;
  size_t bytes_;
  std::unique_ptr<unsigned char[]> memory_;
};

}  // namespace refine_ext::ops
