#include "options.h"

#include <cstddef>
#include <cstdint>
#include <string>

#include "register.h"

namespace py = pybind11;

namespace fastrnn::bind {
namespace {

// In the order of the enumerators.
constexpr const char* kActivations[] = {"tanh", "relu", "sigmoid", "identity"};
constexpr const char* kGateActivations[] = {"sigmoid", "hardsigmoid"};

template <class Enum, std::size_t count>
Enum named(const char* argument, const char* const (&names)[count], const std::string& name) {
  std::string known;
  for (std::size_t i = 0; i < count; ++i) {
    if (name == names[i]) return static_cast<Enum>(i);
    known += (i > 0 ? ", '" : "'") + std::string(names[i]) + "'";
  }
  throw py::value_error(std::string(argument) + ": expected one of " + known + ", got '" + name +
                        "'");
}

void expect_at_least(const char* argument, std::int64_t least, std::int64_t value) {
  if (value < least)
    throw py::value_error(std::string(argument) + ": expected " + std::to_string(least) +
                          " or more, got " + std::to_string(value));
}

CheckedOptions make_options(const std::string& cell, std::int32_t num_layers, bool bidirectional,
                            std::int64_t proj_size, const std::string& activation,
                            const std::string& gate_activation, bool reset_after,
                            std::int64_t heads, bool recompute, bool int8) {
  CheckedOptions checked;
  Options& options = checked.options;
  expect_at_least("num_layers", 1, num_layers);
  expect_at_least("proj_size", 0, proj_size);
  options.cell = cell;
  options.layers = num_layers;
  options.directions = bidirectional ? 2 : 1;
  options.proj_size = proj_size;
  options.maths.activation = named<Activation>("activation", kActivations, activation);
  options.maths.gate_activation =
      named<GateActivation>("gate_activation", kGateActivations, gate_activation);
  options.maths.reset_after = reset_after;
  options.recompute = recompute;
  options.int8 = int8;
  options.maths.heads = heads;
  checked.traits = cell_traits(options);  // throws for an unknown cell
  expect_at_least("heads", 1, heads);
  if (proj_size % heads != 0)
    throw py::value_error("heads: expected a divisor of proj_size, " + std::to_string(proj_size) +
                          ", got " + std::to_string(heads));
  return checked;
}

const char* activation_name(const CheckedOptions& self) {
  return kActivations[static_cast<std::size_t>(self.options.maths.activation)];
}

const char* gate_activation_name(const CheckedOptions& self) {
  return kGateActivations[static_cast<std::size_t>(self.options.maths.gate_activation)];
}

std::string repr(const CheckedOptions& self) {
  const CellOptions& maths = self.options.maths;
  const auto truth = [](bool value) { return value ? "True" : "False"; };
  return "Options(cell='" + self.options.cell +
         "', num_layers=" + std::to_string(self.options.layers) +
         ", bidirectional=" + truth(self.options.directions == 2) +
         ", proj_size=" + std::to_string(self.options.proj_size) + ", activation='" +
         activation_name(self) + "', gate_activation='" + gate_activation_name(self) +
         "', reset_after=" + truth(maths.reset_after) + ", heads=" + std::to_string(maths.heads) +
         ", recompute=" + truth(self.options.recompute) + ", int8=" + truth(self.options.int8) +
         ")";
}

}  // namespace

void register_options(py::module_& module) {
  using Self = const CheckedOptions&;
  py::class_<CheckedOptions>(module, "Options", py::is_final(),
                             "Everything about a stack that is not a size of the data. Immutable.")
      .def(py::init(&make_options), py::kw_only(), py::arg("cell"), py::arg("num_layers") = 1,
           py::arg("bidirectional") = false, py::arg("proj_size") = 0,
           py::arg("activation") = "tanh", py::arg("gate_activation") = "sigmoid",
           py::arg("reset_after") = true, py::arg("heads") = 1, py::arg("recompute") = false,
           py::arg("int8") = false)
      .def_property_readonly("cell", [](Self self) { return self.options.cell; })
      .def_property_readonly("num_layers", [](Self self) { return self.options.layers; })
      .def_property_readonly("bidirectional",
                             [](Self self) { return self.options.directions == 2; })
      .def_property_readonly("proj_size", [](Self self) { return self.options.proj_size; })
      .def_property_readonly("activation", activation_name)
      .def_property_readonly("gate_activation", gate_activation_name)
      .def_property_readonly("reset_after",
                             [](Self self) { return self.options.maths.reset_after; })
      .def_property_readonly("heads", [](Self self) { return self.options.maths.heads; })
      .def_property_readonly("recompute", [](Self self) { return self.options.recompute; })
      .def_property_readonly("int8", [](Self self) { return self.options.int8; })
      .def_property_readonly("gates", [](Self self) { return self.traits.gates; })
      .def_property_readonly("states", [](Self self) { return self.traits.states; })
      .def_property_readonly("saved_planes", [](Self self) { return self.traits.saved_planes; })
      .def("__repr__", repr);
}

}  // namespace fastrnn::bind
