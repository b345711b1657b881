// The products by warpgroups behind wgmma.h.
#include <cstring>

#include "runtime.h"

namespace cuda_on_cpu {
namespace {

// What sums hold while a product may write them: as a float 10^7, which unlike NaN nobody sets right, and no
// sum of bytes that a test would have.
constexpr uint32_t kUnknown = 0x4b1a5a5au;

// ---- matrix descriptors, K-major (PTX ISA, "Matrix Descriptor Format" and "Swizzling Modes")

struct Descriptor {
  uint32_t start, stride;  // of the matrix, and from eight rows to the next eight
  uint32_t row, swizzled;  // bytes of a row of the pattern; which bits of an address change its place there

  Descriptor(uint64_t bits, const char* file, int line) {
    const auto field = [&](int low, int width) {
      return static_cast<uint32_t>(bits >> low & ((uint64_t{1} << width) - 1));
    };
    start = field(0, 14) << 4;
    stride = field(32, 14) << 4;
    if (field(49, 3) != 0) die("a descriptor's base offset is not modelled", file, line);
    switch (field(62, 2)) {
      case 1:
        row = 128, swizzled = 7;
        break;
      case 2:
        row = 64, swizzled = 3;
        break;
      case 3:
        row = 32, swizzled = 1;
        break;
      default:
        die("a descriptor without swizzling is not modelled", file, line);
    }
  }
  uint32_t address(int of_row, int byte) const {
    const auto i = static_cast<uint32_t>(of_row);
    const uint32_t plain = start + i / 8 * stride + i % 8 * row + static_cast<uint32_t>(byte);
    return plain ^ (plain >> 7 & swizzled) << 4;
  }
};

double number(ProductKind kind, const unsigned char* bytes, int k, bool is_b) {
  if (kind == ProductKind::bfloat16) {
    const uint32_t bits = static_cast<uint32_t>(bytes[2 * k]) << 16 | static_cast<uint32_t>(bytes[2 * k + 1])
                                                                          << 24;
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return static_cast<double>(value);
  }
  return is_b && kind == ProductKind::signed_bytes ? static_cast<signed char>(bytes[k]) : bytes[k];
}

int summands(ProductKind kind) { return kind == ProductKind::bfloat16 ? kSummands / 2 : kSummands; }

}  // namespace

uint32_t shared_address(const void* pointer, const char* file, int line) {
  const Block::Shared* const array = shared_array(pointer);
  if (!array) die("a matrix is not in shared memory", file, line);
  return static_cast<uint32_t>(array->address) +
         static_cast<uint32_t>(static_cast<const unsigned char*>(pointer) - array->memory);
}

const volatile uint64_t* operand_chunk(uint64_t descriptor, int row, int chunk, bool arrived,
                                       const char* file, int line) {
  const uint32_t address = Descriptor(descriptor, file, line).address(row, 16 * chunk);
  for (const Block::Shared& array : block->shared) {
    if (address < array.address || address + 16 > array.address + array.bytes) continue;
    const size_t place = address - array.address;
    const Block::Arrival& last = array.arrivals[place / 16];
    if (arrived && last.number > block->fibers[last.thread].shown)
      die("a copy has not been shown to the products by a fence of the proxies", file, line);
    return reinterpret_cast<const volatile uint64_t*>(array.memory + place);
  }
  die("an operand is not in shared memory", file, line);
}

void fence_proxies() { current->shown = current->arrived; }

void fence_products() { current->products.fenced = true; }

void start_product(Product product, const char* file, int line) {
  const unsigned thread = current->position.thread.x;
  if (thread / kWarpgroup >= block->warpgroups.size()) die("not a whole warpgroup", file, line);
  if (product.a_in_registers) {
    const unsigned char* slots = exchange(product.fragment, sizeof(product.fragment), file, line);
    // Of a row's four lanes: registers 0 and 2 of the first row, 1 and 3 of the second.
    for (int half = 0; half < 2; ++half) {
      for (int k = 0; k < kSummands; ++k) {
        const unsigned lane = thread % kLanes / 4 * 4 + static_cast<unsigned>(k % 16 / 4);
        product.own[half][k] =
            slots[lane * kSlotBytes + static_cast<unsigned>(4 * (half + k / 16 * 2) + k % 4)];
      }
    }
  }
  wait(block->warpgroups[thread / kWarpgroup], kWarpgroup, false, file, line);
  ProductQueue& mine = current->products;
  if (!mine.fenced) die("a product without wgmma.fence since the last wait", file, line);
  ProductQueue::Sums* sums = nullptr;
  for (ProductQueue::Sums& other : mine.sums) {
    if (other.registers == product.sums) sums = &other;
  }
  const int count = product.columns / 2;
  if (!sums) {
    mine.sums.push_back({product.sums, std::vector<uint32_t>(product.sums, product.sums + count), 0});
    sums = &mine.sums.back();
    for (int i = 0; i < count; ++i) product.sums[i] = kUnknown;
  }
  ++sums->products;
  mine.groups.back().push_back(product);
}

void commit_products() { current->products.groups.emplace_back(); }

const Product* next_product(int pending, const char* file, int line) {
  ProductQueue& mine = current->products;
  wait(my_warp().shuffle, kLanes, false, file, line);
  while (mine.groups.size() > static_cast<size_t>(pending) + 1) {
    if (!mine.groups.front().empty()) return &mine.groups.front().front();
    mine.groups.pop_front();
  }
  mine.fenced = false;
  return nullptr;
}

void finish_product(const char* file, int line) {
  ProductQueue& mine = current->products;
  const Product product = mine.groups.front().front();
  mine.groups.front().erase(mine.groups.front().begin());
  ++mine.made;
  // All of the warp have read: then one of them puts down for the others what there was.
  wait(my_warp().shuffle, kLanes, false, file, line);
  const int thread = static_cast<int>(current->position.thread.x), lane = thread % kLanes;
  const int count = summands(product.kind);
  ProductOperands& operands = my_warp().operands;
  const auto take = [&](uint64_t descriptor, int row, bool is_b, double (&to)[kSummands]) {
    unsigned char bytes[kSummands];
    for (int chunk = 0; chunk < 2; ++chunk) {
      const volatile uint64_t* words = operand_chunk(descriptor, row, chunk, false, file, line);
      const uint64_t two[2] = {words[0], words[1]};
      std::memcpy(bytes + 16 * chunk, two, sizeof(two));
    }
    for (int k = 0; k < count; ++k) to[k] = number(product.kind, bytes, k, is_b);
  };
  if (operands.product != mine.made) {
    operands.product = mine.made;
    for (int column = 0; column < product.columns; ++column)
      take(product.b, column, true, operands.b[column]);
    for (int row = 0; row < kProductRows && !product.a_in_registers; ++row)
      take(product.a, thread % kWarpgroup / kLanes * kProductRows + row, false, operands.a[row]);
  }
  size_t index = 0;
  while (mine.sums[index].registers != product.sums) ++index;
  ProductQueue::Sums& sums = mine.sums[index];
  double own[2][kSummands];
  for (int half = 0; half < 2; ++half) {
    for (int k = 0; k < count; ++k) {
      own[half][k] = product.a_in_registers ? number(product.kind, product.own[half], k, false)
                                            : operands.a[lane / 4 + 8 * half][k];
    }
  }
  for (int i = 0; i < product.columns / 2; ++i) {
    // Register 4 u + 2 h + e: row g + 8 h, column 8 u + 2 t + e.
    const double* const row = own[i / 2 % 2];
    const double* const column = operands.b[i / 4 * 8 + lane % 4 * 2 + i % 2];
    uint32_t& value = sums.values[static_cast<size_t>(i)];
    if (product.clear) value = 0;
    if (product.kind == ProductKind::bfloat16) {
      float before;
      std::memcpy(&before, &value, sizeof(before));
      double sum = static_cast<double>(before);
      for (int k = 0; k < count; ++k) sum += row[k] * column[k];
      const auto after = static_cast<float>(sum);
      std::memcpy(&value, &after, sizeof(after));
    } else {
      double sum = 0.0;  // exact
      for (int k = 0; k < count; ++k) sum += row[k] * column[k];
      value += static_cast<uint32_t>(static_cast<int64_t>(sum));
    }
  }
  if (--sums.products > 0) return;
  for (size_t i = 0; i < sums.values.size(); ++i) {
    if (product.sums[i] != kUnknown) die("sums were touched while a product may write them", file, line);
    product.sums[i] = sums.values[i];
  }
  mine.sums.erase(mine.sums.begin() + static_cast<std::ptrdiff_t>(index));
}

}  // namespace cuda_on_cpu
