// Draws from standard input on the emulated kernels; answers on standard output. See density_ratio_main.cpp.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "../../csrc/cuda/resampling.h"

namespace {

using namespace refine_ext;

// As test_cuda_draws_on_cpu.py packs it.
struct Request {
  int64_t op, storage, rows, n, num, method, log, offset, seed_rows, bound_each, gamma_each, chains, burn_in,
      thin, in_order;
  double epsilon;
};
enum Op : int64_t { resample, rejection, metropolis };

bool read_exactly(void* to, size_t bytes) { return bytes == 0 || std::fread(to, bytes, 1, stdin) == 1; }

// A buffer on the heap of exactly the size received.
struct Input {
  std::unique_ptr<char[]> data;
  bool receive() {
    int64_t size = 0;
    if (!read_exactly(&size, sizeof(size))) return false;
    if (size) data = std::make_unique<char[]>(static_cast<size_t>(size));
    return read_exactly(data.get(), static_cast<size_t>(size));
  }
  template <class T>
  const T* as() const {
    return reinterpret_cast<const T*>(data.get());
  }
};

template <class T>
void answer(const std::unique_ptr<T[]>& values, int64_t count) {
  const int64_t bytes = count * static_cast<int64_t>(sizeof(T));
  std::fwrite(&bytes, sizeof(bytes), 1, stdout);
  if (bytes) std::fwrite(values.get(), static_cast<size_t>(bytes), 1, stdout);
}

template <class T>
std::unique_ptr<T[]> poisoned(int64_t count) {
  auto values = std::make_unique<T[]>(static_cast<size_t>(count));
  std::memset(values.get(), 0xab, static_cast<size_t>(count) * sizeof(T));
  return values;
}

}  // namespace

int main() {
  Request r;
  while (read_exactly(&r, sizeof(r))) {
    Input data, seeds, bound, gamma;
    if (!data.receive() || !seeds.receive() || !bound.receive() || !gamma.receive()) return 2;
    const auto storage = static_cast<Storage>(r.storage);
    const DrawSeeds draw_seeds{seeds.as<int64_t>(), r.seed_rows, static_cast<uint64_t>(r.offset)};
    const auto workspace = [](int64_t bytes) { return poisoned<char>(bytes); };
    if (r.op == resample) {
      auto out = poisoned<int64_t>(r.rows * r.num);
      const ResampleProblem problem{
          data.as<void>(), storage,  r.log != 0, r.rows, r.n, r.num, static_cast<ResampleMethod>(r.method),
          draw_seeds,      out.get()};
      cuda::resample(problem, workspace(cuda::resample_workspace(problem)).get(), nullptr);
      answer(out, r.rows * r.num);
    } else if (r.op == rejection) {
      auto keep = std::make_unique<bool[]>(static_cast<size_t>(r.rows * r.n));
      auto new_bound = poisoned<double>(r.rows);
      auto accepted = poisoned<int64_t>(r.rows);
      const RejectionProblem problem{
          data.as<void>(),    storage,   r.rows,     r.n,        bound.as<double>(),
          gamma.as<double>(), r.epsilon, draw_seeds, keep.get(), new_bound.get(),
          accepted.get()};
      cuda::rejection(problem, r.bound_each, r.gamma_each,
                      workspace(cuda::rejection_workspace(problem)).get(), nullptr);
      answer(keep, r.rows * r.n);
      answer(new_bound, r.rows);
      answer(accepted, r.rows);
    } else {
      auto out = poisoned<int64_t>(r.chains * r.num);
      auto accepted = poisoned<int64_t>(r.chains);
      const MetropolisProblem problem{data.as<void>(), storage,   r.n,       r.num,
                                      r.chains,        r.burn_in, r.thin,    bound.as<double>(),
                                      r.in_order != 0, 0,         out.get(), accepted.get()};
      cuda::metropolis(problem, seeds.as<int64_t>(), r.bound_each,
                       workspace(cuda::metropolis_workspace(problem)).get(), nullptr);
      answer(out, r.chains * r.num);
      answer(accepted, r.chains);
    }
    std::fflush(stdout);
  }
  return 0;
}
