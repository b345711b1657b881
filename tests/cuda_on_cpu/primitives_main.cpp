// Kernels around what the hardware defines rather than a formula: the tensor cores' fragments, matrices from
// and copies to shared memory, Philox's 32-bit multiplications. test_primitives.py compiles this file twice,
// with the emulation and with nvcc, and compares both with NumPy: on a GPU that tells whether the emulation's
// layouts are the hardware's.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "../../csrc/cuda/wgmma.cuh"
#include "../../csrc/math/philox.h"

namespace {

using namespace refine_ext;
using namespace refine_ext::cuda;

// A warp computes a tile of 16 x 8, its fragments read from global memory. A [m, k], B [k, n], D [m, n].
__global__ void product_kernel(const uint16_t* a, const uint16_t* b, float* d, int64_t n, int64_t k) {
  const int lane = static_cast<int>(threadIdx.x), g = lane / 4, t = lane % 4 * 2;
  const int64_t row = blockIdx.x / (n / 8) * 16, column = blockIdx.x % (n / 8) * 8;
  const auto pair = [](uint16_t low, uint16_t high) { return low | static_cast<uint32_t>(high) << 16; };
  float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  for (int64_t from = 0; from < k; from += 16) {
    const uint16_t* left = a + (row + g) * k + from + t;
    const uint16_t* right = b + (from + t) * n + column + g;
    const uint32_t rows[4] = {pair(left[0], left[1]), pair(left[8 * k], left[8 * k + 1]),
                              pair(left[8], left[9]), pair(left[8 * k + 8], left[8 * k + 9])};
    const uint32_t columns[2] = {pair(right[0], right[n]), pair(right[8 * n], right[9 * n])};
    multiply_add(sums, rows, columns);
  }
  float* out = d + (row + g) * n + column + t;
  out[0] = sums[0];
  out[1] = sums[1];
  out[8 * n] = sums[2];
  out[8 * n + 1] = sums[3];
}

// Four warps compute a tile of 16 x 64, sixteen columns each, through dynamic shared memory: A's tile [16,
// 16], then B's [16, 64].
constexpr int kWide = 64, kProductThreads = 128;
__global__ void shared_product_kernel(const uint16_t* a, const uint16_t* b, float* d, int64_t n, int64_t k) {
  REFINE_EXT_DYNAMIC_SHARED(uint16_t, tiles);
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp, lane = thread % kWarp;
  const int64_t row = blockIdx.x / (n / kWide) * 16, column = blockIdx.x % (n / kWide) * kWide;
  float sums[2][4] = {};
  for (int64_t from = 0; from < k; from += 16) {
    for (int i = thread; i < 256; i += kProductThreads) tiles[i] = a[(row + i / 16) * k + from + i % 16];
    for (int i = thread; i < 16 * kWide; i += kProductThreads)
      tiles[256 + i] = b[(from + i / kWide) * n + column + i % kWide];
    __syncthreads();
    uint32_t rows[4], columns[4];
    const int tile_row = lane % 16, tile_column = lane / 16 * 8;
    load_matrices<false>(rows, tiles + tile_row * 16 + tile_column);
    load_matrices<true>(columns, tiles + 256 + tile_row * kWide + warp * 16 + tile_column);
    for (int half = 0; half < 2; ++half) {
      const uint32_t one[2] = {columns[2 * half], columns[2 * half + 1]};
      multiply_add(sums[half], rows, one);
    }
    __syncthreads();
  }
  const int g = lane / 4, t = lane % 4 * 2;
  for (int half = 0; half < 2; ++half) {
    float* out = d + (row + g) * n + column + warp * 16 + half * 8 + t;
    out[0] = sums[half][0];
    out[1] = sums[half][1];
    out[8 * n] = sums[half][2];
    out[8 * n + 1] = sums[half][3];
  }
}

// Bytes: A [m, k], unsigned; B by columns, [n, k], signed or not; D [m, n]. A warp computes a tile of 16 x 8;
// B comes through shared memory, by copies of which one is on its way while the last one's part is
// multiplied.
template <bool kSigned>
__global__ void byte_product_kernel(const unsigned char* a, const unsigned char* b, uint32_t* d, int64_t n,
                                    int64_t k) {
  REFINE_EXT_SHARED(uint4, tiles, [2][8][2]);
  const int lane = static_cast<int>(threadIdx.x), g = lane / 4, t = lane % 4 * 4;
  const int64_t row = blockIdx.x / (n / 8) * 16, column = blockIdx.x % (n / 8) * 8;
  const auto fetch = [&](int64_t from) {
    if (lane < 16 && from < k) {
      copy_async(&tiles[from / 32 % 2][lane / 2][lane % 2],
                 b + (column + lane / 2) * k + from + lane % 2 * 16);
    }
    commit_copies();
  };
  uint32_t sums[4] = {};
  fetch(0);
  for (int64_t from = 0; from < k; from += 32) {
    fetch(from + 32);
    wait_copies<1>();
    __syncthreads();
    const auto word = [](const void* bytes) {
      uint32_t value;
      memcpy(&value, bytes, sizeof(value));
      return value;
    };
    const unsigned char* left = a + (row + g) * k + from + t;
    const auto* right = reinterpret_cast<const unsigned char*>(tiles[from / 32 % 2][g]) + t;
    const uint32_t rows[4] = {word(left), word(left + 8 * k), word(left + 16), word(left + 8 * k + 16)};
    const uint32_t columns[2] = {word(right), word(right + 16)};
    multiply_add<kSigned>(sums, rows, columns);
    __syncthreads();
  }
  uint32_t* out = d + (row + g) * n + column + lane % 4 * 2;
  out[0] = sums[0];
  out[1] = sums[1];
  out[8 * n] = sums[2];
  out[8 * n + 1] = sums[3];
}

// Warpgroups: bfloat16's A [m, k] and B by columns [n, k], through shared memory, 64 x 128 a block; k is a
// multiple of 32, of which one slice is multiplied after the other. D [m, n].
constexpr int kGroupRows = 64, kGroupColumns = 128, kGroupSlice = 32;
__global__ void group_product_kernel(const uint16_t* a, const uint16_t* b, float* d, int64_t n, int64_t k) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(REFINE_EXT_CUDA_ON_CPU)
  REFINE_EXT_DYNAMIC_SHARED_ALIGNED(uint4, tiles, 1024);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp;
  const int64_t tiles_across = n / kGroupColumns;
  const int64_t row = blockIdx.x / tiles_across * kGroupRows;
  const int64_t column = blockIdx.x % tiles_across * kGroupColumns;
  float sums[16][4];
  for (int64_t from = 0; from < k; from += kGroupSlice) {
    for (int i = thread; i < (kGroupRows + kGroupColumns) * 4; i += kWarpgroup) {
      const int r = i / 4, pack = i % 4;
      const uint16_t* source = r < kGroupRows ? a + (row + r) * k : b + (column + r - kGroupRows) * k;
      copy_async(tiles + r * 4 + (pack ^ r / 2 % 4), source + from + 8 * pack);
    }
    commit_copies();
    wait_copies<0>();
    show_to_products();
    __syncthreads();
    const uint64_t left = matrix_at<64>(tiles), right = matrix_at<64>(tiles + kGroupRows * 4);
    keep(sums);
    begin_products();
    if (from == 0) {
      multiply_add_async<true>(sums, left, right);
    } else {
      multiply_add_async<false>(sums, left, right);
    }
    multiply_add_async<false>(sums, left + 2, right + 2);
    commit_products();
    wait_products();
    keep(sums);
    __syncthreads();
  }
  for (int u = 0; u < 16; ++u) {
    for (int i = 0; i < 4; ++i) {
      const int64_t r = row + thread / kWarp * 16 + i / 2 * 8 + lane / 4;
      d[r * n + column + 8 * u + lane % 4 * 2 + i % 2] = sums[u][i];
    }
  }
#endif
}

// The same of bytes, A's from registers, 64 x 64 a block; k is a multiple of 128.
template <bool kSigned>
__global__ void group_byte_product_kernel(const unsigned char* a, const unsigned char* b, uint32_t* d,
                                          int64_t n, int64_t k) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(REFINE_EXT_CUDA_ON_CPU)
  REFINE_EXT_DYNAMIC_SHARED_ALIGNED(uint4, tile, 1024);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp;
  const int64_t tiles_across = n / 64;
  const int64_t row = blockIdx.x / tiles_across * 64, column = blockIdx.x % tiles_across * 64;
  const unsigned char* const left = a + (row + thread / kWarp * 16 + lane / 4) * k + lane % 4 * 4;
  uint32_t sums[8][4] = {};
  for (int64_t from = 0; from < k; from += 128) {
    for (int i = thread; i < 64 * 8; i += kWarpgroup) {
      const int c = i / 8, pack = i % 8;
      copy_async(tile + c * 8 + (pack ^ c % 8), b + (column + c) * k + from + 16 * pack);
    }
    commit_copies();
    wait_copies<0>();
    show_to_products();
    __syncthreads();
    uint32_t rows[4][4];
    for (int step = 0; step < 4; ++step) {
      for (int i = 0; i < 4; ++i)
        memcpy(&rows[step][i], left + i % 2 * 8 * k + from + 32 * step + i / 2 * 16, 4);
    }
    keep(sums);
    begin_products();
    for (int step = 0; step < 4; ++step)
      multiply_add_async<kSigned>(sums, rows[step], matrix_at<128>(tile) + 2 * step);
    commit_products();
    wait_products();
    keep(sums);
    __syncthreads();
  }
  for (int u = 0; u < 8; ++u) {
    for (int i = 0; i < 4; ++i) {
      const int64_t r = row + thread / kWarp * 16 + i / 2 * 8 + lane / 4;
      d[r * n + column + 8 * u + lane % 4 * 2 + i % 2] = sums[u][i];
    }
  }
#endif
}

// in: counters of four words and keys of two, out: blocks of four.
__global__ void philox_kernel(const uint32_t* in, uint32_t* out, int64_t count) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * 32 + threadIdx.x;
  if (i >= count) return;
  const uint32_t* from = in + 6 * i;
  const auto block = philox4x32<uint32_t>({{from[0], from[1], from[2], from[3]}}, from[4], from[5]);
  for (int word = 0; word < 4; ++word) out[4 * i + word] = block.word[word];
}

// Of exactly so many bytes, where the kernels run.
class Memory {
 public:
  explicit Memory(size_t bytes) : bytes_(bytes) {
#if defined(REFINE_EXT_CUDA_ON_CPU)
    data_ = std::malloc(bytes);
#else
    check(cudaMalloc(&data_, bytes), "primitives");
#endif
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory() {
#if defined(REFINE_EXT_CUDA_ON_CPU)
    std::free(data_);
#else
    cudaFree(data_);
#endif
  }
  void copy_from(const void* host) { copy(data_, host); }
  void copy_to(void* host) const { copy(host, data_); }
  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  void copy(void* to, const void* from) const {
    if (bytes_ == 0) return;
#if defined(REFINE_EXT_CUDA_ON_CPU)
    std::memcpy(to, from, bytes_);
#else
    check(cudaMemcpy(to, from, bytes_, cudaMemcpyDefault), "primitives");
#endif
  }
  void* data_ = nullptr;
  size_t bytes_;
};

// As test_primitives.py packs it.
struct Request {
  int64_t op, m, n, k;
};
enum Op : int64_t {
  product,
  shared_product,
  philox,
  unsigned_product,
  signed_product,
  group_product,
  unsigned_group_product,
  signed_group_product
};

bool read_exactly(void* to, size_t bytes) { return bytes == 0 || std::fread(to, bytes, 1, stdin) == 1; }

}  // namespace

int main() {
  Request r;
  if (!read_exactly(&r, sizeof(r))) return 2;
  std::vector<std::vector<char>> received(2);
  for (auto& array : received) {
    int64_t size = 0;
    if (!read_exactly(&size, sizeof(size))) return 2;
    array.resize(static_cast<size_t>(size));
    if (!read_exactly(array.data(), array.size())) return 2;
  }
  Memory a(received[0].size()), b(received[1].size());
  a.copy_from(received[0].data());
  b.copy_from(received[1].data());
  std::vector<char> result(static_cast<size_t>(r.op == philox ? r.m * 16 : r.m * r.n * 4), '\xff');
  Memory out(result.size());
  out.copy_from(result.data());
  if (r.op == product) {
    launch("product", product_kernel, r.m / 16 * (r.n / 8), kWarp, nullptr, a.as<uint16_t>(),
           b.as<uint16_t>(), out.as<float>(), r.n, r.k);
  } else if (r.op == shared_product) {
    launch_with_shared("shared_product", shared_product_kernel, r.m / 16 * (r.n / kWide), kProductThreads,
                       (256 + 16 * kWide) * 2, nullptr, a.as<uint16_t>(), b.as<uint16_t>(), out.as<float>(),
                       r.n, r.k);
  } else if (r.op == unsigned_product || r.op == signed_product) {
    launch("byte_product", r.op == signed_product ? byte_product_kernel<true> : byte_product_kernel<false>,
           r.m / 16 * (r.n / 8), kWarp, nullptr, a.as<unsigned char>(), b.as<unsigned char>(),
           out.as<uint32_t>(), r.n, r.k);
  } else if (r.op == group_product) {
    launch_with_shared("group_product", group_product_kernel, r.m / kGroupRows * (r.n / kGroupColumns),
                       kWarpgroup, (kGroupRows + kGroupColumns) * 64, nullptr, a.as<uint16_t>(),
                       b.as<uint16_t>(), out.as<float>(), r.n, r.k);
  } else if (r.op == unsigned_group_product || r.op == signed_group_product) {
    launch_with_shared(
        "group_byte_product",
        r.op == signed_group_product ? group_byte_product_kernel<true> : group_byte_product_kernel<false>,
        r.m / 64 * (r.n / 64), kWarpgroup, 64 * 128, nullptr, a.as<unsigned char>(), b.as<unsigned char>(),
        out.as<uint32_t>(), r.n, r.k);
  } else {
    launch("philox", philox_kernel, (r.m + 31) / 32, 32, nullptr, a.as<uint32_t>(), out.as<uint32_t>(), r.m);
  }
  out.copy_to(result.data());
  return std::fwrite(result.data(), 1, result.size(), stdout) == result.size() ? 0 : 1;
}
