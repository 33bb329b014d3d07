// A test harness of a few lines: CHECK counts and reports, TEST registers, run_all() is main.
#pragma once

#include <cmath>
#include <cstdio>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

namespace check {

struct Test {
  const char* name;
  std::function<void()> body;
};

inline std::vector<Test>& tests() {
  static std::vector<Test> list;
  return list;
}

inline int& failures() {
  static int count = 0;
  return count;
}

struct Registration {
  Registration(const char* name, std::function<void()> body) { tests().push_back({name, std::move(body)}); }
};

inline void report(bool good, const char* file, int line, const std::string& what) {
  if (good) return;
  if (++failures() <= 50) std::printf("%s:%d: failed: %s\n", file, line, what.c_str());
}

inline int run_all() {
  int failed = 0;
  for (const Test& test : tests()) {
    const int before = failures();
    try {
      test.body();
    } catch (const std::exception& error) {
      report(false, test.name, 0, std::string("exception: ") + error.what());
    }
    const bool good = failures() == before;
    failed += !good;
    std::printf("%s %s\n", good ? "ok    " : "FAILED", test.name);
  }
  std::printf("%zu passed, %d failed\n", tests().size() - failed, failed);
  return failed != 0;
}

}  // namespace check

#define CHECK(condition) check::report((condition), __FILE__, __LINE__, #condition)
#define CHECK_NEAR(got, wanted, tolerance)                                                                      \
  check::report(std::fabs((got) - (wanted)) <= (tolerance), __FILE__, __LINE__,                                 \
                std::string(#got " = ") + std::to_string(got) + ", wanted " + std::to_string(wanted) + " +- " + \
                    std::to_string(tolerance))
#define CHECK_THROWS(expression, kind)                                             \
  do {                                                                             \
    bool thrown = false;                                                           \
    try {                                                                          \
      expression;                                                                  \
    } catch (const kind&) {                                                        \
      thrown = true;                                                               \
    }                                                                              \
    check::report(thrown, __FILE__, __LINE__, #expression " should throw " #kind); \
  } while (false)
#define TEST(name)                                               \
  static void name();                                            \
  static const check::Registration register_##name(#name, name); \
  static void name()
