// The arguments of one call of an op, by name, each checked where it is read. No Python in here.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <string>
#include <vector>

namespace deqdiff {

// Names must outlive the arguments. Every reader throws std::invalid_argument, naming the argument and what was
// expected, and where there is none.
class Arguments {
 public:
  explicit Arguments(std::size_t count) { entries_.reserve(count); }
  void add(const char* name, std::int64_t value) {
    entries_.push_back({name, value, static_cast<double>(value), true});
  }
  void add(const char* name, double value) { entries_.push_back({name, 0, value, false}); }

  std::int64_t integer(const char* name, std::int64_t low, std::int64_t high);
  bool flag(const char* name) { return integer(name, 0, 1) != 0; }
  double number(const char* name, bool positive, bool finite);  // >= 0 or > 0, and not NaN
  double finite(const char* name);
  // An address aligned to `alignment` bytes; null only where it is not needed.
  void* address(const char* name, std::size_t alignment, bool needed);
  template <class T>
  T* table(const char* name, bool needed) {
    return static_cast<T*>(address(name, alignof(T), needed));
  }

  void ignore(const char* name) { find(name); }  // of use to other backends only
  void finish() const;                           // throws where an argument was given that nobody has read

 private:
  struct Entry {
    const char* name;
    std::int64_t integer;
    double number;
    bool whole;  // given as an integer
    bool read = false;
  };
  const Entry& find(const char* name);
  std::int64_t whole(const char* name);

  std::vector<Entry> entries_;
  std::size_t next_ = 0;  // arguments are read in about the order in which they come
};

void require(bool good, const std::string& name, const std::string& wanted);
// That a tensor of these sizes can be addressed, and its elements counted without overflow; 0 counts as 1.
void require_addressable(const char* names, std::initializer_list<std::int64_t> sizes);
// That 0 <= lo[b] <= hi[b] <= steps and hi[b] - lo[b] <= width for every sample b.
void require_windows(const std::int32_t* lo, const std::int32_t* hi, std::int64_t batch, std::int64_t steps,
                     std::int64_t width);

}  // namespace deqdiff
