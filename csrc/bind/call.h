// `_C.forward` and `_C.backward`: from Python's arguments to one Problem of the engine.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

#include "argument.h"
#include "options.h"
#include "problem.h"

namespace fastrnn::bind {

// Threads of an OpenMP region here and now; 1 without OpenMP.
int max_threads();

// A flat list of weights for an input like `input`, (T, B, I), checked as _C.forward checks them:
// sizes, dtype and parameters of `problem` are set. For the time in which the caller holds both.
struct CheckedWeights {
  Problem problem;
  std::vector<Parameters> parameters;  // problem.parameters
  std::vector<Array> arrays;           // the weights, in the order of the list
  Owners owners;
};
CheckedWeights check_weights(const CheckedOptions& options, py::handle input, py::handle weights);

void register_call(pybind11::module_& module);

}  // namespace fastrnn::bind
