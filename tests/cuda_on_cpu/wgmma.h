// What the products by warpgroups of csrc/cuda/wgmma.cuh do on the host (PTX ISA, "Asynchronous Warpgroup
// Level Matrix Instructions").
//
// A product is made at the last moment at which the hardware may: when its warp waits for its group. From its
// issue until then its sums hold kUnknown, and whoever touches them is reported. Its operands are read, for
// the sanitizers, when it is issued, and once more when it is waited for, which is what it is made of:
// whoever writes there meanwhile races, or spoils the sums. Descriptors are taken apart as the hardware does,
// and all addresses are those of the block's shared memory.
//
// Reported besides: a product that not all 128 threads of a warpgroup issue together; without wgmma.fence
// since the last wait; on what a copy brought whose thread did not fence the proxies since it arrived.
//
// Not modelled: sums or registers of A that are written between wgmma.fence and the product, registers of A
// that are written before the wait, and plain stores to shared memory without a fence of the proxies. The
// hardware's own order and rounding of the sums is neither: they are float64's, rounded once a product.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <vector>

#include "cuda_on_cpu.h"

namespace cuda_on_cpu {

inline constexpr int kSummands = 32;      // bytes of a row of an operand
inline constexpr int kProductRows = 16;   // of A, a warp's
inline constexpr int kMostColumns = 128;  // of B

enum class ProductKind { bfloat16, unsigned_bytes, signed_bytes };  // A's bytes are unsigned

// As a thread issues it.
struct Product {
  ProductKind kind;
  int columns;
  bool clear;                       // the sums begin at zero
  bool a_in_registers;              // or in shared memory
  uint64_t a, b;                    // descriptors
  uint32_t fragment[4];             // A's registers
  uint32_t* sums;                   // columns / 2 registers
  uint64_t operands;                // what read_operands said at the issue
  unsigned char own[2][kSummands];  // the thread's rows of A, of registers
};

// A thread's products, in groups, the last of which is open; and the sums that are not known yet.
struct ProductQueue {
  struct Sums {
    uint32_t* registers;
    std::vector<uint32_t> values;
    int products;
  };
  std::deque<std::vector<Product>> groups{1};
  std::vector<Sums> sums;
  bool fenced = false;
  uint64_t made = 0;
};

// A warp's operands of the product that it is at.
struct ProductOperands {
  uint64_t product = 0;  // its number, from 1 on
  double a[kProductRows][kSummands], b[kMostColumns][kSummands];
};

// The address of shared memory that instructions see.
uint32_t shared_address(const void* pointer, const char* file, int line);
void fence_proxies();
void fence_products();
void start_product(Product product, const char* file, int line);
void commit_products();
// The next product of the groups before the last `pending`; nullptr: none is left, and the threads go on.
const Product* next_product(int pending, const char* file, int line);
void finish_product(const char* file, int line);

// 16 bytes of a row of what a descriptor describes; with `arrived` they must be there for the products.
const volatile uint64_t* operand_chunk(uint64_t descriptor, int row, int chunk, bool arrived,
                                       const char* file, int line);

// A warp's lanes read all that its part of a product does. Returns what a change of it changes.
inline uint64_t read_operands(const Product& product, bool arrived, const char* file, int line) {
  uint64_t sum = 0;
  const auto read = [&](uint64_t descriptor, int row) {
    for (int chunk = 0; chunk < 2; ++chunk) {
      const volatile uint64_t* words = operand_chunk(descriptor, row, chunk, arrived, file, line);
      for (int i = 0; i < 2; ++i) sum = (sum ^ words[i]) * 0x9e3779b97f4a7c15u;
    }
  };
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
  for (int column = lane; column < product.columns; column += 32) read(product.b, column);
  if (!product.a_in_registers && lane < kProductRows)
    read(product.a, thread % 128 / 32 * kProductRows + lane);
  return sum;
}

inline void issue(Product& product, const char* file, int line) {
  product.operands = read_operands(product, true, file, line);
  start_product(product, file, line);
}

// 64 x 64 x 32, A in registers.
inline void multiply_bytes_async(uint32_t* sums, const uint32_t (&a)[4], uint64_t b, bool is_signed,
                                 const char* file, int line) {
  Product product{};
  product.kind = is_signed ? ProductKind::signed_bytes : ProductKind::unsigned_bytes;
  product.columns = 64;
  product.a_in_registers = true;
  product.b = b;
  for (int i = 0; i < 4; ++i) product.fragment[i] = a[i];
  product.sums = sums;
  issue(product, file, line);
}

// 64 x 128 x 16.
inline void multiply_bfloat16_async(float* sums, uint64_t a, uint64_t b, bool clear, const char* file,
                                    int line) {
  Product product{};
  product.kind = ProductKind::bfloat16;
  product.columns = 128;
  product.clear = clear;
  product.a = a;
  product.b = b;
  product.sums = reinterpret_cast<uint32_t*>(sums);
  issue(product, file, line);
}

inline void wait_products(int pending, const char* file, int line) {
  while (const Product* product = next_product(pending, file, line)) {
    if (read_operands(*product, false, file, line) != product->operands)
      die("an operand was written while a product may read it", file, line);
    finish_product(file, line);
  }
}

}  // namespace cuda_on_cpu
