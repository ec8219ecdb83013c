// Arrays in: any object that describes its memory, without a copy.
//
// In this order: fastrnn.Tensor; the buffer protocol (NumPy: it alone says cheaply that an array is
// read-only); the DLPack C exchange API of the object's type (torch 2.10 and newer); `__dlpack__`,
// versioned or not; a capsule made by one.
#pragma once

#include <pybind11/pybind11.h>

#include <memory>
#include <string>

#include "dlpack.h"

namespace fastrnn::bind {

namespace py = pybind11;

// Keeps the memory of an array alive.
using Owner = std::unique_ptr<void, void (*)(void*)>;

// `view.shape` and `view.strides` belong to `owner`; strides may be null (contiguous).
struct Import {
  dlpack::Tensor view{};
  bool read_only = false;
  Owner owner{nullptr, nullptr};
};

// Valid for one call, while the caller holds `object`.
Import borrow(py::handle object);
// Valid while the owner lives.
Import keep(py::handle object);

// Whether the DLPack C exchange API is used (the default). Returns what it was.
bool set_fast_dlpack(bool on);

// An exporter's error message, its first line.
std::string reason(const py::error_already_set& error);

// TypeError "expected an array …, got …"
[[noreturn]] void refuse(py::handle object);

}  // namespace fastrnn::bind
