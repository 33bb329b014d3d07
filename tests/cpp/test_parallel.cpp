#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <numeric>
#include <thread>

#include "check.h"
#include "parallel.h"

using namespace deqdiff;

#if defined(__SANITIZE_THREAD__)
constexpr bool kThreadSanitizer = true;
#else
constexpr bool kThreadSanitizer = false;
#endif

// Every index exactly once, whatever the number of parts.
static bool covers(std::int64_t count, int parts) {
  std::vector<int> hits(count, 0);
  parallel_for(count, parts, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t k = begin; k < end; ++k) ++hits[k];
  });
  return std::accumulate(hits.begin(), hits.end(), std::int64_t{0}) == count &&
         std::all_of(hits.begin(), hits.end(), [](int hit) { return hit == 1; });
}

TEST(every_index_once) {
  for (const int parts : {0, 1, 2, 3, 7, 16}) {
    for (const std::int64_t count : {0, 1, 2, 5, 1000}) CHECK(covers(count, parts));
  }
  CHECK(worker_count() >= 1);
}

TEST(parts_of_a_team_can_wait_for_each_other) {
  for (int turn = 0; turn < 200; ++turn) {
    std::atomic<int> arrived{0};
    std::atomic<int> size{0};
    team(4, [&](int part, int parts) {
      CHECK(part >= 0 && part < parts && parts <= 4);
      size = parts;
      ++arrived;
      wait_until([&] { return arrived == parts; });
    });
    CHECK(arrived == size);
  }
}

TEST(many_callers_at_once) {
  std::atomic<int> wrong{0};
  std::vector<std::thread> callers;
  for (int k = 0; k < 6; ++k) {
    callers.emplace_back([&] {
      for (int turn = 0; turn < 100; ++turn) wrong += !covers(97, 3);
    });
  }
  for (std::thread& caller : callers) caller.join();
  CHECK(wrong == 0);
}

TEST(small_work_stays_on_the_caller) {
  CHECK(useful_threads(100, 8) == 1);
  CHECK(useful_threads(1 << 20, 8) == 8);
  CHECK(useful_threads(1 << 20, 0) == 1);
  const std::thread::id self = std::this_thread::get_id();
  std::thread::id seen;
  team(1, [&](int, int) { seen = std::this_thread::get_id(); });
  CHECK(seen == self);
}

TEST(a_forked_child_computes) {
  if (kThreadSanitizer) return;  // it does not support threads after a fork of a threaded process
  CHECK(covers(1000, 4));
  std::fflush(stdout);
  const pid_t child = fork();
  if (child == 0) {
    const bool alone = worker_count() == 0;
    _exit(alone && covers(1000, 4) && worker_count() >= 1 ? 0 : 1);
  }
  int status = 0;
  waitpid(child, &status, 0);
  CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  CHECK(covers(1000, 4));
}

int main() { return check::run_all(); }
