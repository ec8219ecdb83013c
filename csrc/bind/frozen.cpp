#include "frozen.h"

#include <utility>

#include "backend.h"
#include "call.h"
#include "dtype.h"
#include "register.h"

namespace fastrnn::bind {
namespace {

// -1 where the tensor has no version counter: an inference tensor.
std::int64_t version_of(py::handle tensor) {
  static PyObject* const name = PyUnicode_InternFromString("_version");
  PyObject* version = PyObject_GetAttr(tensor.ptr(), name);
  if (version == nullptr) {
    PyErr_Clear();
    return -1;
  }
  const std::int64_t value = PyLong_Check(version) ? PyLong_AsLongLong(version) : -1;
  Py_DECREF(version);
  return value;
}

bool same_packing(const Options& a, const Options& b) {
  return a.cell == b.cell && a.maths.reset_after == b.maths.reset_after && a.layers == b.layers &&
         a.directions == b.directions && a.proj_size == b.proj_size;
}

}  // namespace

Frozen::Frozen(const CheckedOptions& options, py::handle input, const py::tuple& weights)
    : options_(options.options) {
  Call call(options, 0);
  call.set_weights_for(input, weights);
  dtype_ = data_type(call.problem().dtype);
  for (std::size_t i = 0; i < call.weights().size(); ++i) {
    const py::object tensor = weights[i];
    entries_.push_back({call.weights()[i], version_of(tensor), tensor.attr("detach")()});
  }
  auto memory = std::make_shared<Memory>(cpu_backend().packed_size(call.problem()));
  cpu_backend().pack(call.problem(), memory->data());
  packed_ = std::move(memory);
}

bool Frozen::matches(const Entry& entry, const Array& array, std::int64_t version) {
  const Array& known = entry.array;
  bool same =
      known.data() == array.data() && entry.version == version && known.ndim() == array.ndim();
  for (int axis = 0; same && axis < array.ndim(); ++axis)
    same = known.shape(axis) == array.shape(axis) && known.stride(axis) == array.stride(axis);
  return same;
}

std::shared_ptr<const Memory> Frozen::find(const Problem& problem, const py::object* objects,
                                           const std::vector<Array>& arrays) {
  bool same = packed_ != nullptr && entries_.size() == arrays.size() &&
              same_packing(options_, problem.options) && bind::same(dtype_, arrays[0].dtype());
  for (std::size_t i = 0; same && i < arrays.size(); ++i)
    same = matches(entries_[i], arrays[i], version_of(objects[i]));
  if (!same) thaw();
  return packed_;
}

void Frozen::thaw() {
  entries_.clear();
  packed_.reset();
}

void register_frozen(py::module_& module) {
  py::class_<Frozen>(module, "Frozen")
      .def(py::init<const CheckedOptions&, py::handle, const py::tuple&>(), py::arg("options"),
           py::arg("input"), py::arg("weights"))
      .def("thaw", &Frozen::thaw)
      .def_property_readonly("packed", &Frozen::packed);
}

}  // namespace fastrnn::bind
