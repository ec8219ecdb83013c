#include "torch.h"

#include <pybind11/stl.h>

#include <cstring>
#include <utility>
#include <vector>

#include "dtype.h"
#include "register.h"
#include "tensor.h"

namespace py = pybind11;

namespace fastrnn::bind {
namespace {

// Functions that return False, None, 0 or (), and variables (a module's dictionary, a name) that
// are False or negative, while no torch mode or transform is active.
struct Questions {
  std::vector<PyObject*> functions;
  std::vector<std::pair<PyObject*, PyObject*>> variables;
};

// References that live as long as the process.
struct Torch {
  PyObject *tensor, *parameter;
  PyObject *get_num_threads, *is_grad_enabled;
  PyObject* dtypes[4];  // float32, float64, bfloat16, float16
  Recording recording;
  Questions observers, transforms;
};
Torch torch;

PyObject* interned(const char* name) { return PyUnicode_InternFromString(name); }

py::object checked(PyObject* result) {
  if (result == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

bool all_quiet(const Questions& questions) {
  for (PyObject* function : questions.functions) {
    const py::object answer = checked(PyObject_CallNoArgs(function));
    const bool quiet = answer.is(py::handle(Py_False)) || answer.is_none() ||
                       (PyLong_CheckExact(answer.ptr()) && PyLong_AsLong(answer.ptr()) == 0) ||
                       (PyTuple_CheckExact(answer.ptr()) && PyTuple_GET_SIZE(answer.ptr()) == 0);
    if (!quiet) return false;
  }
  for (const auto& [dictionary, name] : questions.variables) {
    PyObject* value = PyDict_GetItemWithError(dictionary, name);
    if (value == nullptr) return false;
    if (value != Py_False && !(PyLong_CheckExact(value) && PyLong_AsLong(value) < 0)) return false;
  }
  return true;
}

bool attribute_is_true(py::handle tensor, PyObject* name) {
  return checked(PyObject_GetAttr(tensor.ptr(), name)).is(py::handle(Py_True));
}

PyObject* torch_dtype(dlpack::DataType dtype) {
  if (dtype.code == dlpack::kBfloat) return torch.dtypes[2];
  return torch.dtypes[dtype.bits == 64 ? 1 : dtype.bits == 16 ? 3 : 0];
}

using Variable = std::pair<py::dict, py::str>;

Questions questions(const py::list& functions, const std::vector<Variable>& variables) {
  Questions all;
  for (const py::handle function : functions) all.functions.push_back(function.inc_ref().ptr());
  for (const Variable& v : variables)
    all.variables.emplace_back(v.first.inc_ref().ptr(), v.second.inc_ref().ptr());
  return all;
}

void set_torch(const py::type& tensor, const py::type& parameter, const py::object& get_num_threads,
               const py::object& is_grad_enabled, const py::list& dtypes, const py::list& observers,
               const std::vector<Variable>& observer_variables, const py::list& transforms,
               const std::vector<Variable>& transform_variables) {
  torch = {tensor.inc_ref().ptr(),
           parameter.inc_ref().ptr(),
           get_num_threads.inc_ref().ptr(),
           is_grad_enabled.inc_ref().ptr(),
           {},
           torch.recording,
           questions(observers, observer_variables),
           questions(transforms, transform_variables)};
  for (std::size_t i = 0; i < 4; ++i) torch.dtypes[i] = py::object(dtypes[i]).inc_ref().ptr();
}

void set_recording(const py::object& apply, const py::type& node, const py::object& continued) {
  torch.recording = {apply.inc_ref().ptr(), reinterpret_cast<PyTypeObject*>(node.inc_ref().ptr()),
                     continued.inc_ref().ptr()};
}

}  // namespace

bool is_plain_tensor(py::handle object) {
  auto* type = reinterpret_cast<PyObject*>(Py_TYPE(object.ptr()));
  return type == torch.tensor || type == torch.parameter;
}

bool negation_pending(py::handle tensor) {
  static PyObject* const is_neg = interned("is_neg");
  return checked(PyObject_CallMethodNoArgs(tensor.ptr(), is_neg)).is(py::handle(Py_True));
}

bool requires_grad(py::handle tensor) {
  static PyObject* const name = interned("requires_grad");
  return attribute_is_true(tensor, name);
}

bool grad_enabled() {
  return checked(PyObject_CallNoArgs(torch.is_grad_enabled)).is(py::handle(Py_True));
}

bool no_observer() { return all_quiet(torch.observers); }
bool no_transform() { return all_quiet(torch.transforms); }

bool bypass_is_unobservable(const py::tuple& tensors) {
  static PyObject* const is_cpu = interned("is_cpu");
  static PyObject* const is_cuda = interned("is_cuda");
  if (!no_observer()) return false;
  for (const py::handle tensor : tensors) {
    if (tensor.is_none()) continue;
    if (!is_plain_tensor(tensor) || negation_pending(tensor) ||
        !(attribute_is_true(tensor, is_cpu) || attribute_is_true(tensor, is_cuda)))
      return false;
  }
  return true;
}

int torch_threads() {
  const py::object count = checked(PyObject_CallNoArgs(torch.get_num_threads));
  return static_cast<int>(PyLong_AsLong(count.ptr()));
}

py::object new_array(py::handle like, bool host, const Shape& shape, dlpack::DataType dtype,
                     bool zeros) {
  static PyObject* const new_empty = interned("new_empty");
  static PyObject* const new_zeros = interned("new_zeros");
  static PyObject* const dtype_name = PyTuple_Pack(1, interned("dtype"));
  const bool torchs = torch.tensor != nullptr &&
                      PyObject_TypeCheck(like.ptr(), reinterpret_cast<PyTypeObject*>(torch.tensor));
  if (!torchs && host) {
    Tensor made = Tensor::empty({shape.begin(), shape.end()}, dtype);
    if (zeros)
      std::memset(made.data(), 0, static_cast<std::size_t>(made.size()) * (dtype.bits / 8));
    return py::cast(std::move(made));
  }
  py::tuple sizes(shape.ndim);
  for (int axis = 0; axis < shape.ndim; ++axis) sizes[axis] = py::int_(shape.sizes[axis]);
  const py::object name = torchs ? py::object() : py::str(type_name(dtype));
  PyObject* arguments[] = {like.ptr(), sizes.ptr(), torchs ? torch_dtype(dtype) : name.ptr()};
  return checked(
      PyObject_VectorcallMethod(zeros ? new_zeros : new_empty, arguments, 2, dtype_name));
}

py::object transposed(py::handle tensor) { return tensor.attr("transpose")(0, 1); }

const Recording& torch_recording() { return torch.recording; }

void register_torch(py::module_& module) {
  module.def("set_torch", set_torch);
  module.def("set_recording", set_recording);
  module.def("bypass_is_unobservable", bypass_is_unobservable);
}

}  // namespace fastrnn::bind
