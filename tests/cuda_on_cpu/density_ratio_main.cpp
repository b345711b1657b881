// Runs requests from standard input on the emulated kernels, through the launchers of csrc/cuda, and answers
// on standard output. Every buffer has exactly the size it needs, on the heap, so that the sanitizers see one
// element too far.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "../../csrc/cuda/density_ratio.h"

namespace {

using namespace refine_ext;

// As test_cuda_on_cpu.py packs it.
struct Request {
  int64_t op, storage, rows, n, real_n, divergence;
  double alpha;
  int64_t output, fixed, shift_stride, weight_stride, flag, wide, in_place, misaligned, out_misaligned;
};
enum Op : int64_t { ratio, bound, bound_backward, backward, output, slope, dual_bound };
enum Input { h_in, weights_in, shift_in, other_in, stats_in, grad_stats_in, kInputs };

struct Free {
  void operator()(void* p) const { std::free(p); }
};

// `bytes` bytes at `offset` from a 16-byte boundary, up to the very end of their allocation.
struct Buffer {
  std::unique_ptr<char, Free> memory;
  char* data = nullptr;
  size_t bytes = 0;

  Buffer() = default;
  Buffer(size_t size, size_t offset, int fill) : bytes(size) {
    void* p = nullptr;
    if (posix_memalign(&p, 16, size + offset) != 0) std::abort();
    memory.reset(static_cast<char*>(p));
    data = memory.get() + offset;
    std::memset(data, fill, size);
  }
};

bool read_exactly(void* to, size_t bytes) { return bytes == 0 || std::fread(to, bytes, 1, stdin) == 1; }

void answer(const Buffer& buffer) {
  const int64_t size = static_cast<int64_t>(buffer.bytes);
  std::fwrite(&size, sizeof(size), 1, stdout);
  if (size) std::fwrite(buffer.data, buffer.bytes, 1, stdout);
}

void serve(const Request& request, Buffer (&in)[kInputs]) {
  const auto storage = static_cast<Storage>(request.storage);
  const size_t element = static_cast<size_t>(size_of(storage));
  const Family family = make_family(static_cast<Divergence>(request.divergence), request.alpha);
  const size_t rows = static_cast<size_t>(request.rows), n = static_cast<size_t>(request.n);
  Buffer out, stats, values, workspace;
  if (!request.in_place)
    out = Buffer(rows * n * element, static_cast<size_t>(request.out_misaligned) * element, 0xab);
  if (request.op == ratio || request.op == bound) stats = Buffer(rows * sizeof(RatioStats), 0, 0xab);
  if (request.op == bound || request.op == dual_bound)
    values = Buffer(rows * (request.wide ? 8 : 4), 0, 0xab);
  DensityRatioProblem problem{in[h_in].data,
                              in[weights_in].data,
                              request.in_place ? in[h_in].data : out.data,
                              storage,
                              request.rows,
                              request.n,
                              request.weight_stride,
                              family,
                              reinterpret_cast<const double*>(in[shift_in].data),
                              request.shift_stride,
                              static_cast<Output>(request.output)};
  const bool flag = request.flag != 0, wide = request.wide != 0, fixed = request.fixed != 0;
  const auto scratch = [&](int64_t bytes) {
    if (bytes) workspace = Buffer(static_cast<size_t>(bytes), 0, 0xff);
    return workspace.data;
  };
  auto* stats_rows = reinterpret_cast<RatioStats*>(stats.data);
  const auto* given_stats = reinterpret_cast<const RatioStats*>(in[stats_in].data);
  const void* other = in[other_in].data;
  switch (request.op) {
    case ratio:
      cuda::density_ratio(problem, fixed, stats_rows, scratch(cuda::density_ratio_workspace(problem, fixed)),
                          nullptr);
      break;
    case bound: {
      const cuda::RealOutputs real{other, request.real_n};
      cuda::variational_bound(problem, real, flag, stats_rows, values.data, wide,
                              scratch(cuda::variational_bound_workspace(problem, real, flag)), nullptr);
      break;
    }
    case bound_backward:
      cuda::variational_bound_backward(problem, flag, given_stats, other, wide, nullptr);
      break;
    case backward:
      cuda::density_ratio_backward(problem, in[h_in].data, other, given_stats,
                                   reinterpret_cast<const double*>(in[grad_stats_in].data), flag,
                                   scratch(cuda::density_ratio_backward_workspace(problem, flag)), nullptr);
      break;
    case output:
      cuda::dual_output(storage, in[h_in].data, problem.out, request.rows * request.n, family, nullptr);
      break;
    case slope: {
      // A gradient a row comes as grad_stats.
      const void* per_row = in[grad_stats_in].data;
      cuda::dual_slope(storage, in[h_in].data, per_row ? nullptr : other, per_row, wide, problem.out,
                       request.rows, request.n, family, flag, nullptr);
      break;
    }
    case dual_bound:
      cuda::dual_bound(
          storage, other, in[h_in].data, request.rows, request.real_n, request.n, family, values.data, wide,
          scratch(cuda::dual_bound_workspace(storage, request.rows, request.real_n, request.n)), nullptr);
      break;
    default:
      std::abort();
  }
  answer(request.in_place ? in[h_in] : out);
  answer(stats);
  answer(values);
  std::fflush(stdout);
}

}  // namespace

int main() {
  Request request;
  while (read_exactly(&request, sizeof(request))) {
    const size_t element = static_cast<size_t>(size_of(static_cast<Storage>(request.storage)));
    Buffer in[kInputs];
    for (Buffer& buffer : in) {
      int64_t size = 0;
      if (!read_exactly(&size, sizeof(size))) return 2;
      if (size == 0) continue;
      const bool samples = &buffer == in || &buffer == in + weights_in || &buffer == in + other_in;
      const bool rows_of_doubles = &buffer == in + other_in && request.op == bound_backward;
      const size_t offset =
          samples && !rows_of_doubles ? static_cast<size_t>(request.misaligned) * element : 0;
      buffer = Buffer(static_cast<size_t>(size), offset, 0);
      if (!read_exactly(buffer.data, buffer.bytes)) return 2;
    }
    serve(request, in);
  }
  return 0;
}
