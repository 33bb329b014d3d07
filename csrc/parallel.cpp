#include "parallel.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace deqdiff {
namespace {

constexpr int kMaxWorkers = 255;
constexpr int kSpins = 400;  // some 20 microseconds: longer than the gap between two passes of one round

inline void relax() noexcept {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ __volatile__("yield");
#endif
}

// A condition that one thread waits for: spin first, then sleep.
class Event {
 public:
  template <class Ready>
  void wait(Ready ready) {
    for (int spin = 0; spin < kSpins; ++spin) {
      if (ready()) return;
      relax();
    }
    std::unique_lock<std::mutex> lock(mutex_);
    condition_.wait(lock, ready);
  }
  void notify() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
    }  // orders the caller's atomic write before the sleeper's check
    condition_.notify_one();
  }

 private:
  std::mutex mutex_;
  std::condition_variable condition_;
};

struct Region {
  TeamBody body;
  void* context;
  int parts;
};

class Pool {
 public:
  void run(int wanted, TeamBody body, void* context) noexcept {
    std::unique_lock<std::mutex> use(use_, std::try_to_lock);
    const int helpers = use.owns_lock() ? start(wanted - 1) : 0;
    if (helpers == 0) return body(context, 0, 1);
    region_ = Region{body, context, helpers + 1};
    pending_.store(helpers, std::memory_order_relaxed);
    for (int k = 0; k < helpers; ++k) {
      workers_[k]->ready.store(true, std::memory_order_release);
      workers_[k]->event.notify();
    }
    body(context, 0, helpers + 1);
    done_.wait([this] { return pending_.load(std::memory_order_acquire) == 0; });
  }

  int size() const noexcept { return alive_.load(std::memory_order_relaxed); }

 private:
  struct Worker {
    std::atomic<bool> ready{false};
    Event event;
  };

  // Makes up to `wanted` workers available. Returns how many there are: a machine out of threads still computes.
  int start(int wanted) noexcept {
    wanted = std::min(wanted, kMaxWorkers);
    try {
      while (static_cast<int>(workers_.size()) < wanted) {
        const int index = static_cast<int>(workers_.size());
        workers_.push_back(std::make_unique<Worker>());
        try {
          std::thread(&Pool::loop, this, workers_.back().get(), index + 1).detach();
        } catch (...) {
          workers_.pop_back();
          throw;
        }
        alive_.store(index + 1, std::memory_order_relaxed);
      }
    } catch (...) {
    }
    return std::min(wanted, static_cast<int>(workers_.size()));
  }

  void loop(Worker* self, int part) {
    for (;;) {
      self->event.wait([self] { return self->ready.load(std::memory_order_acquire); });
      self->ready.store(false, std::memory_order_relaxed);
      region_.body(region_.context, part, region_.parts);
      if (pending_.fetch_sub(1, std::memory_order_acq_rel) == 1) done_.notify();
    }
  }

  std::mutex use_;  // one team at a time; whoever finds it taken computes alone
  std::vector<std::unique_ptr<Worker>> workers_;
  Region region_{};
  std::atomic<int> pending_{0};
  std::atomic<int> alive_{0};
  Event done_;
};

// Never destroyed: workers may still sleep in it when the process exits, or belong to the parent after a fork.
std::atomic<Pool*> current{nullptr};

// When the extension is loaded, not at the first use: a thread may be there while another one forks.
const int registered = pthread_atfork(nullptr, nullptr, [] { current.store(nullptr); });

Pool& pool() {
  static_cast<void>(registered);
  Pool* existing = current.load(std::memory_order_acquire);
  if (existing != nullptr) return *existing;
  auto fresh = std::make_unique<Pool>();
  if (current.compare_exchange_strong(existing, fresh.get(), std::memory_order_acq_rel)) return *fresh.release();
  return *existing;
}

}  // namespace

void run_team(int wanted, TeamBody body, void* context) noexcept {
  if (wanted <= 1) return body(context, 0, 1);
  pool().run(std::min(wanted, kMaxWorkers + 1), body, context);
}

void back_off(int attempt) noexcept {
  if (attempt < kSpins) {
    relax();
  } else if (attempt < 4 * kSpins) {
    std::this_thread::yield();
  } else {
    std::this_thread::sleep_for(std::chrono::microseconds(50));
  }
}

int useful_threads(std::int64_t elements, int threads) noexcept {
  constexpr std::int64_t kElementsPerThread = 32768;
  return static_cast<int>(std::clamp<std::int64_t>(elements / kElementsPerThread, 1, std::max(threads, 1)));
}

int worker_count() noexcept {
  const Pool* existing = current.load(std::memory_order_acquire);
  return existing == nullptr ? 0 : existing->size();
}

}  // namespace deqdiff
