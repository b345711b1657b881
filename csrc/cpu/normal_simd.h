// Standard normals of csrc/math/normal.h on SIMD vectors. Included by sources that are compiled once per
// instruction set.
#pragma once

#include <algorithm>
#include <type_traits>
#include <utility>

#include "../math/normal.h"
#include "philox_simd.h"

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
// Within groups of 4 lanes: the first or last two of a, then those of b.
template <int kHigh, int... kLane>
constexpr auto paired(std::integer_sequence<int, kLane...>) {
  constexpr int kWidth = sizeof...(kLane);
  return std::integer_sequence<int,
                               (kLane / 4 * 4 + kLane % 2 + 2 * kHigh + (kLane % 4 / 2 ? kWidth : 0))...>{};
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

// Which of the blocks of 4 vectors of numbers is where: vectors of words have a lane for each, 64 bits wide.
template <class S>
struct BlockOrder;
template <>
struct BlockOrder<double> {
  static constexpr int kParts = 1;
  static constexpr int block(int, int lane) { return lane; }
};
// Transposing 4 by 4 within groups of 4 lanes puts blocks 4 g + c of lanes 4 g + c into vector c; packing two
// vectors of words takes even lanes from the one and odd ones from the other.
template <>
struct BlockOrder<float> {
  static constexpr int kParts = 2, kGroups = Vec<float>::kWidth / 4;
  static constexpr int block(int part, int lane) {
    return lane / 2 + lane % 2 * 2 * kGroups + part * kGroups;
  }
};

// The numbers of as many blocks as a vector has lanes, in order.
REFINE_EXT_INLINE void normals_of(const PhiloxBlock<Lanes> (&words)[2], Vec<float> (&z)[4]) {
  using V = Vec<float>;
  using Order = std::make_integer_sequence<int, V::kWidth>;
  const auto pack = [&](int i) {
    return (Unsigned)((words[0].word[i].v & 0xffffffffu) | words[1].word[i].v << 32);
  };
  const NormalPair<V> p = normal_pair<V>(pack(0), pack(1)), q = normal_pair<V>(pack(2), pack(3));
  typedef V::Native N;
  const N low01 = shuffle(p.cosine.v, p.sine.v, interleaved<0>(Order{}));
  const N high01 = shuffle(p.cosine.v, p.sine.v, interleaved<1>(Order{}));
  const N low23 = shuffle(q.cosine.v, q.sine.v, interleaved<0>(Order{}));
  const N high23 = shuffle(q.cosine.v, q.sine.v, interleaved<1>(Order{}));
  z[0].v = shuffle(low01, low23, paired<0>(Order{}));
  z[1].v = shuffle(low01, low23, paired<1>(Order{}));
  z[2].v = shuffle(high01, high23, paired<0>(Order{}));
  z[3].v = shuffle(high01, high23, paired<1>(Order{}));
}

REFINE_EXT_INLINE void normals_of(const PhiloxBlock<Lanes> (&words)[1], Vec<double> (&z)[4]) {
  using V = Vec<double>;
  using Order = std::make_integer_sequence<int, V::kWidth>;
  const auto word = [&](int i) { return words[0].word[i].v; };
  const NormalPair<V> p = normal_pair<V>(word(0), word(1)), q = normal_pair<V>(word(2), word(3));
  typedef V::Native N;
  const N low01 = shuffle(p.cosine.v, p.sine.v, zipped<0>(Order{}));
  const N high01 = shuffle(p.cosine.v, p.sine.v, zipped<1>(Order{}));
  const N low23 = shuffle(q.cosine.v, q.sine.v, zipped<0>(Order{}));
  const N high23 = shuffle(q.cosine.v, q.sine.v, zipped<1>(Order{}));
  z[0].v = shuffle(low01, low23, joined<0>(Order{}));
  z[1].v = shuffle(low01, low23, joined<1>(Order{}));
  z[2].v = shuffle(high01, high23, joined<0>(Order{}));
  z[3].v = shuffle(high01, high23, joined<1>(Order{}));
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

  // The numbers of blocks [first, first + kWidth).
  template <class S>
  REFINE_EXT_INLINE void normals(uint32_t first, Vec<S> (&z)[4]) const {
    using Order = BlockOrder<S>;
    PhiloxBlock<Lanes> words[Order::kParts];
#pragma GCC unroll 2
    for (int part = 0; part < Order::kParts; ++part) {
      Lanes::Native lane;
      for (int l = 0; l < Lanes::kWidth; ++l) lane[l] = static_cast<uint64_t>(Order::block(part, l));
      words[part] = blocks({lane + first});
    }
    normals_of(words, z);
  }

 private:
  REFINE_EXT_INLINE PhiloxBlock<Lanes> blocks(Lanes index) const {
    const Lanes::Native zero{};
    PhiloxBlock<Lanes> counter{{index, {zero + step_}, {zero + third_}, {zero + fourth_}}};
#pragma GCC unroll 10
    for (int round = 0; round < kPhiloxRounds; ++round) {
      counter = philox_round(counter, key_[round][0], key_[round][1]);
    }
    return counter;
  }

  uint64_t step_, third_, fourth_;
  uint64_t key_[kPhiloxRounds][2];  // as wide as a lane, so that one instruction loads and spreads them
};

// Short samples' numbers, a sample's blocks after each other: sequence(b) is that of sample b. Writes whole
// vectors, and so up to 4 kWidth numbers too many.
template <class S, class F>
REFINE_EXT_INLINE void normals_of_samples(int64_t samples, int64_t blocks_each, F&& sequence, S* out) {
  using Order = BlockOrder<S>;
  const int64_t total = samples * blocks_each;
  for (int64_t first = 0; first < total; first += Vec<S>::kWidth) {
    PhiloxBlock<Lanes> words[Order::kParts];
    for (int part = 0; part < Order::kParts; ++part) {
      PhiloxBlock<Lanes> counter;
      Lanes key0, key1;
      for (int l = 0; l < Lanes::kWidth; ++l) {
        const int64_t at = std::min(first + Order::block(part, l), total - 1), b = at / blocks_each;
        const NoiseSequence own = sequence(b);
        counter.word[0].v[l] = static_cast<uint64_t>(at - b * blocks_each);
        counter.word[1].v[l] = own.step;
        counter.word[2].v[l] = own.third_word();
        counter.word[3].v[l] = own.fourth_word();
        key0.v[l] = own.seed & 0xffffffffu;
        key1.v[l] = own.seed >> 32;
      }
#pragma GCC unroll 10
      for (int round = 0; round < kPhiloxRounds; ++round) {
        counter = philox_round(counter, key0, key1);
        key0.v += uint64_t{kPhiloxWeyl0};
        key1.v += uint64_t{kPhiloxWeyl1};
      }
      words[part] = counter;
    }
    Vec<S> z[4];
    normals_of(words, z);
    for (int j = 0; j < 4; ++j) z[j].store(out + 4 * first + j * Vec<S>::kWidth);
  }
}

}  // namespace REFINE_EXT_ISA
}  // namespace refine_ext
