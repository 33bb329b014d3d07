#include "arguments.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>

namespace deqdiff {

void require(bool good, const std::string& name, const std::string& wanted) {
  if (!good) throw std::invalid_argument(name + ": expected " + wanted);
}

void require_addressable(const char* names, std::int64_t lines, std::int64_t size) {
  require(lines <= (std::int64_t{1} << 59) && size <= std::numeric_limits<std::int64_t>::max() / 16 / lines, names,
          "a size within the address space");
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

std::int64_t Arguments::integer(const char* name, std::int64_t low, std::int64_t high) {
  const std::int64_t value = find(name).integer;
  require(value >= low && value <= high, name,
          std::to_string(low) + " to " + std::to_string(high) + ", got " + std::to_string(value));
  return value;
}

double Arguments::number(const char* name, bool positive, bool finite) {
  const double value = find(name).number;
  require((positive ? value > 0 : value >= 0) && (!finite || std::isfinite(value)), name,
          std::string(finite ? "a finite number " : "a number ") + (positive ? "> 0" : ">= 0") + ", got " +
              std::to_string(value));
  return value;
}

double Arguments::finite(const char* name) {
  const double value = find(name).number;
  require(std::isfinite(value), name, "a finite number, got " + std::to_string(value));
  return value;
}

void* Arguments::address(const char* name, std::size_t alignment, bool needed) {
  const auto value = static_cast<std::uintptr_t>(find(name).integer);
  require(value != 0 || !needed, name, "an address, got 0");
  require(value % alignment == 0, name, "an address aligned to " + std::to_string(alignment) + " bytes");
  return reinterpret_cast<void*>(value);
}

void Arguments::finish() const {
  for (const Entry& entry : entries_) require(entry.read, entry.name, "no such argument");
}

}  // namespace deqdiff
