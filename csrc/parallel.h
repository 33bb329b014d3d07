// A small thread pool. Kernels built on it give the same bits for every number of threads: they split work statically,
// only at block boundaries, and add partial sums in block order afterwards.
#pragma once

#include <cstdint>
#include <type_traits>

namespace deqdiff {

using TeamBody = void (*)(void* context, int part, int parts);

// Runs body(context, part, parts) for every part < parts, each on a thread of its own (part 0 on the caller's), and
// waits for all. parts is at most `wanted`, and 1 when another thread is inside a team or no thread can be had, so
// parts may wait for each other (wait_until). Safe after fork(): the child starts with an empty pool. `body` must not
// throw and must not start a team.
void run_team(int wanted, TeamBody body, void* context) noexcept;

// Threads worth using for `elements` touched elements: below a few microseconds of work, waking a thread costs more.
int useful_threads(std::int64_t elements, int threads) noexcept;

// Worker threads alive in this process (not counting callers). For tests.
int worker_count() noexcept;

// Waits for another part of the same team: spins, then lets other threads run, then naps.
void back_off(int attempt) noexcept;
template <class Ready>
void wait_until(const Ready& ready) {
  for (int attempt = 0; !ready(); ++attempt) back_off(attempt);
}

template <class F>
void team(int wanted, F&& body) {
  using Function = std::remove_reference_t<F>;
  run_team(
      wanted, [](void* context, int part, int parts) { (*static_cast<Function*>(context))(part, parts); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

// Part `part` of [0, count), cut into `parts` contiguous pieces of nearly equal size.
struct Range {
  std::int64_t begin, end;
  Range(std::int64_t count, int part, int parts) : begin(count * part / parts), end(count * (part + 1) / parts) {}
};

// body(begin, end) on each part of [0, count).
template <class F>
void parallel_for(std::int64_t count, int parts, F&& body) {
  team(static_cast<int>(parts < count ? parts : count), [&](int part, int of) {
    const Range range(count, part, of);
    if (range.begin < range.end) body(range.begin, range.end);
  });
}

}  // namespace deqdiff
