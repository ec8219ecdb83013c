#include "convert.h"

#include "argument.h"
#include "dtype.h"
#include "gil.h"
#include "register.h"
#include "storage.h"

namespace py = pybind11;

namespace fastrnn::bind {
namespace {

using Index = std::int64_t;

double wide_of(double x) { return x; }
template <class S>
float wide_of(S x) {
  return widen(x);
}
void write(double x, double* to) { *to = x; }
template <class S>
void write(double x, S* to) {
  narrow(static_cast<float>(x), to);
}
void write(float x, double* to) { *to = x; }
template <class S>
void write(float x, S* to) {
  narrow(x, to);
}

template <class From, class To>
void convert_from(const From* from, To* to, const Array& source, const Array& target, int axis) {
  const Index count = source.shape(axis), step = source.stride(axis), place = target.stride(axis);
  const bool last = axis + 1 == source.ndim();
  for (Index i = 0; i < count; ++i, from += step, to += place) {
    if (last)
      write(wide_of(*from), to);
    else
      convert_from(from, to, source, target, axis + 1);
  }
}

// body(a null pointer to the element type)
template <class Body>
void with_type(dlpack::DataType type, Body body) {
  if (same(type, data_type(DType::f32))) return body(static_cast<float*>(nullptr));
  if (same(type, data_type(DType::f64))) return body(static_cast<double*>(nullptr));
  if (same(type, data_type(DType::bf16))) return body(static_cast<Bf16*>(nullptr));
  if (same(type, data_type(DType::f16))) return body(static_cast<F16*>(nullptr));
  throw py::type_error("convert: expected float32, float64, bfloat16 or float16, got " +
                       type_name(type));
}

void convert(py::handle from, py::handle to) {
  Owners owners;
  const Array source(from, Name{"source"}, owners), target(to, Name{"target"}, owners);
  source.expect_host();
  target.expect_host().expect_writable().expect_axes(source.ndim(), "the axes of source");
  for (int axis = 0; axis < source.ndim(); ++axis)
    if (source.shape(axis) != target.shape(axis))
      target.complain(std::to_string(source.shape(axis)) + " elements along axis " +
                          std::to_string(axis) + ", as in source",
                      std::to_string(target.shape(axis)));
  with_type(source.dtype(), [&](auto* s) {
    with_type(target.dtype(), [&](auto* t) {
      using From = std::remove_pointer_t<decltype(s)>;
      using To = std::remove_pointer_t<decltype(t)>;
      const WithoutGil without_gil;
      const auto* const first = static_cast<const From*>(source.data());
      auto* const result = static_cast<To*>(target.data());
      if (source.ndim() == 0)
        write(wide_of(*first), result);
      else
        convert_from(first, result, source, target, 0);
    });
  });
}

}  // namespace

void convert_rows(const void* from, dlpack::DataType from_type, Index row, Index unit, void* to,
                  dlpack::DataType to_type, Index rows, Index units) {
  with_type(from_type, [&](auto* s) {
    with_type(to_type, [&](auto* t) {
      auto* first = static_cast<const std::remove_pointer_t<decltype(s)>*>(from);
      auto* result = static_cast<decltype(t)>(to);
      for (Index b = 0; b < rows; ++b, first += row)
        for (Index u = 0; u < units; ++u) write(wide_of(first[u * unit]), result++);
    });
  });
}

void register_convert(py::module_& module) {
  module.def("convert", convert, py::arg("source"), py::arg("target"));
}

}  // namespace fastrnn::bind
