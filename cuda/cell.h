// The compile-time properties of a cell (csrc/cells/) in a form that device code can read: a static
// array of a class has no address there.
#pragma once

#include "cells/list.h"
#include "kernel.h"
#include "storage.h"
#include "value.h"

namespace fastrnn::cuda {

// Encodes small values with four bits for each gate.
template <class T, int count>
constexpr unsigned coded(const T (&values)[count]) {
  unsigned code = 0;
  for (int i = 0; i < count; ++i) code |= static_cast<unsigned>(values[i]) << (4 * i);
  return code;
}

template <class Cell_, class S_>
struct DeviceCell {
  using Cell = Cell_;
  using S = S_;
  using C = typename ComputeOf<S>::type;
  using V = Value<C>;
  static constexpr int gates = Cell::gates;
  static constexpr int first = Cell::first_gates;
  static constexpr bool two_products = first != gates;
  static constexpr unsigned input_code = coded(Cell::input_gradient);
  static constexpr unsigned hidden_code = coded(Cell::hidden_gradient);
  static constexpr unsigned separate_code = coded(Cell::separate);

  // The plane of the gates' gradients that a gate uses, for the input's and the state's gradient.
  static FASTRNN_CELL int input_plane(int gate) { return (input_code >> (4 * gate)) & 15; }
  static FASTRNN_CELL int hidden_plane(int gate) { return (hidden_code >> (4 * gate)) & 15; }
  // Whether a gate's product with h is kept separate from its projection.
  static FASTRNN_CELL bool separate(int gate) { return (separate_code >> (4 * gate)) & 1; }

  // The planes that the first product of a backward step reads: low … high − 1.
  static constexpr int low_plane() {
    int low = 15;
    for (int g = 0; g < first; ++g)
      low = Cell::hidden_gradient[g] < low ? Cell::hidden_gradient[g] : low;
    return low;
  }
  static constexpr int high_plane() {
    int high = 0;
    for (int g = 0; g < first; ++g)
      high = Cell::hidden_gradient[g] >= high ? Cell::hidden_gradient[g] + 1 : high;
    return high;
  }
  static constexpr int low = low_plane(), high = high_plane();
  static_assert(Cell::gradients <= Cell::saved, "the gradients overwrite the saved values");
};

// An element of a state; zero if the state is absent.
template <class S>
FASTRNN_CELL typename ComputeOf<S>::type state_value(const State& a, Index d, Index i, Index u) {
  if (!a.data) return 0;
  return widen(static_cast<const S*>(a.data)[d * a.group + i * a.row + u * a.unit]);
}

}  // namespace fastrnn::cuda
