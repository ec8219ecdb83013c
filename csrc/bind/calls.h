// `_C.Call`, `_C.backward` and `_C.layer`: a call of the engine from Python.
#pragma once

#include <pybind11/pybind11.h>

namespace fastrnn::bind {

void register_calls(pybind11::module_& module);

}  // namespace fastrnn::bind
