// The stand-ins of a traced step (python/fastrnn/program/trace.py): what torch calls for each use.
#pragma once

#include <pybind11/pybind11.h>

namespace fastrnn::bind {

void register_stand_in(pybind11::module_& module);

}  // namespace fastrnn::bind
