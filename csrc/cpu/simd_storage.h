// Loads and stores of the storage types in their compute type, and loops over vectors with a partial last
// one.
#pragma once

#include <type_traits>

#include "../math/density_ratio_problem.h"
#include "simd.h"

namespace refine_ext::REFINE_EXT_ISA {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

template <class T>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};

template <class T>
inline constexpr Storage storage_tag = Storage::float32;
template <>
inline constexpr Storage storage_tag<double> = Storage::float64;
template <>
inline constexpr Storage storage_tag<Half> = Storage::float16;
template <>
inline constexpr Storage storage_tag<BFloat16> = Storage::bfloat16;

// Calls f with a value of the storage's type.
template <class F>
REFINE_EXT_INLINE auto with_storage(Storage storage, F&& f) {
  switch (storage) {
    case Storage::float64:
      return f(double{});
    case Storage::float16:
      return f(Half{});
    case Storage::bfloat16:
      return f(BFloat16{});
    default:
      return f(float{});
  }
}

REFINE_EXT_INLINE Vec<float> load(const float* p) { return Vec<float>::load(p); }
REFINE_EXT_INLINE Vec<double> load(const double* p) { return Vec<double>::load(p); }

typedef uint16_t Words __attribute__((vector_size(kVectorBytes / 2)));
typedef uint16_t UnalignedWords __attribute__((vector_size(kVectorBytes / 2), aligned(2), may_alias));
typedef uint16_t AllWords __attribute__((vector_size(kVectorBytes)));
typedef uint32_t Unsigned __attribute__((vector_size(kVectorBytes)));
typedef uint32_t UnalignedUnsigned __attribute__((vector_size(kVectorBytes), aligned(2), may_alias));

REFINE_EXT_INLINE Vec<float> load(const BFloat16* p) {
#if defined(__AVX512F__)
  const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  const Unsigned wide = (Unsigned)_mm512_cvtepu16_epi32(words);
#else
  const Unsigned wide = __builtin_convertvector(*reinterpret_cast<const UnalignedWords*>(p), Unsigned);
#endif
  return {(Vec<float>::Native)(wide << 16)};
}

// Round to nearest even; NaN keeps a set mantissa bit.
REFINE_EXT_INLINE void store(BFloat16* p, Vec<float> x) {
  const Unsigned bits = (Unsigned)x.v;
  const Unsigned rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Unsigned quiet = (bits >> 16) | 0x40u;
  const Unsigned chosen = (x != x).bits ? quiet : rounded;
  *reinterpret_cast<UnalignedWords*>(p) = __builtin_convertvector(chosen, Words);
}

REFINE_EXT_INLINE Vec<float> load(const Half* p) {
#if defined(__AVX512F__)
  return {(Vec<float>::Native)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
#elif defined(__F16C__)
  return {(Vec<float>::Native)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
#else
  // Exponent and mantissa moved into float's fields read as the value times 2^-112; subnormals come out right
  // too.
  const Unsigned wide = __builtin_convertvector(*reinterpret_cast<const UnalignedWords*>(p), Unsigned);
  const Unsigned magnitude = (wide & 0x7fffu) << 13;
  const Vec<float> value = Vec<float>{(Vec<float>::Native)magnitude} * Vec<float>::splat(0x1p112f);
  const Unsigned special =
      magnitude >= (0x7c00u << 13) ? ((Unsigned)value.v | 0x7f800000u) : (Unsigned)value.v;
  return {(Vec<float>::Native)(special | ((wide & 0x8000u) << 16))};
#endif
}

REFINE_EXT_INLINE void store(Half* p, Vec<float> x) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)x.v, 0));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)x.v, 0));
#else
  // Adding a power of two 13 bits above the value's own rounds the float to half's precision, subnormals
  // included.
  const Unsigned bits = (Unsigned)x.v;
  const Unsigned sign = (bits >> 16) & 0x8000u;
  const Unsigned magnitude = bits & 0x7fffffffu;
  const Unsigned floor = Unsigned{} + 0x38800000u;  // 2^-14, the smallest normal half
  const Unsigned exponent = (magnitude > floor ? magnitude : floor) & 0x7f800000u;
  const Vec<float> magic{(Vec<float>::Native)(exponent + (13u << 23))};
  const Vec<float> sum = Vec<float>{(Vec<float>::Native)magnitude} + magic;
  // The low mantissa bits of the sum count units of half's last place; carry into the next exponent comes for
  // free.
  const Unsigned units = (Unsigned)sum.v - (Unsigned)magic.v;
  const Unsigned encoded = (((exponent >> 23) - 113u) << 10) + units;
  Unsigned result = encoded;
  result = magnitude >= 0x477ff000u ? Unsigned{} + 0x7c00u : result;
  result = magnitude > 0x7f800000u ? Unsigned{} + 0x7e00u : result;
  *reinterpret_cast<UnalignedWords*>(p) = __builtin_convertvector(result | sign, Words);
#endif
}

REFINE_EXT_INLINE void store(float* p, Vec<float> x) { x.store(p); }
REFINE_EXT_INLINE void store(double* p, Vec<double> x) { x.store(p); }

// Past the caches, see Vec::stream.
REFINE_EXT_INLINE void stream(float* p, Vec<float> x) { x.stream(p); }
REFINE_EXT_INLINE void stream(double* p, Vec<double> x) { x.stream(p); }

// p is aligned to half a vector.
template <class T>
REFINE_EXT_INLINE void stream(T* p, Vec<float> x) {
#if defined(__AVX512F__)
  alignas(32) T narrow[Vec<float>::kWidth];
  store(narrow, x);
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), *reinterpret_cast<const __m256i*>(narrow));
#elif defined(__AVX2__)
  alignas(16) T narrow[Vec<float>::kWidth];
  store(narrow, x);
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), *reinterpret_cast<const __m128i*>(narrow));
#else
  store(p, x);
#endif
}

// How consecutive elements lie in a pair of vectors.
enum class Order {
  consecutive,
  even_odd,  // even ones in the first: the halves of 32-bit words, which take no shuffles
};
template <class T>
inline constexpr Order order_of = std::is_same_v<T, BFloat16> ? Order::even_odd : Order::consecutive;

template <class S>
struct Pair {
  Vec<S> first, second;
};

REFINE_EXT_INLINE Pair<float> load_even_odd(const BFloat16* p) {
  typedef Vec<float>::Native Native;
  const Unsigned words = *reinterpret_cast<const UnalignedUnsigned*>(p);
  return {{(Native)(words << 16)}, {(Native)(words & 0xffff0000u)}};
}

// Rounded to nearest even, as 32-bit words: up where the lower half is above 2^15, or that and the upper half
// is odd. The lower half of a NaN is 0, as of any NaN that an operation makes or passes on from a bfloat16.
REFINE_EXT_INLINE Vec<float> even_odd_words(const Pair<float>& x) {
  const Unsigned even = (Unsigned)x.first.v, odd = (Unsigned)x.second.v;
  const AllWords upper = (AllWords)(even >> 16 | (odd & 0xffff0000u));
  const AllWords lower = (AllWords)((even & 0xffffu) | odd << 16);
  const AllWords rounded = (lower | (upper & 1)) > 0x8000 ? upper + 1 : upper;
  return {(Vec<float>::Native)rounded};
}

// S lanes starting at p, read from storage type T. The wider compute type of Form::power takes half as many
// at once.
template <class S, class T>
REFINE_EXT_INLINE Vec<S> load_as(const T* p) {
  if constexpr (sizeof(S) == sizeof(typename ComputeOf<T>::type)) {
    return load(p);
  } else {
    constexpr int kWidth = Vec<double>::kWidth;
    float lanes[2 * kWidth];
    if constexpr (sizeof(T) == 4) {
      std::memcpy(lanes, p, kWidth * sizeof(float));
    } else {
      T padded[2 * kWidth] = {};
      std::memcpy(padded, p, kWidth * sizeof(T));
      load(padded).store(lanes);
    }
    Vec<double> wide;
    for (int lane = 0; lane < kWidth; ++lane) wide.v[lane] = lanes[lane];
    return wide;
  }
}

template <class S, class T>
REFINE_EXT_INLINE void store_as(T* p, Vec<S> x) {
  if constexpr (sizeof(S) == sizeof(typename ComputeOf<T>::type)) {
    store(p, x);
  } else {
    constexpr int kWidth = Vec<double>::kWidth;
    float lanes[2 * kWidth] = {};
    for (int lane = 0; lane < kWidth; ++lane) lanes[lane] = static_cast<float>(x.v[lane]);
    if constexpr (sizeof(T) == 4) {
      std::memcpy(p, lanes, kWidth * sizeof(float));
    } else {
      T padded[2 * kWidth];
      store(padded, Vec<float>::load(lanes));
      std::memcpy(p, padded, kWidth * sizeof(T));
    }
  }
}

template <class T>
REFINE_EXT_INLINE T encode(float value) {
  T padded[Vec<float>::kWidth];
  store(padded, Vec<float>::splat(value));
  return padded[0];
}
template <>
REFINE_EXT_INLINE float encode<float>(float value) {
  return value;
}
template <>
REFINE_EXT_INLINE double encode<double>(float value) {
  return value;
}

template <class S>
REFINE_EXT_INLINE VecMask<S> first_lanes(int64_t count) {
  VecMask<S> mask;
  for (int lane = 0; lane < Vec<S>::kWidth; ++lane) mask.bits[lane] = lane < count ? -1 : 0;
  return mask;
}

// Calls step(offset, u) on whole vectors, kUnroll at a time with u = 0, 1, ..., and tail(offset, count) on
// the rest.
template <int kWidth, int kUnroll, class Step, class Tail>
REFINE_EXT_INLINE void for_vectors(int64_t begin, int64_t end, Step&& step, Tail&& tail) {
  int64_t i = begin;
  for (; i + kUnroll * kWidth <= end; i += kUnroll * kWidth) {
#pragma GCC unroll 8
    for (int u = 0; u < kUnroll; ++u) step(i + u * kWidth, u);
  }
  for (; i + kWidth <= end; i += kWidth) step(i, 0);
  if (i < end) tail(i, end - i);
}

}  // namespace refine_ext::REFINE_EXT_ISA
