// Blocks of a kernel that share a multiprocessor, by NVIDIA's own calculator: the header needs no GPU.
#include <cuda_occupancy.h>

#include <climits>
#include <cstddef>
#include <cstring>

// The properties of a multiprocessor come from the caller; -1 where the calculator refuses them.
extern "C" int blocks_of(int major, int minor, int threads_limit, int shared_limit, int registers, int shared,
                         int threads) {
  constexpr int kSharedReserved = 1024;  // of each block, from compute capability 8 on
  cudaOccDeviceProp device;
  std::memset(static_cast<void*>(&device), 0, sizeof(device));
  device.computeMajor = major;
  device.computeMinor = minor;
  device.maxThreadsPerBlock = 1024;
  device.maxThreadsPerMultiprocessor = threads_limit;
  device.regsPerBlock = device.regsPerMultiprocessor = 65536;
  device.warpSize = 32;
  device.sharedMemPerBlock = 48 * 1024;
  device.sharedMemPerMultiprocessor = static_cast<std::size_t>(shared_limit);
  device.sharedMemPerBlockOptin = static_cast<std::size_t>(shared_limit - kSharedReserved);
  device.reservedSharedMemPerBlock = kSharedReserved;
  device.numSms = 1;

  cudaOccFuncAttributes kernel;
  std::memset(static_cast<void*>(&kernel), 0, sizeof(kernel));
  kernel.maxThreadsPerBlock = INT_MAX;
  kernel.numRegs = registers;
  kernel.sharedSizeBytes = static_cast<std::size_t>(shared);
  kernel.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;

  cudaOccDeviceState state;
  cudaOccResult result;
  const int error = cudaOccMaxActiveBlocksPerMultiprocessor(&result, &device, &kernel, &state, threads, 0);
  return error == CUDA_OCC_SUCCESS ? result.activeBlocksPerMultiprocessor : -1;
}
