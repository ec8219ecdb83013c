// torch through Python: libtorch is never linked, and torch need not be installed. set_torch()
// stores the types and functions once, when fastrnn's torch side is imported.
#pragma once

#include <pybind11/pybind11.h>

#include "argument.h"

namespace fastrnn::bind {

// Whether the object is exactly a torch.Tensor or torch.nn.Parameter: a subclass may change what a
// call means.
bool is_plain_tensor(pybind11::handle object);

// Whether a negation of the tensor is pending: its memory holds its values with the opposite sign.
bool negation_pending(pybind11::handle tensor);

// Whether autograd records operations on the tensor, where gradients are enabled.
bool requires_grad(pybind11::handle tensor);
bool grad_enabled();

// Whether no torch mode, trace or profiler would notice a call that bypasses torch's dispatcher.
bool no_observer();
// Whether no autocast, no transform of torch.func and no forward-mode level changes what a call
// means.
bool no_transform();
// no_observer(), and the tensors (or None) are plain ones in host or CUDA memory, no negation
// pending.
bool bypass_is_unobservable(const pybind11::tuple& tensors);

int torch_threads();  // torch.get_num_threads()

// An uninitialised array of the kind of `like`: a torch tensor; for other arrays in host memory a
// fastrnn.Tensor; elsewhere the result of their own new_empty(shape, dtype=name). `zeros`: zeroed.
pybind11::object new_array(pybind11::handle like, bool host, const Shape& shape,
                           dlpack::DataType dtype, bool zeros = false);

// torch.Tensor.transpose(0, 1), recorded by autograd as usual.
pybind11::object transposed(pybind11::handle tensor);

// What records a call of a layer (python/fastrnn/calls/autograd.py).
struct Recording {
  PyObject* apply = nullptr;      // of the autograd Function
  PyTypeObject* node = nullptr;   // the type of its nodes in the graph
  PyObject* continued = nullptr;  // records a step of a cell after another
};
const Recording& torch_recording();

}  // namespace fastrnn::bind
