// Guided steps on the CPU: the entry points that csrc/ops calls, and the table of per-ISA kernels behind
// them.
#pragma once

#include <cstdint>

#include "../math/guidance.h"

namespace refine_ext {

// x and the terms that count: those whose coefficient, in the arithmetic's type, is not 0.
struct StepTerm {
  const void* data;  // the sample's first element
  Storage storage;
  double coefficient;
};

// Elements [begin, end) of one sample; begin is a multiple of kStepBlock.
struct StepRange {
  void* out;
  Storage storage;  // of the state, and so of out
  int terms;
  StepTerm term[kMostTerms + 1];
  double noise;  // coefficient of the noise; 0: none
  NoiseSequence sequence;
  int64_t begin, end;
  bool stream;  // write past the caches; out + begin is aligned to a vector
};
inline constexpr int64_t kStepBlock = 256;

// Samples of up to so many elements, contiguous in every tensor, are stepped side by side.
inline constexpr int64_t kShortSample = 32;

struct GuidanceKernels {
  void (*step)(const StepRange&);
  // Samples [first, last) of at most kShortSample elements.
  void (*short_samples)(const GuidedStepProblem&, int64_t first, int64_t last);
};

struct GuidanceFactorKernels {
  // Of samples [first, last).
  void (*factors)(const GuidanceFactorProblem&, int64_t first, int64_t last);
};

void guided_step_cpu(const GuidedStepProblem&);

void guidance_factor_cpu(const GuidanceFactorProblem&);

}  // namespace refine_ext
