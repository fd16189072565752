// Refusing what a caller got wrong: std::invalid_argument, by what, the value and the limits.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace fastserve {

[[noreturn]] inline void refuse(const std::string& what) { throw std::invalid_argument(what); }

inline void check_range(const char* what, int64_t value, int64_t low, int64_t high) {
  if (value < low || value > high)
    refuse(std::string(what) + " is " + std::to_string(value) + "; the limits are " + std::to_string(low) + " and " +
           std::to_string(high));
}

inline void check_equal(const char* what, int64_t value, int64_t expected) { check_range(what, value, expected, expected); }

}  // namespace fastserve
