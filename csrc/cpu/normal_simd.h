// Standard normals of csrc/math/normal.h on SIMD vectors. Included by sources that are compiled once per
// instruction set.
#pragma once

#include <algorithm>
#include <utility>

#include "../math/normal.h"
#include "several.h"

namespace refine_ext {

template <>
struct WordArithmetic<REFINE_EXT_ISA::Vec<float>> {
  using V = REFINE_EXT_ISA::Vec<float>;
  using Word = REFINE_EXT_ISA::Unsigned;
  using Mask = REFINE_EXT_ISA::VecMask<float>;
  static REFINE_EXT_INLINE V unsigned_value(Word w) { return {__builtin_convertvector(w, V::Native)}; }
  static REFINE_EXT_INLINE V signed_value(Word w) { return {__builtin_convertvector((V::Bits)w, V::Native)}; }
  static REFINE_EXT_INLINE Mask has_bits(Word w, uint32_t bits) { return {(V::Bits)((w & bits) != 0)}; }
  static REFINE_EXT_INLINE V negate_by(V x, Word w) { return {(V::Native)((Word)x.v ^ (w & 0x80000000u))}; }
  static REFINE_EXT_INLINE void split(V x, V& m, V& k) {
#if defined(__AVX512F__)
    m.v = (V::Native)_mm512_getmant_ps((__m512)x.v, _MM_MANT_NORM_p5_1, _MM_MANT_SIGN_src);
    k.v = (V::Native)_mm512_getexp_ps((__m512)x.v) + 1.0f;
#else
    const V::Bits bits = (V::Bits)x.v;
    const V::Bits exponent = (bits - 0x3f000000) >> 23;
    m.v = (V::Native)(bits - (exponent << 23));
    k.v = __builtin_convertvector(exponent, V::Native);
#endif
  }
};

// A word in each 64-bit lane, whose upper half is anything.
template <>
struct WordArithmetic<REFINE_EXT_ISA::Vec<double>> {
  using V = REFINE_EXT_ISA::Vec<double>;
  using Word = REFINE_EXT_ISA::Lanes::Native;
  using Mask = REFINE_EXT_ISA::VecMask<double>;
  // The word as the last mantissa bits of 2^52.
  static REFINE_EXT_INLINE V unsigned_value(Word w) {
    const Word bits = (w & 0xffffffffu) | 0x4330000000000000u;
    return V{(V::Native)bits} - V::splat(0x1p52);
  }
  static REFINE_EXT_INLINE V signed_value(Word w) {
    return unsigned_value(w ^ uint64_t{0x80000000u}) - V::splat(0x1p31);
  }
  static REFINE_EXT_INLINE Mask has_bits(Word w, uint32_t bits) {
    return {(V::Bits)((w & uint64_t{bits}) != 0)};
  }
  static REFINE_EXT_INLINE V negate_by(V x, Word w) {
    return {(V::Native)((Word)x.v ^ (w & 0x80000000u) << 32)};
  }
};

template <class V, int N>
struct WordArithmetic<REFINE_EXT_ISA::Several<V, N>> {
  using One = WordArithmetic<V>;
  using Values = REFINE_EXT_ISA::Several<V, N>;
  using Word = REFINE_EXT_ISA::Several<typename One::Word, N>;
  static REFINE_EXT_INLINE Values unsigned_value(const Word& w) {
    return REFINE_EXT_ISA::several<N>([&](int i) { return One::unsigned_value(w.part[i]); });
  }
  static REFINE_EXT_INLINE Values signed_value(const Word& w) {
    return REFINE_EXT_ISA::several<N>([&](int i) { return One::signed_value(w.part[i]); });
  }
  static REFINE_EXT_INLINE auto has_bits(const Word& w, uint32_t bits) {
    return REFINE_EXT_ISA::several<N>([&](int i) { return One::has_bits(w.part[i], bits); });
  }
  static REFINE_EXT_INLINE Values negate_by(const Values& x, const Word& w) {
    return REFINE_EXT_ISA::several<N>([&](int i) { return One::negate_by(x.part[i], w.part[i]); });
  }
  static REFINE_EXT_INLINE void split(const Values& x, Values& m, Values& k) {
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) One::split(x.part[i], m.part[i], k.part[i]);
  }
};

namespace REFINE_EXT_ISA {

// Lane i of the result is lane kIndex[i] of a, or of b from a's width on.
template <class Native, int... kIndex>
REFINE_EXT_INLINE Native shuffle(Native a, Native b, std::integer_sequence<int, kIndex...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, kIndex...);
#else
  typedef std::conditional_t<sizeof(a[0]) == 4, int32_t, int64_t> Index
      __attribute__((vector_size(kVectorBytes)));
  return __builtin_shuffle(a, b, Index{kIndex...});
#endif
}

// Within groups of 4 lanes: the first (kHigh = 0) or last two of a and of b by turns.
template <int kHigh, int... kLane>
constexpr auto interleaved(std::integer_sequence<int, kLane...>) {
  constexpr int kWidth = sizeof...(kLane);
  return std::integer_sequence<int,
                               (kLane / 4 * 4 + kLane % 4 / 2 + 2 * kHigh + (kLane % 2 ? kWidth : 0))...>{};
}
// Lanes of two vectors that hold pairs of numbers 0, 1 and 2, 3 of blocks: numbers 0 to 3 of each, from the
// first (kHigh = 0) or the second half of the blocks.
template <int kHigh, int... kLane>
constexpr auto joined(std::integer_sequence<int, kLane...>) {
  constexpr int kWidth = sizeof...(kLane);
  return std::integer_sequence<int, ((kLane + kHigh * kWidth) / 4 * 2 + kLane % 2 +
                                     ((kLane + kHigh * kWidth) % 4 / 2 ? kWidth : 0))...>{};
}
template <int kHigh, int... kLane>
constexpr auto zipped(std::integer_sequence<int, kLane...>) {
  constexpr int kWidth = sizeof...(kLane);
  return std::integer_sequence<int, (kLane / 2 + kHigh * kWidth / 2 + (kLane % 2 ? kWidth : 0))...>{};
}

// The low words of the lanes of a, and above them those of b.
REFINE_EXT_INLINE Unsigned low_words(Lanes a, Lanes b) {
#if defined(__AVX512F__)
  return (Unsigned)_mm512_mask_shuffle_epi32((__m512i)a.v, 0xAAAA, (__m512i)b.v, _MM_PERM_CDAB);
#elif defined(__AVX2__)
  return (Unsigned)_mm256_blend_epi32((__m256i)a.v, _mm256_slli_epi64((__m256i)b.v, 32), 0xAA);
#else
  return (Unsigned)((a.v & 0xffffffffu) | b.v << 32);
#endif
}

REFINE_EXT_INLINE Unsigned high_words(Lanes a, Lanes b) {
#if defined(__AVX512F__)
  return (Unsigned)_mm512_mask_shuffle_epi32((__m512i)b.v, 0x5555, (__m512i)a.v, _MM_PERM_CDAB);
#elif defined(__AVX2__)
  return (Unsigned)_mm256_blend_epi32(_mm256_srli_epi64((__m256i)a.v, 32), (__m256i)b.v, 0xAA);
#else
  return (Unsigned)(a.v >> 32 | (b.v & ~uint64_t{0xffffffffu}));
#endif
}

// Numbers are made of the blocks of Philox in the 64-bit lanes of a vector at a time, 4 of each. In the two
// vectors of float32 words made of those, a block's first and second pair stand side by side.
inline constexpr int kNumbers = 4 * Lanes::kWidth;

template <int N>
struct PairWords {
  Several<Unsigned, N> radius, angle;
};

// The last round, whose words would have to be packed otherwise; both keys are in `key`, the first below.
template <int N>
REFINE_EXT_INLINE PairWords<N> last_round(const PhiloxBlock<Several<Lanes, N>>& counter,
                                          const Several<Lanes, N>& key) {
  const auto& [word] = counter;
  Several<Lanes, N> product0, product1, high;
  multiply_wide(word[0], kPhiloxMultiplier0, high, product0);
  multiply_wide(word[2], kPhiloxMultiplier1, high, product1);
  return {several<N>([&](int i) {
            return high_words(product1.part[i], product0.part[i]) ^
                   low_words(word[1].part[i], word[3].part[i]) ^ (Unsigned)key.part[i].v;
          }),
          several<N>([&](int i) { return low_words(product1.part[i], product0.part[i]); })};
}

// The block of a part in each lane.
template <class S>
REFINE_EXT_INLINE constexpr int block_of_lane(Order order, int lane) {
  // Interleaving cosines and sines takes every other block to the second vector.
  return sizeof(S) == 4 && order == Order::consecutive ? lane / 2 + lane % 2 * (Lanes::kWidth / 2) : lane;
}

template <Order kOrder, int N>
REFINE_EXT_INLINE void numbers_of(const PhiloxBlock<Several<Lanes, N>>& counter,
                                  const Several<Lanes, N>& key0, const Several<Lanes, N>& key1,
                                  Vec<float> (&z)[2 * N]) {
  using V = Vec<float>;
  using Lane = std::make_integer_sequence<int, V::kWidth>;
  const auto words =
      last_round<N>(counter, several<N>([&](int i) { return Lanes{key0.part[i].v | key1.part[i].v << 32}; }));
  const auto pair = normal_pair<Several<V, N>>(words.radius, words.angle);
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) {
    const V cosine = pair.cosine.part[i], sine = pair.sine.part[i];
    if constexpr (kOrder == Order::even_odd) {
      z[2 * i] = cosine;
      z[2 * i + 1] = sine;
    } else {
      z[2 * i].v = shuffle(cosine.v, sine.v, interleaved<0>(Lane{}));
      z[2 * i + 1].v = shuffle(cosine.v, sine.v, interleaved<1>(Lane{}));
    }
  }
}

template <Order kOrder, int N>
REFINE_EXT_INLINE void numbers_of(const PhiloxBlock<Several<Lanes, N>>& counter,
                                  const Several<Lanes, N>& key0, const Several<Lanes, N>& key1,
                                  Vec<double> (&z)[4 * N]) {
  static_assert(kOrder == Order::consecutive);
  using V = Vec<double>;
  using Lane = std::make_integer_sequence<int, V::kWidth>;
  const auto block = philox_round(counter, key0, key1);
  const auto word = [&](int i) { return several<N>([&](int part) { return block.word[i].part[part].v; }); };
  const auto p = normal_pair<Several<V, N>>(word(0), word(1)),
             q = normal_pair<Several<V, N>>(word(2), word(3));
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) {
    typedef V::Native Native;
    const Native low01 = shuffle(p.cosine.part[i].v, p.sine.part[i].v, zipped<0>(Lane{}));
    const Native high01 = shuffle(p.cosine.part[i].v, p.sine.part[i].v, zipped<1>(Lane{}));
    const Native low23 = shuffle(q.cosine.part[i].v, q.sine.part[i].v, zipped<0>(Lane{}));
    const Native high23 = shuffle(q.cosine.part[i].v, q.sine.part[i].v, zipped<1>(Lane{}));
    z[4 * i].v = shuffle(low01, low23, joined<0>(Lane{}));
    z[4 * i + 1].v = shuffle(low01, low23, joined<1>(Lane{}));
    z[4 * i + 2].v = shuffle(high01, high23, joined<0>(Lane{}));
    z[4 * i + 3].v = shuffle(high01, high23, joined<1>(Lane{}));
  }
}

// One sample's numbers, with the keys of all rounds, which a loop would otherwise make again for every block.
class NoiseLanes {
 public:
  REFINE_EXT_INLINE explicit NoiseLanes(const NoiseSequence& sequence)
      : step_(sequence.step), third_(sequence.third_word()), fourth_(sequence.fourth_word()) {
    uint32_t key0 = static_cast<uint32_t>(sequence.seed), key1 = static_cast<uint32_t>(sequence.seed >> 32);
    for (int round = 0; round < kPhiloxRounds; ++round) {
      key_[round][0] = key0;
      key_[round][1] = key1;
      key0 += kPhiloxWeyl0;
      key1 += kPhiloxWeyl1;
    }
  }

  // The numbers of N parts, from the first number of block `first` on.
  template <Order kOrder, int N, class S, int kVectors>
  REFINE_EXT_INLINE void normals(uint32_t first, Vec<S> (&z)[kVectors]) const {
    static_assert(kVectors * Vec<S>::kWidth == N * kNumbers);
    const Lanes::Native zero{};
    const auto all = [&](uint64_t word) { return several<N>([&](int) { return Lanes{zero + word}; }); };
    const auto index = several<N>([&](int part) {
      Lanes::Native lane;
      for (int l = 0; l < Lanes::kWidth; ++l) {
        lane[l] = static_cast<uint64_t>(block_of_lane<S>(kOrder, l) + part * Lanes::kWidth);
      }
      return Lanes{lane + first};
    });
    PhiloxBlock<Several<Lanes, N>> counter{{index, all(step_), all(third_), all(fourth_)}};
#pragma GCC unroll 10
    for (int round = 0; round + 1 < kPhiloxRounds; ++round) {
      counter = philox_round(counter, key_[round][0], key_[round][1]);
    }
    numbers_of<kOrder>(counter, all(key_[kPhiloxRounds - 1][0]), all(key_[kPhiloxRounds - 1][1]), z);
  }

 private:
  uint64_t step_, third_, fourth_;
  uint64_t key_[kPhiloxRounds][2];  // as wide as a lane, so that one instruction loads and spreads them
};

// Short samples' numbers, a sample's blocks after each other: sequence(b) is that of sample b. Writes whole
// parts, and so up to 2 kNumbers too many.
template <class S, class F>
REFINE_EXT_INLINE void normals_of_samples(int64_t samples, int64_t blocks_each, F&& sequence, S* out) {
  constexpr int kParts = 2, kVectors = kParts * kNumbers / Vec<S>::kWidth;
  const int64_t total = samples * blocks_each;
  for (int64_t first = 0; first < total; first += kParts * Lanes::kWidth) {
    PhiloxBlock<Several<Lanes, kParts>> counter;
    Several<Lanes, kParts> key0, key1;
    for (int part = 0; part < kParts; ++part) {
      for (int l = 0; l < Lanes::kWidth; ++l) {
        const int64_t block = first + part * Lanes::kWidth + block_of_lane<S>(Order::consecutive, l);
        const int64_t at = std::min(block, total - 1), b = at / blocks_each;
        const NoiseSequence own = sequence(b);
        counter.word[0].part[part].v[l] = static_cast<uint64_t>(at - b * blocks_each);
        counter.word[1].part[part].v[l] = own.step;
        counter.word[2].part[part].v[l] = own.third_word();
        counter.word[3].part[part].v[l] = own.fourth_word();
        key0.part[part].v[l] = own.seed & 0xffffffffu;
        key1.part[part].v[l] = own.seed >> 32;
      }
    }
    // Lanes hold words: the carry into their upper halves would reach the other key's word.
    const auto next = [](const Several<Lanes, kParts>& key, uint32_t weyl) {
      return several<kParts>([&](int i) { return Lanes{(key.part[i].v + weyl) & 0xffffffffu}; });
    };
#pragma GCC unroll 10
    for (int round = 0; round + 1 < kPhiloxRounds; ++round) {
      counter = philox_round(counter, key0, key1);
      key0 = next(key0, kPhiloxWeyl0);
      key1 = next(key1, kPhiloxWeyl1);
    }
    Vec<S> z[kVectors];
    numbers_of<Order::consecutive>(counter, key0, key1, z);
    for (int j = 0; j < kVectors; ++j) z[j].store(out + 4 * first + j * Vec<S>::kWidth);
  }
}

}  // namespace REFINE_EXT_ISA
}  // namespace refine_ext
