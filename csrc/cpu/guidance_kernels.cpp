// The loop of a guided step over the elements of a sample, compiled once per instruction set: the noise is
// made in registers, and each tensor is read or written once.
#include "guidance.h"
#include "normal_simd.h"

namespace refine_ext::REFINE_EXT_ISA {
namespace {

// Parts of the noise that are made side by side, or of the elements without: as many as registers hold, of
// float64 fewer, since its steps wait for memory.
template <class T, bool kNoisy>
inline constexpr int kStepParts = sizeof(T) == 8 ? 2 : (kVectorBytes < 64 ? 2 : 4) * (kNoisy ? 1 : 2);

// The elements of kParts parts of the noise, pairs of vectors in the order of the state's storage T.
template <class T, int kParts>
struct Block {
  using S = typename ComputeOf<T>::type;
  using V = Vec<S>;
  static constexpr int kWidth = V::kWidth, kElements = kParts * kNumbers, kVectors = kElements / kWidth;
  static constexpr bool kEvenOdd = order_of<T> == Order::even_odd;
  V part[kVectors];

  // Of a tensor of another storage U; a state of half precision has none.
  template <class U>
  static REFINE_EXT_INLINE Pair<S> load_pair(const U* p) {
    if constexpr (kEvenOdd) {
      return load_even_odd(p);
    } else {
      return {load_as<S>(p), load_as<S>(p + kWidth)};
    }
  }

  template <bool kFirst, class U>
  REFINE_EXT_INLINE void add(V coefficient, const void* data, int64_t at) {
    const U* p = static_cast<const U*>(data) + at;
#pragma GCC unroll 16
    for (int j = 0; j < kVectors; j += 2) {
      const Pair<S> u = load_pair(p + j * kWidth);
      part[j] = kFirst ? coefficient * u.first : coefficient * u.first + part[j];
      part[j + 1] = kFirst ? coefficient * u.second : coefficient * u.second + part[j + 1];
    }
  }

  // The state's storage first, which most terms have.
  template <bool kFirst>
  REFINE_EXT_INLINE void add_term(const StepTerm& term, int64_t at) {
    const V coefficient = V::splat(static_cast<S>(term.coefficient));
    if (term.storage == storage_tag<T>) return add<kFirst, T>(coefficient, term.data, at);
    if constexpr (sizeof(T) == 8) {
      add<kFirst, float>(coefficient, term.data, at);
    } else if constexpr (sizeof(T) == 4) {
      if (term.storage == Storage::float16) {
        add<kFirst, Half>(coefficient, term.data, at);
      } else {
        add<kFirst, BFloat16>(coefficient, term.data, at);
      }
    }
  }

  REFINE_EXT_INLINE void store(T* out, bool stream) const {
#pragma GCC unroll 16
    for (int j = 0; j < kVectors; j += kEvenOdd ? 2 : 1) {
      if constexpr (kEvenOdd) {
        const V words = even_odd_words({part[j], part[j + 1]});
        float* p = reinterpret_cast<float*>(out + j * kWidth);
        stream ? words.stream(p) : words.store(p);
      } else if (stream) {
        REFINE_EXT_ISA::stream(out + j * kWidth, part[j]);
      } else {
        REFINE_EXT_ISA::store(out + j * kWidth, part[j]);
      }
    }
  }
};

template <class T, int kParts, bool kNoisy>
REFINE_EXT_INLINE void step_block(const StepRange& range, const NoiseLanes& lanes, const StepTerm* terms,
                                  T* out, uint32_t block, int64_t at, bool stream) {
  using B = Block<T, kParts>;
  using V = typename B::V;
  B sum;
  V z[B::kVectors];
  if constexpr (kNoisy) lanes.template normals<order_of<T>, kParts>(block, z);
  if (range.terms > 0) {
    sum.template add_term<true>(terms[0], at);
  } else {
    for (V& part : sum.part) part = V::splat(0);
  }
  for (int k = 1; k < range.terms; ++k) sum.template add_term<false>(terms[k], at);
  if constexpr (kNoisy) {
    const V noise = V::splat(static_cast<typename B::S>(range.noise));
#pragma GCC unroll 16
    for (int j = 0; j < B::kVectors; ++j) sum.part[j] = noise * z[j] + sum.part[j];
  }
  sum.store(out + at, stream);
}

template <class T, bool kNoisy>
void step_range(const StepRange& argument) {
  const StepRange range = argument;  // which no store can change
  const NoiseLanes noise(range.sequence);
  constexpr int kParts = kStepParts<T, kNoisy>;
  constexpr int64_t kElements = Block<T, kParts>::kElements, kSmall = Block<T, 1>::kElements;
  static_assert(kStepBlock % kElements == 0);
  T* out = static_cast<T*>(range.out);
  const auto block_of = [](int64_t at) { return static_cast<uint32_t>(at / 4); };
  int64_t at = range.begin;
  for (; at + kElements <= range.end; at += kElements) {
    step_block<T, kParts, kNoisy>(range, noise, range.term, out, block_of(at), at, range.stream);
  }
  for (; at < range.end; at += kSmall) {
    const int64_t count = std::min(kSmall, range.end - at);
    if (count == kSmall) {
      step_block<T, 1, kNoisy>(range, noise, range.term, out, block_of(at), at, range.stream);
      continue;
    }
    // The last elements with others beside them, by the same arithmetic.
    StepTerm padded[kMostTerms + 1];
    alignas(64) char lanes[kMostTerms + 1][kSmall * sizeof(T)];
    alignas(64) T result[kSmall];
    for (int k = 0; k < range.terms; ++k) {
      const int64_t size = size_of(range.term[k].storage);
      std::memset(lanes[k], 0, sizeof lanes[k]);
      std::memcpy(lanes[k], static_cast<const char*>(range.term[k].data) + at * size, count * size);
      padded[k] = {lanes[k], range.term[k].storage, range.term[k].coefficient};
    }
    step_block<T, 1, kNoisy>(range, noise, padded, result, block_of(at), 0, false);
    std::memcpy(out + at, result, count * sizeof(T));
  }
  if (range.stream) stream_fence();
}

void step(const StepRange& range) {
  with_storage(range.storage, [&](auto tag) {
    using T = decltype(tag);
    if (range.noise != 0.0) {
      step_range<T, true>(range);
    } else {
      step_range<T, false>(range);
    }
  });
}

// S lanes of a tensor from element `at` on, of which `count` are there.
template <class S, class T>
REFINE_EXT_INLINE Vec<S> load_part(const void* data, int64_t at, int64_t count) {
  const T* p = static_cast<const T*>(data) + at;
  if (count >= Vec<S>::kWidth) return load_as<S>(p);
  T lanes[2 * Vec<S>::kWidth] = {};
  std::memcpy(lanes, p, static_cast<size_t>(count) * sizeof(T));
  return load_as<S>(lanes);
}

template <class S>
REFINE_EXT_INLINE Vec<S> load_tensor(const StepTensor& tensor, int64_t at, int64_t count) {
  if constexpr (sizeof(S) == 8) {
    return tensor.storage == Storage::float64 ? load_part<S, double>(tensor.data, at, count)
                                              : load_part<S, float>(tensor.data, at, count);
  } else {
    if (tensor.storage == Storage::float16) return load_part<S, Half>(tensor.data, at, count);
    if (tensor.storage == Storage::bfloat16) return load_part<S, BFloat16>(tensor.data, at, count);
    return load_part<S, float>(tensor.data, at, count);
  }
}

// The elements of several samples in one vector, with the coefficients of each spelled out.
template <class T>
void step_short_samples(const GuidedStepProblem& problem, int64_t first, int64_t last) {
  using S = typename ComputeOf<T>::type;
  using V = Vec<S>;
  constexpr int kWidth = V::kWidth;
  constexpr int64_t kElements = 256;
  alignas(64) S coefficients[kMostTerms + 2][kElements + kWidth] = {};
  alignas(64) S z[kElements + 2 * kNumbers] = {};
  const int64_t n = problem.n, blocks = (n + 3) / 4, group = kElements / (4 * blocks);
  const int columns = problem.terms + (problem.noisy ? 2 : 1);
  T* out = static_cast<T*>(problem.out);
  const V zero = V::splat(0);
  for (int64_t row = first; row < last; row += group) {
    const int64_t samples = std::min(group, last - row), elements = samples * n;
    for (int64_t b = 0; b < samples; ++b) {
      for (int k = 0; k < columns; ++k) {
        const S coefficient = static_cast<S>(problem.coefficient(row + b, k));
        for (int64_t e = 0; e < n; ++e) coefficients[k][b * n + e] = coefficient;
      }
    }
    if (problem.noisy) {
      normals_of_samples<S>(samples, blocks, [&](int64_t b) { return problem.noise(row + b); }, z);
      for (int64_t b = 1; b < samples && n % 4 != 0; ++b) {
        for (int64_t e = 0; e < n; ++e) z[b * n + e] = z[b * 4 * blocks + e];
      }
    }
    for (int64_t at = 0; at < elements; at += kWidth) {
      const int64_t count = std::min<int64_t>(kWidth, elements - at), place = row * n + at;
      V sum = zero;
      for (int k = 0; k < columns; ++k) {
        const V c = V::load(coefficients[k] + at);
        const V u = k > problem.terms
                        ? V::load(z + at)
                        : load_tensor<S>(k == 0 ? problem.x : problem.term[k - 1], place, count);
        sum = select(c == zero, sum, c * u + sum);
      }
      if (count == kWidth) {
        store_as<S>(out + place, sum);
      } else {
        T lanes[2 * kWidth];
        store_as<S>(lanes, sum);
        std::memcpy(out + place, lanes, static_cast<size_t>(count) * sizeof(T));
      }
    }
  }
}

void short_samples(const GuidedStepProblem& problem, int64_t first, int64_t last) {
  with_storage(problem.x.storage, [&](auto tag) { step_short_samples<decltype(tag)>(problem, first, last); });
}

}  // namespace

extern const GuidanceKernels guidance_kernels;
const GuidanceKernels guidance_kernels = {step, short_samples};

}  // namespace refine_ext::REFINE_EXT_ISA
