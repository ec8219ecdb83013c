// `_C.Options`: csrc/problem.h's Options, checked, with the traits of the cell.
#pragma once

#include <pybind11/pybind11.h>

#include "backend.h"
#include "problem.h"

namespace fastrnn::bind {

struct CheckedOptions {
  fastrnn::Options options;
  CellTraits traits;
};

}  // namespace fastrnn::bind
