// What an op on a CUDA tensor does around its launches: current device and stream, scratch memory.
#pragma once

#include "common.h"

#if defined(REFINE_EXT_CUDA_ON_CPU)
#include "ops_on_cpu.h"  // DeviceGuard, current_stream and Scratch of tests/cuda_on_cpu
#else
#include <torch/csrc/stable/accelerator.h>
#endif

namespace refine_ext::ops {

#if !defined(REFINE_EXT_CUDA_ON_CPU)

using torch::stable::accelerator::DeviceGuard;

// The stream that torch would launch on now; the device guard is set already.
inline void* current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return stream;
}

// From torch's allocator, which keeps memory of a stream for that stream: freeing it does not wait for the
// launches.
class Scratch {
 public:
  Scratch(int64_t bytes, const Tensor& like) {
    if (bytes == 0) return;
    const int64_t doubles = (bytes + 7) / 8;
    memory_ = allocate(&doubles, 1, ScalarType::Double, like);
  }
  void* data() const { return memory_ ? memory_->mutable_data_ptr() : nullptr; }

 private:
  std::optional<Tensor> memory_;
};

#endif

// Makes the tensor's device current.
inline DeviceGuard guard_for(const Tensor& tensor, const char* op, const char* argument) {
  require(is_cuda(tensor), op, ": ", argument, " must be on a CUDA device, as another argument is");
  return DeviceGuard(tensor.get_device_index());
}

// The dispatcher comes here as soon as one tensor is on a CUDA device; the others must be on the same one.
inline void same_device(const Tensor& tensor, const Tensor& like, const char* op, const char* argument) {
  require(is_cuda(tensor) && is_cuda(like) && tensor.get_device_index() == like.get_device_index(), op, ": ",
          argument, " must be on the same CUDA device as the other tensors");
}
inline void same_device(const std::optional<Tensor>& tensor, const Tensor& like, const char* op,
                        const char* argument) {
  if (tensor) same_device(*tensor, like, op, argument);
}

}  // namespace refine_ext::ops
