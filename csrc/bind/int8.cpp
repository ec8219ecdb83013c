#include "int8.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <utility>

#include "backend.h"
#include "call.h"
#include "cpu/isa.h"
#include "cpu/openmp.h"
#include "dtype.h"
#include "memory.h"
#include "quantize.h"
#include "register.h"
#include "tensor.h"

namespace fastrnn::bind {
namespace {

constexpr dlpack::DataType kInt8{dlpack::kInt, 8, 1}, kByte{dlpack::kUInt, 8, 1};

std::string kind_of(const Options& o) {
  return std::string(cpu_int8_isa()) + " " + o.cell + (o.maths.reset_after ? "" : " reset-before") +
         " layers " + std::to_string(o.layers) + " directions " + std::to_string(o.directions) +
         " proj_size " + std::to_string(o.proj_size);
}

// Of an int8 stack of these sizes, with what packing reads.
Problem sized(const Options& options, std::int64_t I, std::int64_t H) {
  Problem p;
  p.options = options;
  p.options.int8 = true;
  p.T = p.B = 1;
  p.I = I;
  p.H = H;
  p.threads = openmp::max_threads();
  return p;
}

py::tuple quantize(py::handle weight) {
  Owners owners;
  const Array a(weight, {"weight"}, owners);
  a.expect_host().expect_dtype(data_type(DType::f32)).expect_axes(2, "two axes");
  const std::int64_t rows = a.shape(0), K = a.shape(1);
  Tensor values = Tensor::empty({rows, K}, kInt8);
  Tensor scale = Tensor::empty({rows}, data_type(DType::f32));
  quantize_rows({a.data(), a.stride(0), a.stride(1)}, rows, K,
                static_cast<std::int8_t*>(values.data()), static_cast<float*>(scale.data()));
  return py::make_tuple(std::move(values), std::move(scale));
}

// Of one layer and direction, in the order of the flat list: each matrix followed by its scales.
struct Kind {
  const char* name;
  Weight Parameters::* member;
  bool matrix;
  std::int64_t rows, columns;
};

std::vector<Kind> kinds_of(const Problem& p, std::int64_t gates, std::int64_t layer, bool biases) {
  const std::int64_t P = p.options.proj_size, out = P > 0 ? P : p.H, rows = gates * p.H;
  std::vector<Kind> kinds = {
      {"weight_ih", &Parameters::weight_ih, true, rows,
       layer == 0 ? p.I : p.options.directions * out},
      {"weight_hh", &Parameters::weight_hh, true, rows, out},
  };
  if (biases) {
    kinds.push_back({"bias_ih", &Parameters::bias_ih, false, rows, 1});
    kinds.push_back({"bias_hh", &Parameters::bias_hh, false, rows, 1});
  }
  if (P > 0) kinds.push_back({"weight_hr", &Parameters::weight_hr, true, P, p.H});
  return kinds;
}

// The flat list read or made, one array after the other: next(name, dtype, shape) gives it.
template <class Next>
std::vector<Parameters> each_array(const Problem& p, std::int64_t gates, bool biases, Next next) {
  std::vector<Parameters> all;
  for (std::int64_t group = 0; group < p.options.layers * p.options.directions; ++group) {
    const std::int64_t layer = group / p.options.directions;
    const bool reverse = group % p.options.directions == 1;
    Parameters parameters;
    for (const Kind& kind : kinds_of(p, gates, layer, biases)) {
      Weight& w = parameters.*kind.member;
      const Name name{"weights", -1, kind.name, layer, reverse};
      if (!kind.matrix) {
        w = {next(name, data_type(DType::f32), Shape{kind.rows}), 0, 1};
        continue;
      }
      w = {next(name, kInt8, Shape{kind.rows, kind.columns}), kind.columns, 1};
      w.scale = static_cast<float*>(next(name, data_type(DType::f32), Shape{kind.rows}));
    }
    all.push_back(parameters);
  }
  return all;
}

Tensor pack_int8(const CheckedOptions& checked, std::int64_t I, std::int64_t H, py::handle weights,
                 bool biases) {
  const List list(weights, "weights");
  Problem p = sized(checked.options, I, H);
  expect_int8_columns(I, H, p.options.layers, p.options.directions);
  Owners owners;
  std::int64_t at = 0;
  const auto next = [&](Name name, dlpack::DataType dtype, const Shape& shape) {
    if (at == list.size())
      throw py::value_error("weights: expected more arrays, got " + std::to_string(at));
    name.index = at;
    const Array a(list[at++], name, owners);
    return a.expect_host().expect_dtype(dtype).expect_shape(shape).expect_contiguous().data();
  };
  const std::vector<Parameters> parameters = each_array(p, checked.traits.gates, biases, next);
  if (at != list.size())
    throw py::value_error("weights: expected " + std::to_string(at) + " arrays, got " +
                          std::to_string(list.size()));
  p.parameters = parameters.data();
  const auto bytes = static_cast<std::int64_t>(cpu_backend().packed_size(p));
  Int8Header header{{}, I, H, biases, bytes};
  std::snprintf(header.kind, sizeof(header.kind), "%s", kind_of(p.options).c_str());
  const auto all = static_cast<std::int64_t>(sizeof(header)) + bytes;
  Tensor packed = Tensor::empty({all}, kByte);
  ask_for_large_pages(packed.data(), static_cast<std::size_t>(all));
  std::memset(packed.data(), 0, static_cast<std::size_t>(all));  // gaps too, for equal files
  std::memcpy(packed.data(), &header, sizeof(header));
  cpu_backend().pack(p, static_cast<char*>(packed.data()) + sizeof(header));
  return packed;
}

py::list unpack_int8(const CheckedOptions& checked, py::handle packed) {
  Owners owners;
  const Array a(packed, {"packed"}, owners);
  const Int8Header header = Int8Header::of(a, checked.options);
  Problem p = sized(checked.options, header.input_size, header.hidden_size);
  py::list list;
  const auto next = [&](const Name&, dlpack::DataType dtype, const Shape& shape) {
    Tensor made = Tensor::empty({shape.begin(), shape.end()}, dtype);
    void* const data = made.data();
    list.append(py::cast(std::move(made)));
    return data;
  };
  const std::vector<Parameters> parameters =
      each_array(p, checked.traits.gates, header.biases != 0, next);
  p.parameters = parameters.data();
  p.packed = Int8Header::weights(a);
  cpu_backend().unpack(p);
  return list;
}

}  // namespace

Int8Header Int8Header::of(const Array& packed, const Options& options) {
  packed.expect_host().expect_dtype(kByte).expect_axes(1, "one axis").expect_contiguous();
  Int8Header header{};
  if (packed.bytes() < sizeof(header)) packed.complain("packed int8 weights", "too few bytes");
  std::memcpy(&header, packed.data(), sizeof(header));
  const std::string kind = kind_of(options);
  if (std::strncmp(header.kind, kind.c_str(), sizeof(header.kind)) != 0) {
    header.kind[sizeof(header.kind) - 1] = '\0';
    packed.complain("weights packed for '" + kind +
                        "' (quantise, or load the state dict, on the machine that runs them)",
                    "'" + std::string(header.kind) + "'");
  }
  if (packed.bytes() != sizeof(header) + static_cast<std::size_t>(header.bytes))
    packed.complain(std::to_string(header.bytes) + " bytes after the header",
                    std::to_string(packed.bytes() - sizeof(header)));
  return header;
}

Int8Parameters::Int8Parameters(const Problem& p) {
  const std::int64_t gates = cell_traits(p.options).gates;
  for (std::int64_t g = 0; g < p.options.layers * p.options.directions; ++g) {
    Parameters parameters = p.parameters[g];
    for (const Kind& kind : kinds_of(p, gates, g / p.options.directions, false)) {
      values_.emplace_back(static_cast<std::size_t>(kind.rows * kind.columns));
      scales_.emplace_back(static_cast<std::size_t>(kind.rows));
      Weight& w = parameters.*kind.member;
      quantize_rows(w, kind.rows, kind.columns, values_.back().data(), scales_.back().data());
      w = {values_.back().data(), kind.columns, 1, 0, scales_.back().data()};
    }
    parameters_.push_back(parameters);
  }
}

void expect_int8_columns(std::int64_t input_size, std::int64_t hidden_size, std::int64_t layers,
                         std::int64_t directions) {
  const std::int64_t widest = std::max(input_size, hidden_size * (layers > 1 ? directions : 1));
  if (widest > kMostInt8Products)
    throw py::value_error("weights: int8 takes at most " + std::to_string(kMostInt8Products) +
                          " columns, got " + std::to_string(widest));
}

void register_int8(py::module_& module) {
  using py::arg;
  module.def("quantize", quantize, arg("weight"));
  module.def("pack_int8", pack_int8, arg("options"), arg("input_size"), arg("hidden_size"),
             arg("weights"), arg("biases"));
  module.def("unpack_int8", unpack_int8, arg("options"), arg("packed"));
}

}  // namespace fastrnn::bind
