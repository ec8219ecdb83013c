#include "exchange.h"

#include <algorithm>
#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include "dtype.h"
#include "gil.h"
#include "tensor.h"

namespace fastrnn::bind {
namespace {

bool fast_dlpack = true;

constexpr std::int32_t kMostDimensions = 64;  // the limit of NumPy, torch and the buffer protocol

// ---- the buffer protocol ------------------------------------------------------------------------

struct Buffer {
  Py_buffer buffer{};
  std::vector<std::int64_t> shape, strides;  // in elements; the protocol's strides are in bytes
};

void release_buffer(void* buffer) {
  if (!python_is_there()) return;
  py::gil_scoped_acquire gil;
  auto* owned = static_cast<Buffer*>(buffer);
  PyBuffer_Release(&owned->buffer);
  delete owned;
}

dlpack::DataType type_of_format(const char* format, Py_ssize_t itemsize) {
  if (itemsize < 1 || itemsize > 16) return {};
  const auto bits = static_cast<std::uint8_t>(itemsize * 8);
  if (format == nullptr) return {dlpack::kUInt, bits, 1};
  if (*format != '\0' && std::string("@=<").find(*format) != std::string::npos) ++format;
  const std::string text = format;
  if (text == "Zf" || text == "Zd") return {dlpack::kComplex, bits, 1};
  if (text.size() != 1) return {};
  if (text == "?") return {dlpack::kBool, bits, 1};
  const char letter = text[0];
  if (std::string("efd").find(letter) != std::string::npos) return {dlpack::kFloat, bits, 1};
  if (std::string("bhilqn").find(letter) != std::string::npos) return {dlpack::kInt, bits, 1};
  if (std::string("BHILQN").find(letter) != std::string::npos) return {dlpack::kUInt, bits, 1};
  return {};
}

// An exporter may show elements for which the protocol has no format as bytes: NumPy's scalars of
// dates do. Then the object's own dtype has another size.
bool shows_its_elements(py::handle object, const Py_buffer& buffer) {
  if (buffer.itemsize != 1) return true;
  const py::object dtype = py::getattr(object, "dtype", py::none());
  const py::object itemsize = py::getattr(dtype, "itemsize", py::none());
  return !PyLong_Check(itemsize.ptr()) || PyLong_AsLong(itemsize.ptr()) == buffer.itemsize;
}

// False where the object has no buffer that describes its elements.
bool import_buffer(py::handle object, Import& import) {
  if (!PyObject_CheckBuffer(object.ptr())) return false;
  auto owned = std::make_unique<Buffer>();
  Py_buffer& buffer = owned->buffer;
  if (PyObject_GetBuffer(object.ptr(), &buffer, PyBUF_RECORDS_RO) != 0) {
    PyErr_Clear();  // another protocol may support the type
    return false;
  }
  Owner owner{owned.release(), release_buffer};
  auto& [_, shape, strides] = *static_cast<Buffer*>(owner.get());
  const dlpack::DataType dtype = type_of_format(buffer.format, buffer.itemsize);
  if (find_type(dtype) == nullptr || !shows_its_elements(object, buffer)) return false;
  if (buffer.ndim < 0 || buffer.ndim > kMostDimensions) return false;
  // Exporters may omit the shape where there is one axis, and strides in C order.
  if (buffer.shape != nullptr)
    shape.assign(buffer.shape, buffer.shape + buffer.ndim);
  else if (buffer.ndim <= 1)
    shape.assign(static_cast<std::size_t>(buffer.ndim), buffer.len / buffer.itemsize);
  else
    return false;
  for (int i = 0; buffer.suboffsets != nullptr && i < buffer.ndim; ++i)
    if (buffer.suboffsets[i] >= 0) return false;  // rows behind pointers
  for (int i = 0; buffer.strides != nullptr && i < buffer.ndim; ++i) {
    if (buffer.strides[i] % buffer.itemsize != 0) return false;
    strides.push_back(buffer.strides[i] / buffer.itemsize);
  }
  static_assert(sizeof(Py_ssize_t) == sizeof(std::int64_t), "a 64-bit platform");
  import.view = {
      buffer.buf, {dlpack::kCPU, 0}, buffer.ndim,
      dtype,      shape.data(),      buffer.strides != nullptr ? strides.data() : nullptr,
      0};
  import.read_only = buffer.readonly != 0;
  import.owner = std::move(owner);
  return true;
}

// ---- DLPack -------------------------------------------------------------------------------------

template <class Managed>
void release_managed(void* managed) {
  auto* owned = static_cast<Managed*>(managed);
  if (owned->deleter != nullptr) owned->deleter(owned);
}

Import own(dlpack::ManagedVersioned* managed) {
  Import import;
  import.owner = {managed, release_managed<dlpack::ManagedVersioned>};
  if (managed->version.major != dlpack::kMajor)
    throw py::buffer_error("expected an array by DLPack 1.x, got DLPack " +
                           std::to_string(managed->version.major) + ".x");
  import.view = managed->tensor;
  import.read_only = (managed->flags & dlpack::kReadOnly) != 0;
  return import;
}

Import own(dlpack::Managed* managed) {
  Import import;
  import.owner = {managed, release_managed<dlpack::Managed>};
  import.view = managed->tensor;
  return import;
}

// A capsule can be consumed once; its new name marks that.
Import consume(PyObject* capsule) {
  if (PyCapsule_IsValid(capsule, "dltensor_versioned")) {
    void* managed = PyCapsule_GetPointer(capsule, "dltensor_versioned");
    if (PyCapsule_SetName(capsule, "used_dltensor_versioned") != 0) throw py::error_already_set();
    return own(static_cast<dlpack::ManagedVersioned*>(managed));
  }
  if (PyCapsule_IsValid(capsule, "dltensor")) {
    void* managed = PyCapsule_GetPointer(capsule, "dltensor");
    if (PyCapsule_SetName(capsule, "used_dltensor") != 0) throw py::error_already_set();
    return own(static_cast<dlpack::Managed*>(managed));
  }
  throw py::buffer_error("expected a DLPack capsule that is not used yet");
}

// Null where the type has no such table. Found tables are cached, with a reference that keeps the
// type, so that its address is not reused.
const dlpack::ExchangeApi* exchange_api(PyTypeObject* type) {
  struct Entry {
    PyTypeObject* type;
    const dlpack::ExchangeApi* api;
  };
  static Entry known[8];
  static int count = 0;
  for (int i = 0; i < count; ++i)
    if (known[i].type == type) return known[i].api;

  PyObject* capsule =
      PyObject_GetAttrString(reinterpret_cast<PyObject*>(type), "__dlpack_c_exchange_api__");
  if (capsule == nullptr) {
    PyErr_Clear();
    return nullptr;
  }
  void* table = PyCapsule_IsValid(capsule, "dlpack_exchange_api")
                    ? PyCapsule_GetPointer(capsule, "dlpack_exchange_api")
                    : nullptr;
  Py_DECREF(capsule);
  auto* header = static_cast<dlpack::ExchangeHeader*>(table);
  while (header != nullptr && header->version.major != dlpack::kMajor) header = header->previous;
  auto* api = reinterpret_cast<const dlpack::ExchangeApi*>(header);
  if (api != nullptr && count < 8) {
    Py_INCREF(type);
    known[count++] = {type, api};
  }
  return api;
}

// The object with its values in its memory: a torch tensor may have a pending conjugation or
// negation, which DLPack cannot express.
py::object settled(py::object object) {
  for (const char* resolve : {"resolve_conj", "resolve_neg"})
    if (py::hasattr(object, resolve)) object = object.attr(resolve)();
  return object;
}

Import import_exchange(const dlpack::ExchangeApi& api, py::handle object, bool borrowed) {
  if (borrowed && api.to_tensor != nullptr) {
    Import import;
    if (api.to_tensor(object.ptr(), &import.view) != 0) throw py::error_already_set();
    return import;
  }
  const py::object tensor = settled(py::reinterpret_borrow<py::object>(object));
  dlpack::ManagedVersioned* managed = nullptr;
  if (api.to_managed(tensor.ptr(), &managed) != 0) throw py::error_already_set();
  return own(managed);
}

Import import_dlpack(py::object object) {
  // torch refuses to export tensors that record a gradient; only their values are needed.
  if (py::hasattr(object, "detach")) object = object.attr("detach")();
  object = settled(std::move(object));
  const py::object method = object.attr("__dlpack__");
  py::object capsule;
  try {
    capsule = method(py::arg("max_version") = py::make_tuple(dlpack::kMajor, dlpack::kMinor));
  } catch (const py::error_already_set& error) {
    if (!error.matches(PyExc_TypeError)) throw;
    capsule = method();  // from before DLPack 1.0
  }
  return consume(capsule.ptr());
}

// NumPy does not export ml_dtypes' bfloat16: its bits are imported as uint16.
bool import_bfloat16(py::handle object, Import& import) {
  const py::object dtype = py::getattr(object, "dtype", py::none());
  if (!py::hasattr(object, "view") ||
      !py::str(py::getattr(dtype, "name", py::none())).equal(py::str("bfloat16")))
    return false;
  if (!import_buffer(object.attr("view")("uint16"), import)) return false;
  import.view.dtype = {dlpack::kBfloat, 16, 1};
  return true;
}

// ---- all of them --------------------------------------------------------------------------------

void release_object(void* object) {
  if (!python_is_there()) return;
  py::gil_scoped_acquire gil;
  Py_DECREF(static_cast<PyObject*>(object));
}

// Checks the description given by an exporter. Each error text follows the name of the argument.
Import checked(Import import) {
  const dlpack::Tensor& view = import.view;
  if (view.ndim < 0 || view.ndim > kMostDimensions)
    throw py::value_error("expected 0 to " + std::to_string(kMostDimensions) + " axes, got " +
                          std::to_string(view.ndim));
  if (view.ndim > 0 && view.shape == nullptr)
    throw py::value_error("expected a shape, got an array of " + std::to_string(view.ndim) +
                          " axes without one");
  bool empty = false;
  for (int i = 0; i < view.ndim; ++i) {
    if (view.shape[i] < 0)
      throw py::value_error("expected sizes of 0 or more, got " + std::to_string(view.shape[i]) +
                            " of axis " + std::to_string(i));
    empty = empty || view.shape[i] == 0;
  }
  if (empty) return import;
  if (view.data == nullptr) throw py::value_error("expected an array with data, got one without");
  // The bytes from the first element to the last, in either direction; in double, which no size
  // overflows.
  constexpr double kMostBytes = 4e18;
  double elements = 1, reach = std::max(view.dtype.bits / 8, 1);
  const double item = reach;
  for (int i = view.ndim; i-- > 0;) {
    const auto size = static_cast<double>(view.shape[i]);
    const double stride = view.strides ? static_cast<double>(view.strides[i]) : elements;
    elements *= size;
    reach += size > 1 ? std::abs(stride) * (size - 1) * item : 0;
  }
  if (reach > kMostBytes || elements * item > kMostBytes)
    throw py::value_error("expected an array in memory, got sizes and strides beyond any");
  return import;
}

Import import_array(py::handle object, bool borrowed) {
  Import import;
  if (Tensor* tensor = as_tensor(object)) {
    import.view = tensor->view();
    import.read_only = tensor->read_only();
    if (!borrowed) import.owner = {object.inc_ref().ptr(), release_object};
    return import;
  }
  if (import_buffer(object, import)) return import;
  if (fast_dlpack)
    if (const auto* api = exchange_api(Py_TYPE(object.ptr())))
      return import_exchange(*api, object, borrowed);
  if (PyCapsule_CheckExact(object.ptr())) return consume(object.ptr());
  if (!py::hasattr(object, "__dlpack__")) refuse(object);
  try {
    return import_dlpack(py::reinterpret_borrow<py::object>(object));
  } catch (const py::error_already_set& error) {
    if (!error.matches(PyExc_BufferError) || !import_bfloat16(object, import)) throw;
    return import;
  }
}

}  // namespace

Import borrow(py::handle object) { return checked(import_array(object, true)); }

Import keep(py::handle object) { return checked(import_array(object, false)); }

bool set_fast_dlpack(bool on) { return std::exchange(fast_dlpack, on); }

std::string reason(const py::error_already_set& error) {
  const std::string text = py::str(error.value());
  return text.substr(0, text.find('\n'));
}

void refuse(py::handle object) {
  throw py::type_error("expected an array (NumPy, torch, or any object with __dlpack__), got " +
                       std::string(Py_TYPE(object.ptr())->tp_name));
}

}  // namespace fastrnn::bind
