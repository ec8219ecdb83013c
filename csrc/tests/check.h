// How a test reports failures, and its exit codes.
#pragma once

#include <cmath>
#include <cstdio>
#include <string>

namespace check {

inline constexpr int kSkipped = 77;

inline int& failures() {
  static int count = 0;
  return count;
}

// The current case, printed with each failure.
inline std::string& context() {
  static std::string text;
  return text;
}

// |value − expected| within `tolerance` of the larger of 1 and |expected|; NaN equals NaN.
inline bool close(const char* what, double value, double expected, double tolerance) {
  const bool same_nan = std::isnan(value) && std::isnan(expected);
  const double scale = std::fmax(1.0, std::fabs(expected));
  if (same_nan || value == expected || std::fabs(value - expected) <= tolerance * scale)
    return true;
  if (++failures() <= 20)
    std::printf("FAILED %s %s: %.9g, expected %.9g\n", context().c_str(), what, value, expected);
  return false;
}

inline bool that(const char* what, bool holds) {
  if (!holds && ++failures() <= 20) std::printf("FAILED %s %s\n", context().c_str(), what);
  return holds;
}

inline int result(const char* name, long checks) {
  std::printf("%s: %ld checks, %d failed\n", name, checks, failures());
  return failures() ? 1 : 0;
}

}  // namespace check
