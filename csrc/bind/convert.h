// `_C.convert`: the elements of one array written to another of any floating type.
#pragma once

#include <pybind11/pybind11.h>

namespace fastrnn::bind {

void register_convert(pybind11::module_& module);

}  // namespace fastrnn::bind
