// Sums of a log-mixture over a chunk of centres (csrc/cpu/log_mixture.h), compiled once per instruction set.
#include <bit>
#include <new>

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

#include "log_mixture.h"
#include "log_mixture_few.h"

namespace refine_ext::REFINE_EXT_ISA {
namespace {

template <class S>
using AddPiece = void (*)(const MixturePiece<S>&);

template <class S, int kVectors, bool kKeep>
AddPiece<S> piece_kernel(const MixtureInputs& in) {
  if (in.scale_kind == MixtureScale::per_dimension) return add_piece<S, 0, true, kVectors, kKeep>;
  if constexpr (sizeof(S) == 4) {
    constexpr AddPiece<S> kSmall[] = {add_piece<S, 1, false, kVectors, kKeep>,
                                      add_piece<S, 2, false, kVectors, kKeep>,
                                      add_piece<S, 3, false, kVectors, kKeep>};
    if (in.d <= 3) return kSmall[in.d - 1];
  }
  return add_piece<S, 0, false, kVectors, kKeep>;
}

// ---- A block of rows

// Results below the normal range are zero meanwhile: they cost hundreds of cycles on some processors.
class FlushSubnormals {
 public:
#if defined(__SSE__)
  FlushSubnormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8000); }
  ~FlushSubnormals() { _mm_setcsr(before_); }

 private:
  unsigned before_;
#endif
};

// Centres whose means are summed in the compute type.
constexpr int64_t kMeanCenters = 512;

// What a block keeps of its groups of rows, in its memory.
template <class S>
struct Layout {
  static constexpr int64_t kRows = MixtureTile<S>::kRows, kCenters = MixtureTile<S>::kCenters;
  int64_t groups, tiles, row_values, mean_values;

  Layout(const MixtureInputs& in, int64_t rows, bool mean)
      : groups((rows + kRows - 1) / kRows),
        // In L1, no more centres than a float32 sum takes well, and whole pieces in a batch.
        tiles(static_cast<int64_t>(std::bit_floor(static_cast<uint64_t>(
            std::clamp<int64_t>(16384 / (CenterTile<S>::size(in) * static_cast<int64_t>(sizeof(S))), 1,
                                CenterBatch<S>::kTiles))))),
        row_values(in.d * kRows),
        mean_values(mean ? in.d * kRows : 0) {}

  static int64_t rounded(int64_t bytes) { return (bytes + 63) / 64 * 64; }
  int64_t piece_bytes(const MixtureInputs& in) const {
    return rounded(tiles * CenterTile<S>::size(in) * static_cast<int64_t>(sizeof(S)));
  }
  // Few rows leave most lanes empty.
  static bool few(const MixtureInputs& in, int64_t rows) {
    return rows <= MixtureTile<S>::kWidth / 2 && in.scale_kind != MixtureScale::per_dimension &&
           in.n >= CenterBatch<S>::kAll;
  }
  static int64_t batch_bytes(const MixtureInputs& in, int64_t rows) {
    return few(in, rows) ? rounded(CenterBatch<S>::kAll * in.d * static_cast<int64_t>(sizeof(S))) : 0;
  }
  int64_t group_bytes() const {
    return rounded(static_cast<int64_t>(sizeof(RowSums<S>)) +
                   (row_values + mean_values) * static_cast<int64_t>(sizeof(S)) + mean_values * 8);
  }
};

template <class S>
struct Group {
  RowSums<S>* lanes;
  S *rows, *mean;
  double* wide_mean;

  Group(const Layout<S>& layout, char* memory, int64_t g) {
    char* own = memory + g * layout.group_bytes();
    lanes = reinterpret_cast<RowSums<S>*>(own);
    wide_mean = reinterpret_cast<double*>(own + sizeof(RowSums<S>));
    mean = reinterpret_cast<S*>(wide_mean + layout.mean_values);
    rows = mean + layout.mean_values;
    if (!layout.mean_values) mean = nullptr;
  }
};

template <class S>
void set_excluded(const MixtureChunk& chunk, int64_t first, RowSums<S>& lanes) {
  const int64_t end = std::min(first + RowSums<S>::kRows, chunk.first_row + chunk.rows);
  int64_t low = chunk.centers, high = -1;
  for (int64_t i = first; i < end; ++i) {
    const int64_t at = chunk.in.exclude[i] - chunk.first_center;
    if (at < 0 || at >= chunk.centers) continue;
    lanes.excluded[i - first] = static_cast<RowIndex<S>>(at);
    low = std::min(low, at);
    high = std::max(high, at);
  }
  lanes.exclude_begin = low;
  lanes.exclude_end = high + 1;
}

template <class S>
void set_state(const MixtureChunk& chunk, const RowSums<S>& lanes, int64_t l, MixtureState& state) {
  const bool none = lanes.opposite[l] == RowSums<S>::kNoReference;
  state.reference = none ? -HUGE_VAL : -static_cast<double>(lanes.opposite[l]);
  state.sum = lanes.sum[l];
  state.squares = lanes.squares[l];
  state.largest = std::numeric_limits<double>::quiet_NaN();
  state.index = -1;
  if (lanes.best_center[l] >= 0 && !none) {
    state.index = chunk.first_center + lanes.best_center[l];
    // As the tile had it, which is alike for a centre that comes twice, in whichever chunk.
    const bool per_center = chunk.in.scale_kind == MixtureScale::per_center;
    const S slope = chunk.in.scale_kind == MixtureScale::per_dimension
                        ? S(1)
                        : slope_of<S>(chunk.in, per_center ? state.index : 0);
    using V = Vec<S>;
    state.largest = exponent(V::splat(slope), V::splat(log2_weight_of<S>(chunk.in, state.index)),
                             V::splat(lanes.best_distance[l]), V::splat(0))
                        .v[0];
  }
}

template <class S, class T>
void add_chunk(const MixtureChunk& chunk) {
  constexpr int64_t kRows = MixtureTile<S>::kRows, kWidth = MixtureTile<S>::kWidth;
  constexpr int64_t kCenters = MixtureTile<S>::kCenters;
  const MixtureInputs& in = chunk.in;
  const Layout<S> layout(in, chunk.rows, chunk.mean);
  S* const tiles = reinterpret_cast<S*>(chunk.memory);
  const bool few = layout.few(in, chunk.rows) && !chunk.mean && !chunk.stats;
  CenterBatch<S> batch;
  batch.values = reinterpret_cast<S*>(chunk.memory + layout.piece_bytes(in));
  char* const groups = reinterpret_cast<char*>(batch.values) + layout.batch_bytes(in, chunk.rows);
  const bool keep = chunk.mean || chunk.stats;
  const auto vectors_of = [&](int64_t g) { return chunk.rows - g * kRows > kWidth ? 2 : 1; };
  for (int64_t g = 0; g < layout.groups; ++g) {
    const Group<S> group(layout, groups, g);
    const int64_t first = chunk.first_row + g * kRows;
    new (group.lanes) RowSums<S>();
    if (in.exclude) set_excluded(chunk, first, *group.lanes);
    vectors_of(g) == 2 ? pack_rows<2, S, T>(in, first, group.rows)
                       : pack_rows<1, S, T>(in, first, group.rows);
    std::fill_n(group.wide_mean, layout.mean_values, 0.0);
    if (group.mean) std::fill_n(group.mean, layout.mean_values, S(0));
  }
  const AddPiece<S> two = keep ? piece_kernel<S, 2, true>(in) : piece_kernel<S, 2, false>(in);
  const AddPiece<S> one = keep ? piece_kernel<S, 1, true>(in) : piece_kernel<S, 1, false>(in);
  const S slope = in.scale_kind == MixtureScale::shared ? slope_of<S>(in, 0) : S(0);
  int64_t unflushed = 0, count;
  for (int64_t c = 0; c < chunk.centers; c += count * kCenters) {
    if (few && c % batch.kAll == 0 && c + batch.kAll <= chunk.centers &&
        batch.template read<T>(in, chunk.first_center + c, slope)) {
      const Group<S> group(layout, groups, 0);
      const FlushSubnormals flushing;
      count = batch.kTiles;
      for (int64_t l = 0; l < chunk.rows; ++l) {
        add_batch<S>({in, nullptr, count, c, false, group.rows, *group.lanes, nullptr, nullptr, false}, batch,
                     l, layout.tiles);
      }
      continue;
    }
    count = std::min(layout.tiles, (chunk.centers - c + kCenters - 1) / kCenters);
    for (int64_t q = 0; q < count; ++q) {
      pack_centers<S, T>(in, chunk.first_center + c + q * kCenters, slope,
                         CenterTile<S>(in, tiles + q * CenterTile<S>::size(in)));
    }
    unflushed += count * kCenters;
    const bool flush = chunk.mean && (unflushed >= kMeanCenters || c + count * kCenters >= chunk.centers);
    if (flush) unflushed = 0;
    const FlushSubnormals flushing;
    for (int64_t g = 0; g < layout.groups; ++g) {
      const Group<S> group(layout, groups, g);
      (vectors_of(g) == 2 ? two : one)({in, tiles, count, c, chunk.stats, group.rows, *group.lanes,
                                        group.mean, group.wide_mean, chunk.score});
      for (int64_t e = 0; flush && e < layout.mean_values; e += kWidth) {
        add_wide(group.wide_mean + e, Vec<S>::load(group.mean + e));
        Vec<S>::splat(0).store(group.mean + e);
      }
    }
  }
  for (int64_t g = 0; g < layout.groups; ++g) {
    const Group<S> group(layout, groups, g);
    const int64_t first = g * kRows, step = vectors_of(g) * kWidth;
    for (int64_t l = 0; l < std::min(kRows, chunk.rows - first); ++l) {
      set_state(chunk, *group.lanes, l, chunk.states[first + l]);
      for (int64_t k = 0; chunk.mean && k < in.d; ++k) {
        chunk.mean[(first + l) * in.d + k] = group.wide_mean[k * step + l];
      }
    }
  }
}

// Scales whose squares, or distances in their unit, float32 does not hold are worked on in float64.
bool needs_double(const MixtureInputs& in) {
  if (in.storage == Storage::float64) return true;
  const int64_t count = in.scale_kind == MixtureScale::shared       ? 1
                        : in.scale_kind == MixtureScale::per_center ? in.n
                                                                    : in.n * in.d;
  const float* scale = static_cast<const float*>(in.scale);
  bool all = true;
  for (int64_t i = 0; i < count; ++i) all &= scale[i] > 0x1p-20f && scale[i] < 0x1p60f;
  return !all;
}

template <class F>
auto with_compute(bool in_double, F&& f) {
  return in_double ? f(double{}) : f(float{});
}

MixturePlan plan(const MixtureInputs& in, bool mean) {
  const bool in_double = needs_double(in);
  return with_compute(in_double, [&](auto tag) {
    using S = decltype(tag);
    // The rows, and the sums of means, in L2.
    constexpr int64_t kBytes = 640 << 10, kRows = MixtureTile<S>::kRows;
    const int64_t bytes = static_cast<int64_t>(sizeof(RowSums<S>)) +
                          (mean ? 2 : 1) * in.d * kRows * static_cast<int64_t>(sizeof(S));
    // A few dozen chunks, for threads where there are few rows; whole tiles.
    const int64_t chunk = std::max<int64_t>(8192, (in.n / 64 + 63) / 64 * 64);
    return MixturePlan{kRows * std::max<int64_t>(1, kBytes / bytes), chunk, in_double};
  });
}

// Few rows take their centres in batches.
int64_t memory_bytes(const MixtureInputs& in, const MixturePlan& plan, int64_t rows, bool mean) {
  return with_compute(plan.in_double, [&](auto tag) {
    using S = decltype(tag);
    const auto bytes = [&](int64_t some) {
      const Layout<S> layout(in, some, mean);
      return layout.piece_bytes(in) + layout.batch_bytes(in, some) + layout.groups * layout.group_bytes();
    };
    return std::max(bytes(rows), bytes(std::min<int64_t>(rows, MixtureTile<S>::kWidth / 2)));
  });
}

void add(const MixtureChunk& chunk) {
  with_storage(chunk.in.storage, [&](auto tag) {
    using T = decltype(tag);
    if constexpr (sizeof(T) == 8) {
      add_chunk<double, double>(chunk);
    } else {
      chunk.plan.in_double ? add_chunk<double, T>(chunk) : add_chunk<float, T>(chunk);
    }
  });
}

}  // namespace

extern const LogMixtureKernels log_mixture_kernels = {plan, memory_bytes, add};

}  // namespace refine_ext::REFINE_EXT_ISA
