// `_C.Program`: a step as a list of operations (csrc/program.h), checked once, run often.
#pragma once

#include <pybind11/pybind11.h>

namespace fastrnn::bind {

void register_program(pybind11::module_& module);

}  // namespace fastrnn::bind
