#include "argument.h"

#include <algorithm>
#include <cstdint>

#include "dtype.h"

namespace fastrnn::bind {
namespace {

// The data of an array without elements: null would mean "not given".
alignas(64) char nothing[64];

Import borrow_named(py::handle object, const Name& name) {
  try {
    return borrow(object);
  } catch (py::error_already_set& error) {
    if (!error.matches(PyExc_Exception)) throw;  // KeyboardInterrupt
    const std::string text = name.text() + ": the array cannot be read: " + reason(error);
    py::raise_from(error, PyExc_TypeError, text.c_str());
    throw py::error_already_set();
  } catch (const py::value_error& error) {
    throw py::value_error(name.text() + ": " + error.what());
  } catch (const py::builtin_exception& error) {
    throw py::type_error(name.text() + ": " + error.what());
  }
}

}  // namespace

std::string text_of(const std::int64_t* shape, std::int64_t ndim) {
  std::string text = "(";
  for (std::int64_t i = 0; i < ndim; ++i) text += (i > 0 ? ", " : "") + std::to_string(shape[i]);
  return text + (ndim == 1 ? ",)" : ")");
}

dlpack::DataType data_type(DType dtype) {
  switch (dtype) {
    case DType::f32:
      return {dlpack::kFloat, 32, 1};
    case DType::f64:
      return {dlpack::kFloat, 64, 1};
    case DType::bf16:
      return {dlpack::kBfloat, 16, 1};
    case DType::f16:
      break;
  }
  return {dlpack::kFloat, 16, 1};
}

std::string Name::text() const {
  std::string text = argument;
  if (index < 0) return text;
  text += "[" + std::to_string(index) + "]";
  if (parameter == nullptr) return text;
  return text + " (" + parameter + "_l" + std::to_string(layer) + (reverse ? "_reverse)" : ")");
}

Array::Array(py::handle object, const Name& name, Owners& owners) : name_(name) {
  Import import = borrow_named(object, name);
  const dlpack::Tensor& view = import.view;
  dtype_ = view.dtype;
  ndim_ = view.ndim;
  read_only_ = import.read_only;
  if (ndim_ > kMostAxes)
    complain("at most " + std::to_string(kMostAxes) + " axes",
             "shape " + text_of(view.shape, ndim_));
  std::copy(view.shape, view.shape + ndim_, shape_);
  std::int64_t count = 1;
  for (std::int64_t i = ndim_; i-- > 0;) {
    strides_[i] = view.strides != nullptr ? view.strides[i] : count;
    count *= shape_[i];
  }
  cuda_ = view.device.type == dlpack::kCUDA;
  cuda_device_ = cuda_ ? view.device.id : 0;
  if (!cuda_ && !on_host(view.device))
    complain("host or CUDA memory", "an array on " + device_name(view.device));
  data_ = static_cast<char*>(view.data) + view.byte_offset;
  if (count == 0) {
    data_ = nothing;
  } else if (reinterpret_cast<std::uintptr_t>(data_) % std::max(dtype_.bits / 8, 1) != 0) {
    complain("elements aligned to their size", "a misaligned array");
  }
  if (import.owner) owners.push_back(std::move(import.owner));
}

std::int64_t Array::size() const {
  std::int64_t size = 1;
  for (std::int64_t i = 0; i < ndim_; ++i) size *= shape_[i];
  return size;
}

bool Array::contiguous() const {
  std::int64_t size = 1;
  bool dense = true;
  for (std::int64_t i = ndim_; i-- > 0;) {
    dense = dense && (shape_[i] == 1 || strides_[i] == size);
    size *= shape_[i];
  }
  return dense || size == 0;
}

Array Array::member(std::int64_t index, std::int64_t members) const {
  if (ndim_ < 1 || shape_[0] != members)
    complain("a leading axis of " + std::to_string(members) + " members", shape_text());
  Array part = *this;
  if (data_ != nothing)
    part.data_ = static_cast<char*>(data_) + index * strides_[0] * (dtype_.bits / 8);
  part.ndim_ = ndim_ - 1;
  std::copy(shape_ + 1, shape_ + ndim_, part.shape_);
  std::copy(strides_ + 1, strides_ + ndim_, part.strides_);
  return part;
}

std::string Array::shape_text() const { return "shape " + text_of(shape_, ndim_); }

void Array::complain(const std::string& expected, const std::string& got) const {
  throw py::value_error(name_.text() + ": expected " + expected + ", got " + got);
}

const Array& Array::expect_dtype(dlpack::DataType dtype) const {
  if (!same(dtype_, dtype))
    throw py::type_error(name_.text() + ": expected dtype " + type_name(dtype) + ", got " +
                         type_name(dtype_));
  return *this;
}

Shape Array::shape() const {
  Shape shape;
  for (int axis = 0; axis < ndim_; ++axis) shape.sizes[shape.ndim++] = shape_[axis];
  return shape;
}

const Array& Array::expect_shape(const Shape& shape) const {
  if (ndim_ != shape.ndim || !std::equal(shape.begin(), shape.end(), shape_))
    complain("shape " + text_of(shape.sizes, shape.ndim), shape_text());
  return *this;
}

const Array& Array::expect_axes(std::int64_t ndim, const char* meaning) const {
  if (ndim_ != ndim) complain(meaning, shape_text());
  return *this;
}

const Array& Array::expect_contiguous() const {
  if (!contiguous())
    complain("a contiguous array", shape_text() + " with strides " + text_of(strides_, ndim_));
  return *this;
}

const Array& Array::expect_writable() const {
  if (read_only_) complain("an array to write to", "a read-only one");
  return *this;
}

std::string Array::memory_text() const {
  return cuda_ ? "memory of cuda:" + std::to_string(cuda_device_) : "host memory";
}

const Array& Array::expect_host() const {
  if (cuda_) complain("host memory", "an array on cuda:" + std::to_string(cuda_device_));
  return *this;
}

const Array& Array::expect_with(const Array& other) const {
  if (cuda_ != other.cuda_ || cuda_device_ != other.cuda_device_)
    complain(other.memory_text() + ", as " + other.name_.text() + " is in", memory_text());
  return *this;
}

}  // namespace fastrnn::bind
