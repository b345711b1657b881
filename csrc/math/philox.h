// Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011): a
// bijection of 128-bit counters under a 64-bit key. Stateless: what a draw gets depends on its counter and
// the seed only, so the bits are the same on CPU and GPU, for any number of threads and any batch.
#pragma once

#include <cstdint>

#include "arithmetic.h"

namespace refine_ext {

// What the fourth word of a counter says the numbers are for; no two uses of one seed share a counter.
enum class Stream : uint32_t {
  resample = 1,
  rejection = 2,
  metropolis = 3,
  noise = 4,
  sign = 5,
  multiplier = 6
};

// Four words of 32 bits. Word is uint32_t, or a SIMD vector of 64-bit lanes whose upper halves are ignored.
template <class Word>
struct PhiloxBlock {
  Word word[4];
};

REFINE_EXT_INLINE void multiply_wide(uint32_t a, uint32_t b, uint32_t& high, uint32_t& low) {
#if defined(__CUDA_ARCH__)
  // Of a plain product nvcc makes one of 64 bits, which adds the zero upper half of b.
  uint64_t product;
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(a), "r"(b));
#else
  const uint64_t product = static_cast<uint64_t>(a) * b;
#endif
  high = static_cast<uint32_t>(product >> 32);
  low = static_cast<uint32_t>(product);
}

inline constexpr int kPhiloxRounds = 10;

// What each round adds to the key: golden ratio, sqrt(3) - 1.
inline constexpr uint32_t kPhiloxWeyl0 = 0x9E3779B9u, kPhiloxWeyl1 = 0xBB67AE85u;
inline constexpr uint32_t kPhiloxMultiplier0 = 0xD2511F53u, kPhiloxMultiplier1 = 0xCD9E8D57u;

template <class Word, class Key>
REFINE_EXT_INLINE PhiloxBlock<Word> philox_round(const PhiloxBlock<Word>& counter, Key key0, Key key1) {
  Word high0, low0, high1, low1;
  multiply_wide(counter.word[0], kPhiloxMultiplier0, high0, low0);
  multiply_wide(counter.word[2], kPhiloxMultiplier1, high1, low1);
  return {{high1 ^ counter.word[1] ^ key0, low1, high0 ^ counter.word[3] ^ key1, low0}};
}

template <class Word>
REFINE_EXT_INLINE PhiloxBlock<Word> philox4x32(PhiloxBlock<Word> counter, uint32_t key0, uint32_t key1) {
#if defined(__CUDACC__)
#pragma unroll
#else
#pragma GCC unroll 10
#endif
  for (int round = 0; round < kPhiloxRounds; ++round) {
    counter = philox_round(counter, key0, key1);
    key0 += kPhiloxWeyl0;
    key1 += kPhiloxWeyl1;
  }
  return counter;
}

// A sequence of blocks: key = seed, counter = (block, sequence, stream) from the lowest word up; of the
// sequence number (a row, a chain) the counter holds 56 bits.
struct PhiloxSequence {
  uint64_t seed;
  uint64_t sequence;
  Stream stream;

  REFINE_EXT_INLINE uint32_t third_word() const { return static_cast<uint32_t>(sequence); }
  REFINE_EXT_INLINE uint32_t fourth_word() const {
    return static_cast<uint32_t>(stream) | static_cast<uint32_t>(sequence >> 32) << 8;
  }
  REFINE_EXT_INLINE PhiloxBlock<uint32_t> block(uint64_t index) const {
    return philox4x32<uint32_t>(
        {{static_cast<uint32_t>(index), static_cast<uint32_t>(index >> 32), third_word(), fourth_word()}},
        static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
  }
};

// The two 64-bit numbers of a block.
REFINE_EXT_INLINE uint64_t low_half(const PhiloxBlock<uint32_t>& block) {
  return block.word[0] | static_cast<uint64_t>(block.word[1]) << 32;
}
REFINE_EXT_INLINE uint64_t high_half(const PhiloxBlock<uint32_t>& block) {
  return block.word[2] | static_cast<uint64_t>(block.word[3]) << 32;
}

// Number `index` of a sequence of 64-bit numbers, two to a block.
REFINE_EXT_INLINE uint64_t random_bits(const PhiloxSequence& sequence, uint64_t index) {
  const PhiloxBlock<uint32_t> block = sequence.block(index >> 1);
  return index & 1 ? high_half(block) : low_half(block);
}

}  // namespace refine_ext
