// The engine's view of an array of steps.
#pragma once

#include "argument.h"
#include "problem.h"

namespace fastrnn::bind {

// `step`: the axis of the steps; of packed data, which has one axis for steps and rows, of these.
inline Sequence sequence_of(const Array& array, int step) {
  const bool padded = array.ndim() == step + 3;
  return {array.data(), padded ? array.stride(step) : 0, array.stride(padded ? step + 1 : step),
          array.stride(padded ? step + 2 : step + 1)};
}

}  // namespace fastrnn::bind
