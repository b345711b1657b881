// Signs and normals as tensors, and the gradient of a supremum, which is made of signs; compiled once per
// instruction set.
#include <algorithm>
#include <type_traits>

#include "normal_simd.h"
#include "rademacher_tables.h"

namespace refine_ext::REFINE_EXT_ISA {
namespace {

// ---- The gradient: each draw's signs at the column that it chose

int64_t column_of(int64_t index) { return index >= 0 ? index : -1 - index; }

// tile[r] += the gradient with the sign of row r, for the 128 rows of a Philox block.
REFINE_EXT_INLINE void add_signed(double grad, uint64_t low, uint64_t high, double* tile) {
  using V = Vec<double>;
  typedef uint64_t Bits __attribute__((vector_size(kVectorBytes)));
  Bits lane;
  for (int l = 0; l < V::kWidth; ++l) lane[l] = static_cast<uint64_t>(63 - l);
  const Bits size = (Bits)V::splat(grad).v;
  for (int half = 0; half < 2; ++half) {
    const Bits word = Bits{} + ~(half ? high : low);
    for (int r = 0; r < 64; r += V::kWidth) {
      const Bits minus = (word << (lane - static_cast<uint64_t>(r))) & (uint64_t{1} << 63);
      double* at = tile + half * 64 + r;
      (V::load(at) + V{(V::Native)(size ^ minus)}).store(at);
    }
  }
}

template <class T>
class BackwardRows {
 public:
  BackwardRows(const RademacherBackwardProblem& problem, double* tile) : p_(problem), tile_(tile) {}

  void run(const int64_t* order, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row += kSignsPerPhilox) {
      const int64_t rows = std::min(kSignsPerPhilox, end - row);
      T* out = static_cast<T*>(p_.out) + row * p_.m;
      std::memset(out, 0, static_cast<size_t>(rows * p_.m) * sizeof(T));
      for (int64_t at = 0; at < p_.draws; at += Lanes::kWidth) {
        const int64_t count = std::min<int64_t>(Lanes::kWidth, p_.draws - at);
        Lanes::Native draw{};
        for (int64_t l = 0; l < count; ++l) draw[l] = p_.first_draw + static_cast<uint64_t>(order[at + l]);
        const SignLanes signs = signs_of(p_.seed, draw, static_cast<uint64_t>(row / kSignsPerPhilox));
        for (int64_t l = 0; l < count; ++l) {
          const int64_t k = order[at + l], column = column_of(p_.index[k]);
          if (used_ == 0 || columns_[used_ - 1] != column) next_column(column, out, rows);
          const double grad = p_.grad[k] / static_cast<double>(p_.n);
          add_signed(p_.index[k] >= 0 ? grad : -grad, signs.low[l], signs.high[l],
                     tile_ + (used_ - 1) * kSignsPerPhilox);
        }
      }
      write(out, rows);
    }
  }

 private:
  void next_column(int64_t column, T* out, int64_t rows) {
    if (used_ == kBackwardColumns) write(out, rows);
    columns_[used_] = column;
    std::memset(tile_ + used_ * kSignsPerPhilox, 0, kSignsPerPhilox * sizeof(double));
    ++used_;
  }

  void write(T* out, int64_t rows) {
    T* values = reinterpret_cast<T*>(tile_);  // in place: no wider than what they replace
    for (int64_t i = 0; i < used_ * kSignsPerPhilox; i += Vec<double>::kWidth) {
      store_as<double>(values + i, Vec<double>::load(tile_ + i));
    }
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < used_; ++c) out[r * p_.m + columns_[c]] = values[c * kSignsPerPhilox + r];
    }
    used_ = 0;
  }

  const RademacherBackwardProblem& p_;
  double* tile_;
  int64_t used_ = 0;
  int64_t columns_[kBackwardColumns];
};

void backward(const RademacherBackwardProblem& problem, const int64_t* order, double* tile, int64_t begin,
              int64_t end) {
  with_storage(problem.storage,
               [&](auto tag) { BackwardRows<decltype(tag)>(problem, tile).run(order, begin, end); });
}

// ---- Multipliers as tensors

template <class T>
struct SignPattern {
  using Bits = uint16_t;
  static constexpr Bits one = std::is_same_v<T, Half> ? 0x3c00 : 0x3f80;
};
template <>
struct SignPattern<float> {
  using Bits = uint32_t;
  static constexpr Bits one = 0x3f800000u;
};
template <>
struct SignPattern<double> {
  using Bits = uint64_t;
  static constexpr Bits one = 0x3ff0000000000000u;
};

template <class T>
void write_signs(const MultipliersProblem& p, uint64_t draw, T* out) {
  using Pattern = SignPattern<T>;
  using Bits = typename Pattern::Bits;
  constexpr int64_t kBlocks = 64;
  constexpr int kTop = 8 * static_cast<int>(sizeof(T)) - 1;
  alignas(64) uint64_t low[kBlocks], high[kBlocks];
  for (int64_t first = 0; first < p.n; first += kBlocks * kSignsPerPhilox) {
    const int64_t count = std::min(kBlocks * kSignsPerPhilox, p.n - first);
    philox_blocks(sign_sequence(p.seed, draw), static_cast<uint64_t>((p.first_row + first) / kSignsPerPhilox),
                  (count + kSignsPerPhilox - 1) / kSignsPerPhilox, low, high);
    for (int64_t i = 0; i < count; i += 64) {
      const uint64_t minus = ~(i % kSignsPerPhilox ? high : low)[i / kSignsPerPhilox];
      Bits values[64];
      for (int half = 0; half < 2; ++half) {
        const uint32_t word = static_cast<uint32_t>(minus >> 32 * half);
        for (int l = 0; l < 32; ++l) {
          values[32 * half + l] = static_cast<Bits>(Pattern::one | static_cast<Bits>(word >> l & 1u) << kTop);
        }
      }
      std::memcpy(out + first + i, values, static_cast<size_t>(std::min<int64_t>(64, count - i)) * sizeof(T));
    }
  }
}

template <class T>
void write_normals(const MultipliersProblem& p, uint64_t draw, T* out) {
  using S = typename ComputeOf<T>::type;
  using V = Vec<S>;
  constexpr int kParts = 2, kCount = kParts * kNumbers, kVectors = kCount / V::kWidth;
  const NoiseLanes lanes(NoiseSequence{p.seed, 0, draw, Stream::multiplier});
  for (int64_t i = 0; i < p.n; i += kCount) {
    V z[kVectors];
    lanes.template normals<Order::consecutive, kParts>(static_cast<uint32_t>((p.first_row + i) / 4), z);
    T values[kCount];
    for (int j = 0; j < kVectors; ++j) store_as<S>(values + j * V::kWidth, z[j]);
    std::memcpy(out + i, values, static_cast<size_t>(std::min<int64_t>(kCount, p.n - i)) * sizeof(T));
  }
}

void multipliers(const MultipliersProblem& problem, int64_t first, int64_t last) {
  with_storage(problem.storage, [&](auto tag) {
    using T = decltype(tag);
    for (int64_t k = first; k < last; ++k) {
      const uint64_t draw = problem.first_draw + static_cast<uint64_t>(k);
      T* out = static_cast<T*>(problem.out) + k * problem.n;
      if (problem.normal) {
        write_normals(problem, draw, out);
      } else {
        write_signs(problem, draw, out);
      }
    }
  });
}

}  // namespace

extern const SignKernels sign_kernels;
const SignKernels sign_kernels = {backward, multipliers};

}  // namespace refine_ext::REFINE_EXT_ISA
