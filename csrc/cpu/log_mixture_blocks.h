// Which thread takes which blocks of a log-mixture's gradients.
#pragma once

#include <atomic>
#include <thread>
#include <vector>

#include "log_mixture_backward.h"
#include "parallel.h"

namespace refine_ext {

// Blocks of rows side by side, each in the hands of what make() returns: begin(rows), block(rows, centers)
// for the blocks of centres in order, finish(rows). Where sums over rows are wanted, each stays behind the
// one before it.
template <class Make>
void run_blocks(const MixtureBackwardPlan& plan, const Make& make) {
  constexpr int64_t kLeastWork = 1 << 17;  // in elements: waking a thread costs more than it saves
  const MixtureInputs& in = plan.problem.in;
  const int64_t row_blocks = divide_up(in.m, plan.rows);
  const int64_t center_blocks = divide_up(in.n, plan.centers);
  const int64_t threads = in.m * in.n * (in.d + 8) < kLeastWork ? 1 : num_threads();
  std::vector<std::atomic<int64_t>> finished(row_blocks);  // blocks of centres
  // Each takes the next block of rows, so that the one before is at work or done, however few threads come.
  share(row_blocks, threads, [&](const auto& next) {
    auto own = make();
    for (int64_t rows; (rows = next()) >= 0;) {
      own.begin(rows);
      for (int64_t centers = 0; centers < center_blocks; ++centers) {
        while (plan.over_rows() && rows > 0 &&
               finished[rows - 1].load(std::memory_order_acquire) <= centers) {
          std::this_thread::yield();
        }
        own.block(rows, centers);
        finished[rows].store(centers + 1, std::memory_order_release);
      }
      own.finish(rows);
    }
  });
}

}  // namespace refine_ext
