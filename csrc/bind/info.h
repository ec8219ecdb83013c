// What this build is and what it found: `_C.isa`, `isas`, `max_threads`, `cuda_info`,
// `cuda_kernels`; and what the machine can do at most: `fma_peak`, `read_bandwidth`.
#pragma once

#include <pybind11/pybind11.h>

namespace fastrnn::bind {

void register_info(pybind11::module_& module);

}  // namespace fastrnn::bind
