#include "tensor.h"

#include <pybind11/stl.h>

#include <cstring>
#include <limits>
#include <optional>
#include <string>
#include <utility>

#include "memory.h"
#include "register.h"

namespace fastrnn::bind {
namespace {

// The data of a tensor without elements: null would mean "not given".
alignas(64) char nothing[64];

std::vector<std::int64_t> contiguous_strides(const std::vector<std::int64_t>& shape) {
  std::vector<std::int64_t> strides(shape.size());
  std::int64_t stride = 1;
  for (std::size_t i = shape.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= shape[i] > 1 ? shape[i] : 1;
  }
  return strides;
}

std::size_t bytes_of(const std::vector<std::int64_t>& shape, std::int64_t itemsize) {
  constexpr std::int64_t most = std::numeric_limits<std::int64_t>::max();
  std::int64_t bytes = itemsize;
  for (const std::int64_t extent : shape) {
    if (extent < 0)
      throw py::value_error("shape: expected sizes of 0 or more, got " + std::to_string(extent));
    if (extent > 0 && bytes > most / extent)
      throw py::value_error("shape: so many elements cannot be addressed");
    bytes *= extent;
  }
  return static_cast<std::size_t>(bytes);
}

std::int64_t axis_of(std::int64_t axis, std::int64_t ndim) {
  if (axis < -ndim || axis >= ndim)
    throw py::index_error("axis: expected one of a tensor with " + std::to_string(ndim) +
                          " axes, got " + std::to_string(axis));
  return axis < 0 ? axis + ndim : axis;
}

// Copies in C order, one axis per level.
void copy_strided(char* to, const char* from, const std::int64_t* shape,
                  const std::int64_t* to_strides, const std::int64_t* from_strides,
                  std::int64_t ndim, std::size_t itemsize) {
  if (ndim == 0) {
    std::memcpy(to, from, itemsize);
    return;
  }
  const auto step = static_cast<std::int64_t>(itemsize);
  for (std::int64_t i = 0; i < shape[0]; ++i)
    copy_strided(to + i * to_strides[0] * step, from + i * from_strides[0] * step, shape + 1,
                 to_strides + 1, from_strides + 1, ndim - 1, itemsize);
}

}  // namespace

Tensor Tensor::empty(std::vector<std::int64_t> shape, dlpack::DataType dtype) {
  Tensor tensor;
  const std::size_t bytes = bytes_of(shape, dtype.bits / 8);
  tensor.data_ = new_aligned(bytes > 0 ? bytes : 1);
  tensor.storage_ = {tensor.data_, free_aligned};
  tensor.dtype_ = dtype;
  tensor.device_ = {dlpack::kCPU, 0};
  tensor.strides_ = contiguous_strides(shape);
  tensor.shape_ = std::move(shape);
  return tensor;
}

Tensor::Tensor(Import import) {
  const dlpack::Tensor& view = import.view;
  if (find_type(view.dtype) == nullptr)
    throw py::type_error("expected an array of numbers, got " + type_name(view.dtype));
  data_ = static_cast<char*>(view.data) + view.byte_offset;
  dtype_ = view.dtype;
  device_ = view.device;
  read_only_ = import.read_only;
  shape_.assign(view.shape, view.shape + view.ndim);
  if (view.strides != nullptr)
    strides_.assign(view.strides, view.strides + view.ndim);
  else
    strides_ = contiguous_strides(shape_);
  if (size() == 0) data_ = nothing;
  storage_ = std::move(import.owner);
}

std::int64_t Tensor::size() const {
  std::int64_t size = 1;
  for (const std::int64_t extent : shape_) size *= extent;
  return size;
}

dlpack::Tensor Tensor::view() {
  return {data_,           device_, static_cast<std::int32_t>(ndim()), dtype_, shape_.data(),
          strides_.data(), 0};
}

Tensor Tensor::transpose(std::int64_t first, std::int64_t second) const {
  const auto i = static_cast<std::size_t>(axis_of(first, ndim()));
  const auto j = static_cast<std::size_t>(axis_of(second, ndim()));
  Tensor other = *this;
  std::swap(other.shape_[i], other.shape_[j]);
  std::swap(other.strides_[i], other.strides_[j]);
  return other;
}

Tensor Tensor::at(std::int64_t index) const {
  if (ndim() == 0) throw py::index_error("a tensor without axes cannot be indexed");
  const std::int64_t length = shape_[0];
  if (index < -length || index >= length)
    throw py::index_error("index: expected one below " + std::to_string(length) + ", got " +
                          std::to_string(index));
  Tensor other = *this;
  if (other.size() > 0)
    other.data_ =
        static_cast<char*>(data_) + (index < 0 ? index + length : index) * strides_[0] * itemsize();
  other.shape_.erase(other.shape_.begin());
  other.strides_.erase(other.strides_.begin());
  return other;
}

Tensor Tensor::bits_as(dlpack::DataType dtype) const {
  Tensor other = *this;
  other.dtype_ = dtype;
  return other;
}

Tensor Tensor::copy() const {
  Tensor other = empty(shape_, dtype_);
  copy_strided(static_cast<char*>(other.data_), static_cast<const char*>(data_), shape_.data(),
               other.strides_.data(), strides_.data(), ndim(),
               static_cast<std::size_t>(itemsize()));
  return other;
}

// ---- out: DLPack, the buffer protocol, NumPy, torch ---------------------------------------------

namespace {

PyTypeObject* tensor_type = nullptr;  // owned by the module

// The content of a capsule: the description and a tensor of its own, which keeps the memory alive.
template <class Managed>
struct Export {
  Managed managed{};
  Tensor tensor;

  explicit Export(Tensor source) : tensor(std::move(source)) {
    managed.tensor = tensor.view();
    managed.context = this;
    managed.deleter = [](Managed* self) { delete static_cast<Export*>(self->context); };
  }
};

template <class Managed>
constexpr const char* kCapsule = "dltensor";
template <>
constexpr const char* kCapsule<dlpack::ManagedVersioned> = "dltensor_versioned";

template <class Managed>
py::object capsule_of(Export<Managed>* exported) {
  PyObject* capsule = PyCapsule_New(&exported->managed, kCapsule<Managed>, [](PyObject* self) {
    if (!PyCapsule_IsValid(self, kCapsule<Managed>)) return;  // taken by a consumer
    auto* managed = static_cast<Managed*>(PyCapsule_GetPointer(self, kCapsule<Managed>));
    managed->deleter(managed);
  });
  if (capsule == nullptr) {
    delete exported;
    throw py::error_already_set();
  }
  return py::reinterpret_steal<py::object>(capsule);
}

using Pair = std::pair<std::int64_t, std::int64_t>;

// The standard's method (data-apis.org/array-api, `__dlpack__`).
py::object to_dlpack(const Tensor& tensor, const py::object& stream,
                     const std::optional<Pair>& max_version, const std::optional<Pair>& dl_device,
                     std::optional<bool> copy) {
  const dlpack::Device device = tensor.device();
  if (dl_device && *dl_device != Pair{device.type, device.id})
    throw py::buffer_error("dl_device: expected that of the tensor, " + device_name(device) +
                           "; copying between devices is left to the consumer");
  if (device.type == dlpack::kCPU && !stream.is_none() && !stream.equal(py::int_(-1)))
    throw py::buffer_error("stream: expected None for a tensor on the CPU, got " +
                           std::string(py::str(stream)));
  const bool copied = copy.value_or(false);
  if (copied && !on_host(device))
    throw py::buffer_error("copy: a tensor on " + device_name(device) + " cannot be copied here");
  Tensor source = copied ? tensor.copy() : tensor;
  const bool read_only = source.read_only();

  if (max_version && max_version->first >= dlpack::kMajor) {
    auto* exported = new Export<dlpack::ManagedVersioned>(std::move(source));
    exported->managed.version = {dlpack::kMajor, dlpack::kMinor};
    exported->managed.flags =
        (read_only ? dlpack::kReadOnly : 0) | (copied ? dlpack::kIsCopied : 0);
    return capsule_of(exported);
  }
  if (read_only)
    throw py::buffer_error("a read-only tensor needs a consumer of DLPack 1.0 or newer");
  return capsule_of(new Export<dlpack::Managed>(std::move(source)));
}

py::buffer_info to_buffer(const Tensor& tensor) {
  const TypeInfo& type = *find_type(tensor.dtype());
  if (!on_host(tensor.device()))
    throw py::buffer_error("the tensor is on " + device_name(tensor.device()));
  if (type.format == nullptr) throw py::buffer_error("the buffer protocol has no bfloat16");
  std::vector<py::ssize_t> shape(tensor.shape().begin(), tensor.shape().end());
  std::vector<py::ssize_t> strides(tensor.strides().begin(), tensor.strides().end());
  for (py::ssize_t& stride : strides) stride *= tensor.itemsize();
  return {tensor.data(),    tensor.itemsize(),  type.format,       tensor.ndim(),
          std::move(shape), std::move(strides), tensor.read_only()};
}

py::object to_numpy(const Tensor& tensor) {
  if (!on_host(tensor.device()))
    throw py::type_error("NumPy reads host memory; the tensor is on " +
                         device_name(tensor.device()) + ": use .torch().cpu()");
  const bool bfloat16 = tensor.dtype().code == dlpack::kBfloat;
  py::object element;
  if (bfloat16) try {
      element = py::module_::import("ml_dtypes").attr("bfloat16");
    } catch (const py::error_already_set& error) {
      if (!error.matches(PyExc_ImportError)) throw;
      throw py::type_error("NumPy has no bfloat16: install ml_dtypes, or use .torch()");
    }
  const dlpack::DataType bits{dlpack::kUInt, 16, 1};
  const py::object source = py::cast(bfloat16 ? tensor.bits_as(bits) : tensor);
  const py::object array =
      py::module_::import("numpy").attr("asarray")(py::memoryview(py::buffer(source)));
  return bfloat16 ? array.attr("view")(element) : array;
}

py::object to_array(const Tensor& tensor, const py::object& dtype, const py::object& copy) {
  const py::object array = to_numpy(tensor);
  if (dtype.is_none() && copy.is_none()) return array;
  return py::module_::import("numpy").attr("array")(array, py::arg("dtype") = dtype,
                                                    py::arg("copy") = copy);
}

py::object to_torch(const py::object& self) {
  for (const std::int64_t stride : py::cast<const Tensor&>(self).strides())
    if (stride < 0)  // torch's own from_dlpack ends the process
      throw py::value_error("torch has no negative strides: copy the array first");
  return py::module_::import("torch").attr("from_dlpack")(self);
}

py::object item(const Tensor& tensor) {
  if (tensor.size() != 1)
    throw py::value_error("item: expected a tensor of one element, got " +
                          std::to_string(tensor.size()));
  if (tensor.dtype().code != dlpack::kBfloat) return to_numpy(tensor).attr("item")();
  if (!on_host(tensor.device()))
    throw py::type_error("item: the tensor is on " + device_name(tensor.device()));
  std::uint16_t half = 0;
  std::memcpy(&half, tensor.data(), sizeof half);
  const std::uint32_t bits = static_cast<std::uint32_t>(half) << 16;  // a float's upper half
  float value = 0;
  std::memcpy(&value, &bits, sizeof value);
  return py::float_(value);
}

std::string repr(const Tensor& tensor) {
  return "fastrnn.Tensor(shape=" + std::string(py::str(py::tuple(py::cast(tensor.shape())))) +
         ", dtype='" + type_name(tensor.dtype()) + "', device='" + device_name(tensor.device()) +
         "')";
}

Tensor from_dlpack(py::handle x) {
  try {
    return Tensor(keep(x));
  } catch (const py::value_error& error) {
    throw py::value_error(std::string("x: ") + error.what());
  } catch (const py::type_error& error) {
    throw py::type_error(std::string("x: ") + error.what());
  } catch (const py::buffer_error& error) {
    throw py::buffer_error(std::string("x: ") + error.what());
  } catch (py::error_already_set& error) {
    if (!error.matches(PyExc_Exception)) throw;
    const std::string text = "x: the array cannot be read: " + reason(error);
    py::raise_from(error, PyExc_BufferError, text.c_str());
    throw py::error_already_set();
  }
}

py::int_ length(const Tensor& tensor) {
  if (tensor.ndim() == 0) throw py::type_error("len() of a tensor without axes");
  return tensor.shape()[0];
}

}  // namespace

Tensor* as_tensor(py::handle object) {
  return Py_TYPE(object.ptr()) == tensor_type ? py::cast<Tensor*>(object) : nullptr;
}

void register_tensor(py::module_& module) {
  py::class_<Tensor> type(module, "Tensor", py::buffer_protocol(), py::is_final(),
                          "A strided view of memory: shape and strides in elements, dtype, device. "
                          "Goes to NumPy, torch and any DLPack consumer without a copy.");
  tensor_type = reinterpret_cast<PyTypeObject*>(type.ptr());
  type.attr("__module__") = "fastrnn";
  type.def_property_readonly("shape",
                             [](const Tensor& t) { return py::tuple(py::cast(t.shape())); })
      .def_property_readonly("strides",
                             [](const Tensor& t) { return py::tuple(py::cast(t.strides())); })
      .def_property_readonly("ndim", &Tensor::ndim)
      .def_property_readonly("dtype", [](const Tensor& t) { return type_name(t.dtype()); })
      .def_property_readonly("device", [](const Tensor& t) { return device_name(t.device()); })
      .def_property_readonly("read_only", &Tensor::read_only)
      .def("transpose", &Tensor::transpose, py::arg("first"), py::arg("second"))
      .def("numpy", to_numpy)
      .def("torch", to_torch)
      .def("item", item)
      .def("__float__", [](const Tensor& t) { return py::float_(item(t)); })
      .def("__int__", [](const Tensor& t) { return py::int_(item(t)); })
      .def("__bool__", [](const Tensor& t) { return py::bool_(item(t)); })
      .def("__len__", length)
      .def("__getitem__", &Tensor::at, py::arg("index"))
      .def("__repr__", repr)
      .def("__array__", to_array, py::arg("dtype") = py::none(), py::arg("copy") = py::none())
      .def("__dlpack__", to_dlpack, py::kw_only(), py::arg("stream") = py::none(),
           py::arg("max_version") = py::none(), py::arg("dl_device") = py::none(),
           py::arg("copy") = py::none())
      .def("__dlpack_device__",
           [](const Tensor& t) { return py::make_tuple(t.device().type, t.device().id); })
      .def_buffer(to_buffer);

  module.def(
      "empty",
      [](std::vector<std::int64_t> shape, const std::string& dtype) {
        return Tensor::empty(std::move(shape), type_named(dtype));
      },
      py::arg("shape"), py::arg("dtype"));
  module.def("from_dlpack", from_dlpack, py::arg("x"));
  module.def("_set_fast_dlpack", set_fast_dlpack, py::arg("on"));
}

}  // namespace fastrnn::bind
