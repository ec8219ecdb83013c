// Whether this CPU runs the instruction set that FASTRNN_ISA names.
#pragma once

#include <cstdio>
#include <stdexcept>

#include "../cpu/isa.h"

namespace check {

inline bool runs_here(const char* test) {
  try {
    std::printf("instruction set: %s\n", fastrnn::cpu_isa());
    return true;
  } catch (const std::invalid_argument& e) {
    std::printf("%s: skipped, %s\n", test, e.what());
    return false;
  }
}

}  // namespace check
