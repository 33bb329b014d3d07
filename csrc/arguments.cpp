#include "arguments.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>

namespace deqdiff {

void require(bool good, const std::string& name, const std::string& wanted) {
  if (!good) throw std::invalid_argument(name + ": expected " + wanted);
}

void require_addressable(const char* names, std::initializer_list<std::int64_t> sizes) {
  std::int64_t left = std::int64_t{1} << 59;
  for (const std::int64_t size : sizes) left /= std::max<std::int64_t>(size, 1);
  require(left > 0, names, "a size within the address space");
}

void require_windows(const std::int32_t* lo, const std::int32_t* hi, std::int64_t batch, std::int64_t steps,
                     std::int64_t width) {
  for (std::int64_t b = 0; b < batch; ++b) {
    const std::int64_t first = lo[b], last = hi[b];
    if (0 <= first && first <= last && last <= steps && last - first <= width) continue;
    throw std::invalid_argument("lo, hi: window [" + std::to_string(first) + ", " + std::to_string(last) +
                                ") of sample " + std::to_string(b) + " must lie within [0, " + std::to_string(steps) +
                                "), not end before it begins, and hold at most " + std::to_string(width) + " rows");
  }
}

const Arguments::Entry& Arguments::find(const char* name) {
  for (std::size_t k = 0; k < entries_.size(); ++k) {
    if (next_ == entries_.size()) next_ = 0;
    Entry& entry = entries_[next_++];
    if (std::strcmp(entry.name, name) == 0) {
      entry.read = true;
      return entry;
    }
  }
  throw std::invalid_argument(std::string(name) + ": expected a value, got none");
}

std::int64_t Arguments::whole(const char* name) {
  const Entry& entry = find(name);
  if (!entry.whole) require(false, name, "an integer, got " + std::to_string(entry.number));
  return entry.integer;
}

std::int64_t Arguments::integer(const char* name, std::int64_t low, std::int64_t high) {
  const std::int64_t value = whole(name);
  if (value < low || value > high) {
    require(false, name, std::to_string(low) + " to " + std::to_string(high) + ", got " + std::to_string(value));
  }
  return value;
}

double Arguments::number(const char* name, bool positive, bool finite) {
  const double value = find(name).number;
  if (!(positive ? value > 0 : value >= 0) || (finite && !std::isfinite(value))) {
    require(false, name,
            std::string(finite ? "a finite number " : "a number ") + (positive ? "> 0" : ">= 0") + ", got " +
                std::to_string(value));
  }
  return value;
}

double Arguments::finite(const char* name) {
  const double value = find(name).number;
  if (!std::isfinite(value)) require(false, name, "a finite number, got " + std::to_string(value));
  return value;
}

void* Arguments::address(const char* name, std::size_t alignment, bool needed) {
  const std::int64_t given = whole(name);
  const auto value = static_cast<std::uintptr_t>(given);
  if (given < 0 || (given == 0 && needed)) require(false, name, "an address, got " + std::to_string(given));
  if (value % alignment != 0) require(false, name, "an address aligned to " + std::to_string(alignment) + " bytes");
  return reinterpret_cast<void*>(value);
}

void Arguments::finish() const {
  for (const Entry& entry : entries_) {
    if (!entry.read) require(false, entry.name, "no such argument");
  }
}

}  // namespace deqdiff
