// `_C.infer`: a layer's or a cell's call without a gradient, for torch tensors in the usual form,
// the outputs allocated here. It does what _C.forward does with less between the call and the
// engine.
#pragma once

#include <pybind11/pybind11.h>

namespace fastrnn::bind {

void register_infer(pybind11::module_& module);

}  // namespace fastrnn::bind
