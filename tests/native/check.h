// What the tests without Python share: counting failures, and memory that shows what a kernel does at its edges.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <new>
#include <random>
#include <string>
#include <vector>

#include "dispatch.h"

namespace fastserve::test {

inline int num_failures = 0;

inline void fail(const std::string& what) {
  if (++num_failures <= 20) std::printf("FAILED %s\n", what.c_str());
}

inline void expect(bool is_true, const std::string& what) {
  if (!is_true) fail(what);
}

// `count` elements that begin off every vector's alignment and end where the allocation does, so that
// AddressSanitizer sees the first byte too far.
template <class T>
class OddArray {
 public:
  explicit OddArray(std::size_t count) : raw_(static_cast<T*>(std::malloc((count + 1) * sizeof(T)))), count_(count) {
    if (!raw_) throw std::bad_alloc();
    for (std::size_t i = 0; i < count; ++i) data()[i] = T{};
  }
  ~OddArray() { std::free(raw_); }
  OddArray(const OddArray&) = delete;
  OddArray& operator=(const OddArray&) = delete;

  T* data() { return raw_ + 1; }
  const T* data() const { return raw_ + 1; }
  std::size_t size() const { return count_; }
  T& operator[](std::size_t i) { return data()[i]; }
  const T& operator[](std::size_t i) const { return data()[i]; }

 private:
  T* raw_;
  std::size_t count_;
};

class Random {
 public:
  explicit Random(unsigned seed) : engine_(seed) {}
  float normal() { return normal_(engine_); }
  int below(int n) { return static_cast<int>(engine_() % static_cast<unsigned>(n)); }
  template <class Array>
  void fill(Array& a) {
    for (std::size_t i = 0; i < a.size(); ++i) a[i] = normal();
  }

 private:
  std::mt19937 engine_;
  std::normal_distribution<float> normal_;
};

// |actual - expected| <= tolerance * largest |expected|, over arrays.
template <class Actual, class Expected>
void expect_close(const Actual& actual, const Expected& expected, double tolerance, const std::string& what) {
  double largest = 0;
  for (std::size_t i = 0; i < expected.size(); ++i) largest = std::fmax(largest, std::fabs(expected[i]));
  for (std::size_t i = 0; i < expected.size(); ++i)
    if (!(std::fabs(actual[i] - expected[i]) <= tolerance * largest)) {
      fail(what + ": element " + std::to_string(i) + " is " + std::to_string(actual[i]) + ", expected " +
           std::to_string(expected[i]));
      return;
    }
}

// Calls test(kernels) for the instruction sets that are named, or all that run here.
template <class Test>
void for_each_isa(int argc, char** argv, Test test) {
  const std::vector<std::string> isas = argc > 1 ? std::vector<std::string>(argv + 1, argv + argc) : runnable_isas();
  for (const std::string& isa : isas) {
    test(choose_kernels(isa));
    std::printf("%s: %d failures\n", isa.c_str(), num_failures);
  }
}

inline int finish(const char* name) {
  if (num_failures > 0) std::printf("%s: %d failures\n", name, num_failures);
  else std::printf("%s: passed\n", name);
  return num_failures > 0 ? 1 : 0;
}

}  // namespace fastserve::test
