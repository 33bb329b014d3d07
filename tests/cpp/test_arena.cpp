#include <atomic>
#include <chrono>
#include <cstring>
#include <limits>
#include <new>
#include <thread>

#include "arena.h"
#include "check.h"

using namespace deqdiff;

TEST(sizes_that_no_memory_has_are_refused) {
  Arena arena(1 << 20);
  const std::size_t most = std::numeric_limits<std::size_t>::max();
  for (const std::size_t bytes : {most, most - 254, most - 255, most / 2 + 1, most / 4 + 2}) {
    CHECK_THROWS(arena.lease(bytes), std::bad_alloc);
  }
  const ArenaStats stats = arena.stats();
  CHECK(stats.leases == 0 && stats.active == 0 && stats.bytes == 0);
}

TEST(released_slabs_are_reused) {
  Arena arena(1 << 20);
  void* address;
  {
    auto lease = arena.lease(1000);
    address = lease->view();
    CHECK(reinterpret_cast<std::uintptr_t>(address) % kAlignment == 0);
    CHECK(lease->bytes() == 1000);
  }
  auto again = arena.lease(900);
  CHECK(again->view() == address);
  auto other = arena.lease(900);
  CHECK(other->view() != address);
  CHECK(other->generation() != again->generation());
  const ArenaStats stats = arena.stats();
  CHECK(stats.leases == 3);
  CHECK(stats.reuses == 1);
  CHECK(stats.active == 2);
  CHECK(stats.bytes == 2048);
}

TEST(a_viewed_slab_waits_for_the_last_reference) {
  Arena arena(1 << 20);
  auto lease = arena.lease(512);
  std::memset(lease->view(), 1, 512);
  lease->release();
  CHECK(lease->released());
  CHECK_THROWS(lease->view(), std::logic_error);
  CHECK(arena.stats().active == 1);
  lease.reset();
  CHECK(arena.stats().active == 0);
  auto unseen = arena.lease(512);
  unseen->release();
  CHECK(arena.stats().active == 0);
  unseen->release();
  CHECK(arena.stats().idle_bytes == 512);
}

TEST(the_budget_frees_the_oldest) {
  Arena arena(4096);
  auto a = arena.lease(1024), b = arena.lease(2048), c = arena.lease(3072);
  a->release();
  b->release();
  CHECK(arena.stats().idle_bytes == 3072);
  c->release();
  CHECK(arena.stats().idle_bytes == 3072);
  CHECK(arena.stats().high_water == 6144);
  arena.trim();
  CHECK(arena.stats().bytes == 0);
}

TEST(poison_fills_on_lease_and_on_release) {
  Arena arena(1 << 20);
  arena.set_poison(true);
  auto lease = arena.lease(300);
  const unsigned char* bytes = static_cast<const unsigned char*>(lease->view());
  CHECK(bytes[0] == 0xFF && bytes[299] == 0xFF);
  std::memset(lease->view(), 0, 300);
  lease->release();
  CHECK(bytes[0] == 0xFF && bytes[299] == 0xFF);  // still ours to read: the lease lives
}

TEST(a_lease_outlives_its_arena) {
  std::shared_ptr<Lease> lease;
  {
    Arena arena(0);
    lease = arena.lease(8 << 20);
  }
  std::memset(lease->view(), 3, 8 << 20);
  lease->release();
  CHECK(lease->released());
}

TEST(threads_never_share_a_slab) {
  constexpr int kThreads = 8, kTurns = 400;
  Arena arena(16 << 10);
  std::atomic<int> clashes{0};
  std::vector<std::thread> threads;
  for (int k = 0; k < kThreads; ++k) {
    threads.emplace_back([&, k] {
      for (int turn = 0; turn < kTurns; ++turn) {
        const std::size_t size = 1024 + 256 * ((k + turn) % 7);
        auto lease = arena.lease(size);
        auto* bytes = static_cast<unsigned char*>(lease->view());
        const unsigned char mark = static_cast<unsigned char>(k * 31 + turn);
        std::memset(bytes, mark, size);
        if (turn % 16 == 0) std::this_thread::yield();
        for (std::size_t at = 0; at < size; ++at) clashes += bytes[at] != mark;
        if (turn % 3 == 0) lease->release();
        if (turn % 50 == 0) arena.trim();
        if (turn % 20 == 0) arena.set_poison(turn % 40 == 0);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(clashes == 0);
  const ArenaStats stats = arena.stats();
  CHECK(stats.leases == kThreads * kTurns);
  CHECK(stats.active == 0);
  CHECK(stats.bytes == stats.idle_bytes);
  CHECK(stats.bytes <= 16 << 10);
}

int main() { return check::run_all(); }
