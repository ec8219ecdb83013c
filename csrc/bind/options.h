// `_C.Options`: csrc/problem.h's Options, checked, with what the engine knows of the cell.
#pragma once

#include <pybind11/pybind11.h>

#include "backend.h"
#include "problem.h"

namespace fastrnn::bind {

struct CheckedOptions {
  fastrnn::Options options;
  CellTraits traits;
};

void register_options(pybind11::module_& module);

}  // namespace fastrnn::bind
