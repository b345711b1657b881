// The Gaussian log-mixture in many dimensions on the CPU: what its driver and its per-ISA kernels share.
//
// A squared distance is summed with the dimensions in the lanes, so that it depends on its row and centre
// alone, whichever tile or list it was met in. Centres are taken in chunks of kChunk. Of a chunk, a row
// counts the centres whose exponent is within `span` of the row's largest there; the others are below 2^-26
// together, or for gradients 2^-80, so that they may be those of a row that lies on a centre.
//
// Where that leaves few, most distances need not be known: products of x - c and y - c, rounded to 8 or 11
// bits (c: a mean of the centres), bound every exponent from above and below, and only the distances of the
// centres that may be within `span` of the largest are summed. The result has the same bits.
//
// Memory beside inputs and results: float32 copies of x's and the centres' rows where they are not float32 of
// a multiple of kPadding dimensions, 16 bytes a centre, and where distances are screened a centre's rounded
// values, of one or two bytes, and 24 bytes; for each thread and each of kRowBlock rows 4 kChunk bytes, where
// distances are screened twice that, and for means or scores 8 kChunk and 16 a dimension more; for scores 2
// KB and 8 a dimension besides.
#pragma once

#include "../math/log_mixture_problem.h"

namespace refine_ext {

inline constexpr int64_t kChunk = 4096;
inline constexpr int64_t kRowBlock = 64;
inline constexpr double kValueSpan = 26.0, kGradientSpan = 80.0;
inline constexpr int64_t kPadding = 16;  // rows of float32 are padded with zeros to a multiple of it

// All centres, and what their exponents t_j = log2_weight_j - rate_j |x - y_j|^2 are made of.
struct WideCenters {
  const float* values;  // [n][stride]
  int64_t stride, n;
  const double* rate;         // [n] log2(e) / (2 s_j^2)
  const double* log2_weight;  // [n]
  double span;                // kValueSpan or kGradientSpan, and log2(n)
  REFINE_EXT_INLINE const float* row(int64_t j) const { return values + j * stride; }
};

// A row's weights 2^(t_j - largest) of the centres that count, in the order of j.
struct KeptCenters {
  int32_t* index;  // from the chunk's first; with room for kPadding more
  float* weight;   // the same
  int64_t count;
};

struct WideKernels {
  // Rows of `storage` as float32, padded with zeros.
  void (*widen)(const void* from, Storage, int64_t rows, int64_t d, float* to, int64_t stride);
  // to[r * to_stride + j] = |x_r - y_j|^2 for n centres from y on.
  void (*distances)(const float* const* x, int64_t rows, const float* y, int64_t n, int64_t stride, float* to,
                    int64_t to_stride);
  // to[c] = |x - y_chosen[c]|^2.
  void (*chosen_distances)(const float* x, const float* y, const int32_t* chosen, int64_t count,
                           int64_t stride, float* to);
  // The state of a chunk, of `count` distances: of the chosen centres, or of its first ones where that is
  // null. The excluded one is counted from the chunk's first. t: working
  // memory, with room for kPadding more.
  MixtureState (*reduce)(const WideCenters&, int64_t first, const float* x, int64_t exclude,
                         const float* distances, const int32_t* chosen, int64_t count, double* t,
                         KeptCenters& kept);
  // sums[r * stride + k] = sum over row r's kept centres of weight * y_k.
  void (*weighted_sums)(const WideCenters&, int64_t first, const KeptCenters* kept, int64_t rows,
                        double* sums);
};

// A row of the gradients' sums: its exponents are taken against log2_value, which is the value's.
struct WideRow {
  double log2_value;
  double grad;   // 1 where no sums over rows are wanted
  double least;  // exponents below it are left out
};

// Some rows and a chunk of n centres, and the sums that their gradients are made of.
struct WideSums {
  const WideCenters& centers;
  int64_t first, n;
  const float* x;  // [rows][stride], and with zeros on to a multiple of kGradientTile
  int64_t rows;
  const float* w;      // [rows][n] g_i p_ij, times the rate where each centre has its own
  float* row_sums;     // [rows][stride], and on as x: sum_j w_ij (x_i - y_j), or null
  float* center_sums;  // [n][stride] sum_i w_ij (x_i - y_j), or null
  bool* touched;       // [n]: center_sums has the centre's sums; before, what it has is of no meaning
  int32_t* index;      // working memory: [n + kGradientTile]
  float* packed;       // [kGradientRows][n + kGradientTile]
};
inline constexpr int64_t kGradientRows = 16, kGradientTile = 4;

struct WideGradientKernels {
  // w[0, n) of a row, from distances as for `reduce`. weights[j] += g p_j and squares[j] += g p_j |x -
  // y_j|^2, in float64, unless null. Whether there is any weight.
  bool (*weights)(const WideCenters&, int64_t first, int64_t n, bool with_rate, const float* x,
                  int64_t exclude, const float* distances, const int32_t* chosen, int64_t count,
                  const WideRow& row, double* t, float* w, double* weights, double* squares);
  void (*sums)(const WideSums&);
};

// Centres rounded for screening. Bounds are of t_j / unit, so that they stay finite whatever the scale is.
struct ScreenCenters {
  const float* mean;  // [stride] c
  char* values;       // of whole panels
  // Of each centre, up to whole panels: the exponent is within `error` of base_j + gain_j g_i d_ij - rate_j
  // |x_i - c|^2, g_i being x_i's unit and d_ij the product of the integers.
  float *base, *gain, *rate;
  float *residual, *size, *slack;  // error = residual_j a_i + size_j b_i + slack_j + rate_j f_i
  double unit;
};

struct ScreenKernels {
  int64_t panel;                      // centres of a panel
  int64_t (*panel_bytes)(int64_t d);  // 0: the CPU has no instruction that makes it pay
  // Rounds the centres of panels [begin, end). scratch: [2 stride].
  void (*round_centers)(const WideCenters&, int64_t d, const ScreenCenters&, int64_t begin, int64_t end,
                        float* scratch);
  // chosen[r * room] and on, count[r] of them: the centres of the chunk of n from `first` on whose exponent
  // may be least[r], or within `span` of the row's largest there where least is null; count[r] is -1 where
  // they are more than `most`, or no bound holds. scratch: of scratch_floats(d).
  void (*choose)(const WideCenters&, const ScreenCenters&, int64_t d, const float* const* x, int64_t rows,
                 const int64_t* exclude, const double* least, int64_t first, int64_t n, int64_t most,
                 int64_t room, float* scratch, int32_t* chosen, int64_t* count);
  int64_t (*scratch_floats)(int64_t d);
};

// Whether these inputs are for the functions here. Not a matter of m: a row's bits are the same
// whichever others come with it.
bool is_wide(const MixtureInputs&);
void log_mixture_wide_cpu(const LogMixtureProblem&);
struct MixtureBackwardPlan;
// The plan's sums over rows in float32, and the gradient of x.
void log_mixture_wide_sums(const MixtureBackwardPlan&);

}  // namespace refine_ext
