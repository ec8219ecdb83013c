// `_C.infer`: a layer's or a cell's call without a gradient, for torch tensors in the usual form,
// the outputs allocated here. It does what _C.forward does with less between the call and the
// engine.
#pragma once

#include <pybind11/pybind11.h>

namespace fastrnn::bind {

// Whether a torch tensor's memory holds its values with the sign still to be changed.
bool negation_pending(pybind11::handle tensor);

void register_infer(pybind11::module_& module);

}  // namespace fastrnn::bind
