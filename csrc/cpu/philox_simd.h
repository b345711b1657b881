// Philox on SIMD vectors: one counter in each 64-bit lane, because the widening multiplication reads the low
// 32 bits of 64-bit lanes and fills all of them. Included by sources that are compiled once per instruction
// set.
#pragma once

#include <algorithm>

#include "../math/philox.h"
#include "simd_storage.h"

namespace refine_ext::REFINE_EXT_ISA {

// Only the low 32 bits of a lane count.
struct Lanes {
  typedef uint64_t Native __attribute__((vector_size(kVectorBytes)));
  typedef uint64_t Unaligned __attribute__((vector_size(kVectorBytes), aligned(8), may_alias));
  static constexpr int kWidth = kVectorBytes / 8;
  Native v;
};

REFINE_EXT_INLINE Lanes operator^(Lanes a, Lanes b) { return {a.v ^ b.v}; }
REFINE_EXT_INLINE Lanes operator^(Lanes a, uint64_t b) { return {a.v ^ b}; }

REFINE_EXT_INLINE void multiply_wide(Lanes a, uint32_t b, Lanes& high, Lanes& low) {
  const Lanes::Native factor = Lanes::Native{} + static_cast<uint64_t>(b);
#if defined(__AVX512F__)
  low.v = (Lanes::Native)_mm512_mul_epu32((__m512i)a.v, (__m512i)factor);
#elif defined(__AVX2__)
  low.v = (Lanes::Native)_mm256_mul_epu32((__m256i)a.v, (__m256i)factor);
#else
  low.v = (a.v & 0xffffffffu) * factor;
#endif
  high.v = low.v >> 32;
}

// The two 64-bit numbers of blocks [first, first + count).
REFINE_EXT_INLINE void philox_blocks(const PhiloxSequence& sequence, uint64_t first, int64_t count,
                                     uint64_t* low, uint64_t* high) {
  constexpr int kWidth = Lanes::kWidth;
  Lanes::Native lane;
  for (int l = 0; l < kWidth; ++l) lane[l] = static_cast<uint64_t>(l);
  const Lanes third{Lanes::Native{} + uint64_t{sequence.third_word()}};
  const Lanes fourth{Lanes::Native{} + uint64_t{sequence.fourth_word()}};
  const uint32_t key0 = static_cast<uint32_t>(sequence.seed),
                 key1 = static_cast<uint32_t>(sequence.seed >> 32);
  for (int64_t b = 0; b < count; b += kWidth) {
    const Lanes::Native index = lane + (first + static_cast<uint64_t>(b));
    const PhiloxBlock<Lanes> block = philox4x32<Lanes>({{{index}, {index >> 32}, third, fourth}}, key0, key1);
    const Lanes::Native even = (block.word[0].v & 0xffffffffu) | block.word[1].v << 32;
    const Lanes::Native odd = (block.word[2].v & 0xffffffffu) | block.word[3].v << 32;
    if (b + kWidth <= count) {
      *reinterpret_cast<Lanes::Unaligned*>(low + b) = even;
      *reinterpret_cast<Lanes::Unaligned*>(high + b) = odd;
    } else {
      for (int64_t l = 0; b + l < count; ++l) {
        low[b + l] = even[l];
        high[b + l] = odd[l];
      }
    }
  }
}

// Numbers [first, first + count) of a sequence of 64-bit numbers, two to a block.
static inline void random_numbers(const PhiloxSequence& sequence, uint64_t first, int64_t count,
                                  uint64_t* out) {
  constexpr int64_t kBlocks = 256;
  alignas(64) uint64_t low[kBlocks], high[kBlocks];
  int64_t done = 0;
  if ((first & 1) && count > 0) out[done++] = random_bits(sequence, first);
  while (done < count) {
    const int64_t numbers = std::min(count - done, 2 * kBlocks), whole = numbers / 2;
    philox_blocks(sequence, (first + static_cast<uint64_t>(done)) >> 1, (numbers + 1) / 2, low, high);
    for (int64_t b = 0; b < whole; ++b) {
      out[done + 2 * b] = low[b];
      out[done + 2 * b + 1] = high[b];
    }
    if (numbers & 1) out[done + numbers - 1] = low[whole];
    done += numbers;
  }
}

}  // namespace refine_ext::REFINE_EXT_ISA
