// Each adds its part to the module: `module.cpp` calls them all.
#pragma once

#include <pybind11/pybind11.h>

namespace fastrnn::bind {

void register_tensor(pybind11::module_& module);
void register_options(pybind11::module_& module);
void register_frozen(pybind11::module_& module);
void register_int8(pybind11::module_& module);
void register_calls(pybind11::module_& module);
void register_torch(pybind11::module_& module);
void register_stream(pybind11::module_& module);
void register_stand_in(pybind11::module_& module);
void register_program(pybind11::module_& module);
void register_convert(pybind11::module_& module);
void register_info(pybind11::module_& module);

}  // namespace fastrnn::bind
