// One array argument of a call: borrowed, and checked against problem.h. Every error names the
// argument, what was expected and what it was.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <string>
#include <vector>

#include "dlpack.h"
#include "exchange.h"
#include "problem.h"

namespace fastrnn::bind {

// Of an argument; its text is built only for an error.
struct Name {
  const char* argument;
  std::int64_t index = -1;          // in a list of parameters
  const char* parameter = nullptr;  // "weight_ih", …
  std::int64_t layer = 0;
  bool reverse = false;

  std::string text() const;
};

inline constexpr int kMostAxes = 5;  // (members, L, T, B, units)

struct Shape {
  std::int64_t sizes[kMostAxes] = {};
  int ndim = 0;

  Shape() = default;
  Shape(std::initializer_list<std::int64_t> all) {
    for (const std::int64_t size : all) sizes[ndim++] = size;
  }
  const std::int64_t* begin() const { return sizes; }
  const std::int64_t* end() const { return sizes + ndim; }
};

// Keeps borrowed memory alive until the call is over. Empty where nothing needs it.
using Owners = std::vector<Owner>;

class Array {
 public:
  // TypeError where `object` is no array; ValueError where its memory is neither the host's nor a
  // CUDA device's.
  Array(py::handle object, const Name& name, Owners& owners);

  std::int64_t ndim() const { return ndim_; }
  std::int64_t shape(int axis) const { return shape_[axis]; }
  Shape shape() const;
  std::int64_t stride(int axis) const { return strides_[axis]; }
  void* data() const { return data_; }  // never null
  dlpack::DataType dtype() const { return dtype_; }
  std::int64_t size() const;  // elements
  std::size_t bytes() const { return static_cast<std::size_t>(size()) * (dtype_.bits / 8); }
  bool host() const { return !cuda_; }
  int cuda_device() const { return cuda_device_; }  // where not host()

  // The part of member `index` of `members`, without the leading axis. ValueError where that axis
  // has another size.
  Array member(std::int64_t index, std::int64_t members) const;

  // Each returns the array, so that checks can be chained.
  const Array& expect_dtype(dlpack::DataType dtype) const;  // TypeError
  const Array& expect_shape(const Shape& shape) const;      // ValueError, as all that follow
  const Array& expect_axes(std::int64_t ndim, const char* meaning) const;
  const Array& expect_contiguous() const;
  const Array& expect_writable() const;
  const Array& expect_host() const;
  const Array& expect_with(const Array& other) const;  // on the other's device

  [[noreturn]] void complain(const std::string& expected, const std::string& got) const;

 private:
  bool contiguous() const;
  std::string shape_text() const;
  std::string memory_text() const;

  Name name_;
  void* data_ = nullptr;
  dlpack::DataType dtype_{};
  std::int64_t ndim_ = 0;
  std::int64_t shape_[kMostAxes] = {};
  std::int64_t strides_[kMostAxes] = {};  // in elements
  bool read_only_ = false;
  bool cuda_ = false;
  int cuda_device_ = 0;
};

std::string text_of(const std::int64_t* shape, std::int64_t ndim);

dlpack::DataType data_type(DType dtype);

}  // namespace fastrnn::bind
