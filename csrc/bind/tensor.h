// fastrnn.Tensor: a strided view of memory, with its owner. Everything fastrnn returns where no
// torch tensor went in.
//
// Strides count elements, as torch's and DLPack's do (NumPy's count bytes). Views share memory with
// their source, and each keeps it alive. Nothing here copies, except `__dlpack__(copy=True)` and
// NumPy itself.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "dtype.h"
#include "exchange.h"

namespace fastrnn::bind {

class Tensor {
 public:
  // Contiguous host memory, 64-byte aligned, contents undefined.
  static Tensor empty(std::vector<std::int64_t> shape, dlpack::DataType dtype);
  // Shares the memory of what was imported.
  explicit Tensor(Import import);

  const std::vector<std::int64_t>& shape() const { return shape_; }
  const std::vector<std::int64_t>& strides() const { return strides_; }
  std::int64_t ndim() const { return static_cast<std::int64_t>(shape_.size()); }
  std::int64_t size() const;  // elements
  std::int64_t itemsize() const { return dtype_.bits / 8; }
  dlpack::DataType dtype() const { return dtype_; }
  dlpack::Device device() const { return device_; }
  bool read_only() const { return read_only_; }
  void* data() const { return data_; }

  // As DLPack describes it; shape and strides belong to this tensor.
  dlpack::Tensor view();

  Tensor transpose(std::int64_t first, std::int64_t second) const;
  Tensor at(std::int64_t index) const;           // along the leading axis
  Tensor bits_as(dlpack::DataType dtype) const;  // the same bits, an element type of equal size
  Tensor copy() const;                           // contiguous, host tensors only

 private:
  Tensor() = default;

  std::shared_ptr<void> storage_;  // what keeps the memory alive
  void* data_ = nullptr;
  dlpack::DataType dtype_{};
  dlpack::Device device_{};
  std::vector<std::int64_t> shape_, strides_;
  bool read_only_ = false;
};

// The tensor behind a fastrnn.Tensor; null for any other object.
Tensor* as_tensor(py::handle object);

}  // namespace fastrnn::bind
