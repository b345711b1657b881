// What every op does before and after its kernel: checks with readable errors, allocation, storage types.
// The LibTorch stable ABI is used in csrc/ops only.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstring>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "../math/density_ratio_problem.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

// The tests register the CUDA ops a second time, under another name and for tensors on the CPU, with the
// kernels run by tests/cuda_on_cpu.
#if defined(REFINE_EXT_CUDA_ON_CPU)
#define REFINE_EXT_LIBRARY refine_ext_on_cpu
#define REFINE_EXT_CUDA_KEY CPU
#else
#define REFINE_EXT_LIBRARY refine_ext
#define REFINE_EXT_CUDA_KEY CUDA
#endif

namespace refine_ext::ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Errors start with this, by which the Python layer knows its own and turns them into ValueError.
inline constexpr const char* kErrorPrefix = "refine_ext: ";

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  message << kErrorPrefix;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

template <class... Parts>
void require(bool condition, const Parts&... parts) {
  if (__builtin_expect(!condition, 0)) fail(parts...);
}

inline std::string shape_of(const Tensor& tensor) {
  std::ostringstream text;
  text << '[';
  for (int64_t d = 0; d < tensor.dim(); ++d) text << (d ? ", " : "") << tensor.size(d);
  text << ']';
  return text.str();
}

inline bool is_float(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::Half ||
         type == ScalarType::BFloat16;
}

inline bool is_cuda(const Tensor& tensor) {
  int32_t device_type;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &device_type));
#if defined(REFINE_EXT_CUDA_ON_CPU)
  return device_type == aoti_torch_device_type_cpu();
#else
  return device_type == aoti_torch_device_type_cuda();
#endif
}

// Contiguous, on h's device; the same handle where it already is.
inline Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

inline Tensor allocate(const int64_t* sizes, int64_t dims, ScalarType type, const Tensor& like) {
  int64_t strides[16];
  require(dims <= 16, "tensors of more than 16 dimensions are not supported, got ", dims);
  int64_t stride = 1;
  for (int64_t d = dims - 1; d >= 0; --d) {
    strides[d] = stride;
    stride *= sizes[d] > 0 ? sizes[d] : 1;
  }
  int32_t device_type;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  int32_t dtype;
  switch (type) {
    case ScalarType::Double:
      dtype = aoti_torch_dtype_float64();
      break;
    case ScalarType::Half:
      dtype = aoti_torch_dtype_float16();
      break;
    case ScalarType::BFloat16:
      dtype = aoti_torch_dtype_bfloat16();
      break;
    case ScalarType::Long:
      dtype = aoti_torch_dtype_int64();
      break;
    case ScalarType::Bool:
      dtype = aoti_torch_dtype_bool();
      break;
    default:
      dtype = aoti_torch_dtype_float32();
  }
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dims, sizes, strides, dtype, device_type, like.get_device_index(), &handle));
  Tensor tensor(handle);
#if defined(REFINE_EXT_CUDA_ON_CPU)
  // NaN, or -1: what a kernel leaves unwritten shows.
  const size_t bytes = static_cast<size_t>(tensor.numel()) * static_cast<size_t>(tensor.element_size());
  if (bytes > 0) std::memset(tensor.mutable_data_ptr(), 0xff, bytes);
#endif
  return tensor;
}

// Allocates [..., last], or [...] for last < 0, where `like` is [..., n].
inline Tensor new_rows(const Tensor& like, int64_t last, ScalarType type) {
  int64_t sizes[16];
  const int64_t dims = like.dim();
  require(dims <= 16, "tensors of more than 16 dimensions are not supported, got ", dims);
  for (int64_t d = 0; d + 1 < dims; ++d) sizes[d] = like.size(d);
  if (last >= 0) sizes[dims - 1] = last;
  return allocate(sizes, last >= 0 ? dims : dims - 1, type, like);
}

struct Rows {
  int64_t rows, n;
};

inline Storage storage_of(const Tensor& tensor, const char* op, const char* argument) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Storage::float32;
    case ScalarType::Double:
      return Storage::float64;
    case ScalarType::Half:
      return Storage::float16;
    case ScalarType::BFloat16:
      return Storage::bfloat16;
    default:
      fail(op, ": ", argument, " must be float64, float32, float16 or bfloat16");
  }
}

// A large fresh output costs more in page faults than in arithmetic; huge pages take most of that away.
inline void advise_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kHuge = uintptr_t{2} << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHuge - 1) / kHuge * kHuge;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) / kHuge * kHuge;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

inline Tensor allocate_like(const Tensor& like) {
  std::vector<int64_t> sizes(like.dim());
  for (size_t d = 0; d < sizes.size(); ++d) sizes[d] = like.size(static_cast<int64_t>(d));
  Tensor tensor = allocate(sizes.data(), static_cast<int64_t>(sizes.size()), like.scalar_type(), like);
  const int64_t bytes = static_cast<int64_t>(tensor.numel() * tensor.element_size());
  if (bytes >= int64_t{2} << 20 && !is_cuda(tensor)) advise_huge_pages(tensor.mutable_data_ptr(), bytes);
  return tensor;
}

}  // namespace refine_ext::ops
