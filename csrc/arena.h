// Solver memory: one aligned slab per solve, planned before the first round and reused by later solves.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace deqdiff {

constexpr std::size_t kAlignment = 256;

struct ArenaStats {
  std::size_t bytes = 0;       // held now, leased and idle
  std::size_t idle_bytes = 0;  // held now, waiting for the next lease
  std::size_t high_water = 0;  // largest `bytes` so far
  std::uint64_t leases = 0;    // granted so far
  std::uint64_t reuses = 0;    // of these, served by an idle slab
  std::uint64_t active = 0;    // granted and not yet returned
};

class ArenaState;
struct Slab;

// Exclusive use of one slab. Thread safe. The memory outlives release() for as long as this object lives, so a stale
// view never touches freed memory; once a view was taken, the slab serves another lease only after this object died.
class Lease {
 public:
  Lease(std::shared_ptr<ArenaState> arena, std::unique_ptr<Slab> slab, std::size_t bytes, std::uint64_t generation);
  ~Lease();
  Lease(const Lease&) = delete;
  Lease& operator=(const Lease&) = delete;

  // The memory. Throws std::logic_error after release().
  void* view();
  std::size_t bytes() const { return bytes_; }
  std::uint64_t generation() const { return generation_; }  // distinct for every lease of an arena
  bool released() const;
  void release();

 private:
  std::shared_ptr<ArenaState> arena_;
  std::unique_ptr<Slab> slab_;
  std::size_t bytes_;
  std::uint64_t generation_;
  bool released_ = false;
  bool viewed_ = false;
};

class Arena {
 public:
  // Idle slabs above `byte_budget` in sum are freed, the oldest first. Leased memory is not limited.
  explicit Arena(std::size_t byte_budget);

  std::shared_ptr<Lease> lease(std::size_t bytes);  // throws std::bad_alloc where there is no such memory
  ArenaStats stats() const;
  void set_poison(bool on);  // fill slabs with NaN (0xFF bytes) when they are leased and when they are released
  void trim();               // free every idle slab

 private:
  std::shared_ptr<ArenaState> state_;
};

}  // namespace deqdiff
