// The few lines of test framework that the programs in this folder need: they are built by tests/test_cuda_host.py in
// three variants and have to work without any library.
//
//   program [--seeds N] [--fault FAULT] [--list] [NAME...]     runs the tests whose name contains a NAME, or all
//
// RNN_EXT_FAULT in the environment plants a fault too.
#pragma once
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <functional>
#include <string>
#include <vector>

#include "faults.h"
#include "runtime.h"

namespace check {

struct Test {
  const char* name;
  std::function<void()> run;
};
inline std::vector<Test>& tests() {
  static std::vector<Test> all;
  return all;
}
struct Register {
  Register(const char* name, void (*run)()) { tests().push_back({name, run}); }
};

inline int seeds = 4;
inline int failures = 0;
inline const char* current_test = "";

[[gnu::format(printf, 1, 2)]] inline void report(const char* format, ...) {
  ++failures;
  std::printf("FAIL %s: ", current_test);
  va_list arguments;
  va_start(arguments, format);
  std::vprintf(format, arguments);
  va_end(arguments);
  std::printf("\n");
}

// Calls f(seed) under as many schedules as asked for.
template <typename F>
void for_each_seed(F f) {
  for (int seed = 0; seed < seeds; ++seed) {
    emu::set_options_from_seed(seed);
    f(seed);
  }
}

// The message of the error that f throws; empty, and a failed test, if it does not.
template <typename F>
std::string error_of(F f) {
  try {
    f();
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  report("expected an error");
  return "";
}

inline bool contains(const std::string& text, const char* part) { return text.find(part) != std::string::npos; }

// Numbers in [-1, 1), the same on every machine.
class Random {
 public:
  explicit Random(uint32_t seed) : state_(seed * 2654435761u + 1) {}
  uint32_t bits() {
    state_ = state_ * 1664525u + 1013904223u;
    return state_ >> 8;
  }
  double uniform() { return bits() / 8388608.0 - 1.0; }

 private:
  uint32_t state_;
};

inline int run_all(int argc, char** argv) {
  std::vector<std::string> names;
  const char* fault = std::getenv("RNN_EXT_FAULT");
  for (int i = 1; i < argc; ++i) {
    if (std::strcmp(argv[i], "--list") == 0) {
      for (const Test& test : tests()) std::printf("%s\n", test.name);
      return 0;
    }
    if (std::strcmp(argv[i], "--seeds") == 0 && i + 1 < argc) {
      seeds = std::atoi(argv[++i]);
    } else if (std::strcmp(argv[i], "--fault") == 0 && i + 1 < argc) {
      fault = argv[++i];
    } else {
      names.push_back(argv[i]);
    }
  }
  if (fault != nullptr && *fault != '\0' && !emu::plant_fault(fault)) {
    std::fprintf(stderr, "there is no fault %s\n", fault);
    return 2;
  }
  int ran = 0;
  for (const Test& test : tests()) {
    bool wanted = names.empty();
    for (const std::string& name : names) wanted |= contains(test.name, name.c_str());
    if (!wanted) continue;
    ++ran;
    current_test = test.name;
    emu::options = emu::Options{};
    try {
      test.run();
    } catch (const std::exception& error) {
      report("%s", error.what());
    }
    std::fflush(stdout);
  }
  std::printf("%d tests, %d failures\n", ran, failures);
  return failures == 0 && ran > 0 ? 0 : 1;
}

}  // namespace check

#define TEST(name)                                                  \
  static void test_##name();                                        \
  static const check::Register register_##name(#name, test_##name); \
  static void test_##name()

#define CHECK(condition)                                                          \
  do {                                                                            \
    if (!(condition)) check::report("%s:%d: %s", __FILE__, __LINE__, #condition); \
  } while (false)
