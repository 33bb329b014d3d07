#include "arena.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#include <stdexcept>
#include <utility>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace deqdiff {
namespace {
constexpr std::size_t kAddressable = std::size_t{1} << 62;
}  // namespace

struct Slab {
  explicit Slab(std::size_t size) : capacity(size) {
    constexpr std::size_t kHugePage = std::size_t{2} << 20;
    const bool large = size >= 2 * kHugePage;
    if (posix_memalign(&data, large ? kHugePage : kAlignment, size) != 0) throw std::bad_alloc();
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    // The kernels walk many rows at once; with 4 KB pages each walk misses the translation cache. Only a hint.
    if (large) madvise(data, size / kHugePage * kHugePage, MADV_HUGEPAGE);
#endif
  }
  ~Slab() { std::free(data); }
  Slab(const Slab&) = delete;
  Slab& operator=(const Slab&) = delete;

  void* data = nullptr;
  std::size_t capacity;
};

class ArenaState {
 public:
  explicit ArenaState(std::size_t budget) : budget_(budget) {}

  std::unique_ptr<Slab> acquire(std::size_t bytes, std::uint64_t* generation) {
    if (bytes > kAddressable) throw std::bad_alloc();  // before the rounding up, which would wrap
    const std::size_t size = std::max(kAlignment, (bytes + kAlignment - 1) / kAlignment * kAlignment);
    std::unique_ptr<Slab> slab = take_idle(size);
    const bool reused = slab != nullptr;
    if (!reused) slab = std::make_unique<Slab>(size);  // outside the lock: it may take the kernel a while
    bool poison;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      if (!reused) {
        stats_.bytes += size;
        stats_.high_water = std::max(stats_.high_water, stats_.bytes);
      }
      stats_.reuses += reused;
      stats_.active += 1;
      *generation = ++stats_.leases;
      poison = poison_;
    }
    if (poison) std::memset(slab->data, 0xFF, slab->capacity);
    return slab;
  }

  void give_back(std::unique_ptr<Slab> slab) {
    std::vector<std::unique_ptr<Slab>> freed;  // destroyed after the lock is gone
    std::lock_guard<std::mutex> lock(mutex_);
    stats_.active -= 1;
    stats_.idle_bytes += slab->capacity;
    idle_.push_back(std::move(slab));
    shrink(budget_, &freed);
  }

  void trim() {
    std::vector<std::unique_ptr<Slab>> freed;
    std::lock_guard<std::mutex> lock(mutex_);
    shrink(0, &freed);
  }

  ArenaStats stats() const {
    std::lock_guard<std::mutex> lock(mutex_);
    return stats_;
  }

  bool poison() const {
    std::lock_guard<std::mutex> lock(mutex_);
    return poison_;
  }

  void set_poison(bool on) {
    std::lock_guard<std::mutex> lock(mutex_);
    poison_ = on;
  }

  // Guards the flags of this arena's leases. Separate from mutex_, which release() needs while it holds this one.
  std::mutex& lease_mutex() { return lease_mutex_; }

 private:
  // The smallest idle slab that fits without wasting more than half of itself.
  std::unique_ptr<Slab> take_idle(std::size_t size) {
    std::lock_guard<std::mutex> lock(mutex_);
    auto best = idle_.end();
    for (auto it = idle_.begin(); it != idle_.end(); ++it) {
      const std::size_t capacity = (*it)->capacity;
      if (capacity >= size && capacity / 2 <= size && (best == idle_.end() || capacity < (*best)->capacity)) best = it;
    }
    if (best == idle_.end()) return nullptr;
    std::unique_ptr<Slab> slab = std::move(*best);
    idle_.erase(best);
    stats_.idle_bytes -= slab->capacity;
    return slab;
  }

  void shrink(std::size_t limit, std::vector<std::unique_ptr<Slab>>* freed) {
    while (!idle_.empty() && stats_.idle_bytes > limit) {
      stats_.idle_bytes -= idle_.front()->capacity;
      stats_.bytes -= idle_.front()->capacity;
      freed->push_back(std::move(idle_.front()));
      idle_.erase(idle_.begin());
    }
  }

  mutable std::mutex mutex_;
  std::mutex lease_mutex_;
  std::vector<std::unique_ptr<Slab>> idle_;  // oldest first
  std::size_t budget_;
  ArenaStats stats_;
  bool poison_ = false;
};

Lease::Lease(std::shared_ptr<ArenaState> arena, std::unique_ptr<Slab> slab, std::size_t bytes, std::uint64_t generation)
    : arena_(std::move(arena)), slab_(std::move(slab)), bytes_(bytes), generation_(generation) {}

Lease::~Lease() {
  release();
  if (slab_) arena_->give_back(std::move(slab_));
}

void* Lease::view() {
  std::lock_guard<std::mutex> lock(arena_->lease_mutex());
  if (released_) throw std::logic_error("the lease was released; take a new one with Arena.lease()");
  viewed_ = true;
  return slab_->data;
}

bool Lease::released() const {
  std::lock_guard<std::mutex> lock(arena_->lease_mutex());
  return released_;
}

void Lease::release() {
  std::lock_guard<std::mutex> lock(arena_->lease_mutex());
  if (released_) return;
  released_ = true;
  if (arena_->poison()) std::memset(slab_->data, 0xFF, slab_->capacity);
  if (!viewed_) arena_->give_back(std::move(slab_));
}

Arena::Arena(std::size_t byte_budget) : state_(std::make_shared<ArenaState>(byte_budget)) {}

std::shared_ptr<Lease> Arena::lease(std::size_t bytes) {
  std::uint64_t generation = 0;
  std::unique_ptr<Slab> slab = state_->acquire(bytes, &generation);
  return std::make_shared<Lease>(state_, std::move(slab), bytes, generation);
}

ArenaStats Arena::stats() const { return state_->stats(); }
void Arena::set_poison(bool on) { state_->set_poison(on); }
void Arena::trim() { state_->trim(); }

}  // namespace deqdiff
