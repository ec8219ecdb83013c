// `_C.convert`: the elements of one array written to another of any floating type.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

#include "dlpack.h"

namespace fastrnn::bind {

// Converts rows of `units` elements, `unit` apart, to contiguous rows; any floating types.
void convert_rows(const void* from, dlpack::DataType from_type, std::int64_t row, std::int64_t unit,
                  void* to, dlpack::DataType to_type, std::int64_t rows, std::int64_t units);

}  // namespace fastrnn::bind
