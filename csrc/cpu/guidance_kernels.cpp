// The loop of a guided step over the elements of a sample, compiled once per instruction set: the noise is
// made in registers, and each tensor is read or written once.
#include "guidance.h"
#include "normal_simd.h"

namespace refine_ext::REFINE_EXT_ISA {
namespace {

// One Philox vector's worth: 4 vectors.
template <class S>
struct Block {
  static constexpr int kWidth = Vec<S>::kWidth, kElements = 4 * kWidth;
  Vec<S> part[4];

  template <bool kFirst, class T>
  REFINE_EXT_INLINE void add(Vec<S> coefficient, const void* data, int64_t at) {
    const T* p = static_cast<const T*>(data) + at;
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const Vec<S> u = load_as<S>(p + j * kWidth);
      part[j] = kFirst ? coefficient * u : coefficient * u + part[j];
    }
  }

  // The state's storage T first, which most terms have.
  template <bool kFirst, class T>
  REFINE_EXT_INLINE void add_term(const StepTerm& term, int64_t at) {
    const Vec<S> coefficient = Vec<S>::splat(static_cast<S>(term.coefficient));
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

  template <class T>
  REFINE_EXT_INLINE void store(T* out, bool stream) const {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      if (stream) {
        REFINE_EXT_ISA::stream(out + j * kWidth, part[j]);
      } else {
        REFINE_EXT_ISA::store(out + j * kWidth, part[j]);
      }
    }
  }
};

template <class T, bool kNoisy>
REFINE_EXT_INLINE void step_block(const StepRange& range, const NoiseLanes& lanes, const StepTerm* terms,
                                  T* out, uint32_t block, int64_t at, bool stream) {
  using S = typename ComputeOf<T>::type;
  using V = Vec<S>;
  Block<S> sum;
  V z[4];
  if constexpr (kNoisy) lanes.normals(block, z);
  if (range.terms > 0) {
    sum.template add_term<true, T>(terms[0], at);
  } else {
    for (V& part : sum.part) part = V::splat(0);
  }
  for (int k = 1; k < range.terms; ++k) sum.template add_term<false, T>(terms[k], at);
  if constexpr (kNoisy) {
    const V noise = V::splat(static_cast<S>(range.noise));
    for (int j = 0; j < 4; ++j) sum.part[j] = noise * z[j] + sum.part[j];
  }
  sum.store(out + at, stream);
}

template <class T, bool kNoisy>
void step_range(const StepRange& argument) {
  const StepRange range = argument;  // which no store can change
  const NoiseLanes noise(range.sequence);
  using S = typename ComputeOf<T>::type;
  constexpr int64_t kElements = Block<S>::kElements;
  static_assert(kStepBlock % kElements == 0);
  T* out = static_cast<T*>(range.out);
  const auto block_of = [](int64_t at) { return static_cast<uint32_t>(at / 4); };
  int64_t at = range.begin;
  for (; at + kElements <= range.end; at += kElements) {
    step_block<T, kNoisy>(range, noise, range.term, out, block_of(at), at, range.stream);
  }
  if (const int64_t count = range.end - at; count > 0) {
    // The last elements with others beside them, by the same arithmetic.
    StepTerm padded[kMostTerms + 1];
    alignas(64) char lanes[kMostTerms + 1][kElements * sizeof(T)];
    T result[kElements];
    for (int k = 0; k < range.terms; ++k) {
      const int64_t size = size_of(range.term[k].storage);
      std::memset(lanes[k], 0, sizeof lanes[k]);
      std::memcpy(lanes[k], static_cast<const char*>(range.term[k].data) + at * size, count * size);
      padded[k] = {lanes[k], range.term[k].storage, range.term[k].coefficient};
    }
    step_block<T, kNoisy>(range, noise, padded, result, block_of(at), 0, false);
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

}  // namespace

extern const GuidanceKernels guidance_kernels;
const GuidanceKernels guidance_kernels = {step};

}  // namespace refine_ext::REFINE_EXT_ISA
