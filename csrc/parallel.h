// A small thread pool with a static partition. Kernels built on it give the same bits for every number of threads:
// they split work only at block boundaries and add partial sums in block order afterwards.
#pragma once

#include <cstdint>
#include <type_traits>

namespace deqdiff {

using RangeBody = void (*)(void* context, std::int64_t begin, std::int64_t end);

// Runs body on `parts` contiguous pieces of [0, count), one of them on the calling thread, and waits for all.
// Runs inline when parts <= 1, or when another thread is inside a parallel region. Safe after fork(): the child starts
// with an empty pool. `body` must not throw.
void run_parts(std::int64_t count, int parts, RangeBody body, void* context) noexcept;

// Threads worth using for `elements` touched elements: below a few microseconds of work, waking a thread costs more.
int useful_threads(std::int64_t elements, int threads) noexcept;

// Worker threads alive in this process (not counting callers). For tests.
int worker_count() noexcept;

template <class F>
void parallel_for(std::int64_t count, int parts, F&& body) {
  using Function = std::remove_reference_t<F>;
  run_parts(
      count, parts,
      [](void* context, std::int64_t begin, std::int64_t end) { (*static_cast<Function*>(context))(begin, end); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

}  // namespace deqdiff
