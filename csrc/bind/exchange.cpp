#include "exchange.h"

#include <string>
#include <utility>
#include <vector>

#include "dtype.h"
#include "tensor.h"

namespace fastrnn::bind {
namespace {

bool fast_dlpack = true;

// ---- the buffer protocol ------------------------------------------------------------------------

struct Buffer {
  Py_buffer buffer{};
  std::vector<std::int64_t> strides;  // in elements; the protocol's own are in bytes
};

void release_buffer(void* buffer) {
  if (!Py_IsInitialized()) return;
  py::gil_scoped_acquire gil;
  auto* owned = static_cast<Buffer*>(buffer);
  PyBuffer_Release(&owned->buffer);
  delete owned;
}

dlpack::DataType type_of_format(const char* format, Py_ssize_t itemsize) {
  const auto bits = static_cast<std::uint8_t>(itemsize * 8);
  if (format == nullptr) return {dlpack::kUInt, bits, 1};
  if (*format == '@' || *format == '=') ++format;
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

// False where the object has no buffer that describes its elements.
bool import_buffer(py::handle object, Import& import) {
  const PyBufferProcs* procs = Py_TYPE(object.ptr())->tp_as_buffer;
  if (procs == nullptr || procs->bf_getbuffer == nullptr) return false;
  auto owned = std::make_unique<Buffer>();
  Py_buffer& buffer = owned->buffer;
  if (PyObject_GetBuffer(object.ptr(), &buffer, PyBUF_RECORDS_RO) != 0) {
    PyErr_Clear();  // another way in may know the type
    return false;
  }
  Owner owner{owned.release(), release_buffer};
  auto& strides = static_cast<Buffer*>(owner.get())->strides;
  const dlpack::DataType dtype = type_of_format(buffer.format, buffer.itemsize);
  if (find_type(dtype) == nullptr) return false;
  for (int i = 0; i < buffer.ndim; ++i) {
    if (buffer.strides[i] % buffer.itemsize != 0) return false;
    strides.push_back(buffer.strides[i] / buffer.itemsize);
  }
  static_assert(sizeof(Py_ssize_t) == sizeof(std::int64_t), "a 64-bit platform");
  import.view = {buffer.buf,
                 {dlpack::kCPU, 0},
                 buffer.ndim,
                 dtype,
                 reinterpret_cast<std::int64_t*>(buffer.shape),
                 strides.data(),
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

// A capsule gives its tensor away once: the new name says so.
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

// Null where the type has no such table. Found tables are remembered, with a reference that keeps
// the type, so that its address stays its own.
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

// The object with its values in its memory: a tensor of torch's may wait for a conjugation or a
// negation, which DLPack cannot tell.
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
  // torch refuses tensors that record a gradient; what is asked for is their values.
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

// NumPy exports no bfloat16, which it has from ml_dtypes: its bits go as uint16.
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
  if (!Py_IsInitialized()) return;
  py::gil_scoped_acquire gil;
  Py_DECREF(static_cast<PyObject*>(object));
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

Import borrow(py::handle object) { return import_array(object, true); }

Import keep(py::handle object) { return import_array(object, false); }

bool set_fast_dlpack(bool on) { return std::exchange(fast_dlpack, on); }

void refuse(py::handle object) {
  throw py::type_error("expected an array (NumPy, torch, or any object with __dlpack__), got " +
                       std::string(Py_TYPE(object.ptr())->tp_name));
}

}  // namespace fastrnn::bind
