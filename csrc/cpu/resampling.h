// Drawing indices on the CPU: the entry points that csrc/ops calls, and the table of per-ISA kernels behind
// them. What is drawn is defined in csrc/math/resampling.h.
#pragma once

#include <cstdint>

#include "../math/resampling_problem.h"
#include "density_ratio.h"

namespace refine_ext {

struct ResamplingKernels {
  // The mass of a chunk of at most kDrawChunk weights, or of log-weights. False: a weight is NaN, infinite
  // (log: +inf) or negative.
  bool (*measure)(Storage, bool log, const void* weights, int64_t begin, int64_t end, ChunkMass&);
  // C_i of a chunk: base + align_mass(sum of masses so far, exponent - unit).
  void (*boundaries)(Storage, bool log, const void* weights, int64_t begin, int64_t end, int64_t exponent,
                     int64_t unit, uint64_t base, uint64_t* out);
  // Numbers [first, first + count) of a sequence, two to a Philox block.
  void (*random_numbers)(const PhiloxSequence&, uint64_t first, int64_t count, uint64_t* out);
  // Positions of draws [first, first + count), count at most kPlaced.
  void (*positions)(const Ascending&, uint64_t first, int64_t count, uint64_t* out);
  // For `draws` ascending positions, the indices first_index + i of the elements that own them. Position k
  // must lie near the element boundary c with origin + (c - base) * rate = k: at most one place off.
  void (*place)(const uint64_t* boundaries, int64_t elements, uint64_t base, double origin, double rate,
                const uint64_t* positions, int64_t draws, int64_t first_index, int64_t* out);
  // The largest log-ratio of a range; NaN if there is a NaN or +inf.
  double (*largest)(Storage, const void* log_ratio, int64_t begin, int64_t end);
  // Acceptance decisions of a range of one row, with numbers offset + i; returns how many were kept.
  int64_t (*accept)(Storage, const void* log_ratio, int64_t begin, int64_t end, const Acceptance&,
                    const PhiloxSequence&, uint64_t offset, bool* keep);
  // Steps [first, first + count) of a chain: the proposal's random bits, and log u.
  void (*steps)(const PhiloxSequence&, uint64_t first, int64_t count, uint64_t* proposal, double* log_unit);
};

// Draws whose positions are in work at once: 32 KB.
inline constexpr int64_t kPlaced = 4096;

enum class DrawError : int { none, invalid, no_mass };

// The first row with an error names it; what its row of `out` holds is unspecified.
struct DrawReport {
  DrawError error = DrawError::none;
  int64_t row = -1;
};

DrawReport resample_cpu(const ResampleProblem&);

DrawReport rejection_cpu(const RejectionProblem&);

DrawReport metropolis_cpu(const MetropolisProblem&);

}  // namespace refine_ext
