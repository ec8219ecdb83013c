// `_C.forward` and `_C.backward`: from Python's arguments to one Problem of the engine.
#pragma once

#include <pybind11/pybind11.h>

namespace fastrnn::bind {

// Threads of an OpenMP region here and now; 1 without OpenMP.
int max_threads();

void register_call(pybind11::module_& module);

}  // namespace fastrnn::bind
