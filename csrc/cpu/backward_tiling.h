// What the parts of a backward pass share: its tiling, the gradients of the gates, rows of
// operands, and the walk over all (step, row) pairs.
#pragma once

#include "tiling.h"

namespace fastrnn::FASTRNN_ISA {

// Backward's products have blocks of `wide` vectors of columns, whatever the number of gates.
template <class S>
struct ColumnTiling {
  using C = typename ComputeOf<S>::type;
  using V = Vec<C>;
  static constexpr int lanes = V::lanes;
  static constexpr int wide = kWide;
  static constexpr int rows = rows_per_block(wide);
  static constexpr int block_units = wide * lanes;

  // Vectors of block b that hold columns.
  static Index vectors_of(Index columns, Index b) {
    return least(wide, ceil_div(columns - b * block_units, lanes));
  }
};

template <class Cell, class S>
struct BackwardTiling : Tiling<Cell, S> {
  static constexpr int rows = ColumnTiling<S>::rows;
  static constexpr int block_units = ColumnTiling<S>::block_units;
  static_assert(Cell::gradients <= Cell::saved, "the gradients overwrite the saved values");
};

// What the products after the recurrence need to know of a cell. They are compiled once for all
// cells: their time is in loops over pairs and units, and compiling them takes long.
struct CellShape {
  int gates, first_gates, saved, gradients;
  const int *input_gradient, *hidden_gradient;  // by gate: its plane
  int operand;                                  // the saved plane that W_hn multiplies, if any

  template <class Cell>
  static constexpr CellShape of() {
    CellShape shape{Cell::gates,          Cell::first_gates,     Cell::saved, Cell::gradients,
                    Cell::input_gradient, Cell::hidden_gradient, -1};
    if constexpr (Cell::first_gates != Cell::gates) shape.operand = Cell::operand;
    return shape;
  }
};

// What the recurrence computes, for both directions: the gradients of the gates before their
// activation, and dh of a projected state.
template <class C>
struct GateGradients {
  C* d_gates[2] = {};  // [pairs][width], planes of Hp
  C* d_proj[2] = {};   // [pairs][Op]; null without projection
  Index width = 0;     // of a pair's row of d_gates

  C* row(Index d, Index n) const { return d_gates[d] + n * width; }
};

// A row of values: in storage with a stride, or in compute type. Neither: zeros.
template <class S>
struct Operand {
  const S* storage = nullptr;
  Index unit = 1;
  const typename ComputeOf<S>::type* compute = nullptr;
};

// A vector of a row from `column` on, zeros from `columns` on.
template <class S>
FASTRNN_INLINE Vec<typename ComputeOf<S>::type> operand_tile(const Operand<S>& row, Index column,
                                                             Index columns) {
  using C = typename ComputeOf<S>::type;
  using V = Vec<C>;
  const Index left = columns - column;
  if (left <= 0 || (!row.storage && !row.compute)) return V(0);
  if (row.compute) return load_units<C>(row.compute + column, left);
  if (row.unit == 1) return load_units<C>(row.storage + column, left);
  C lane[V::lanes] = {};
  for (Index u = 0; u < least(V::lanes, left); ++u)
    lane[u] = widen(row.storage[(column + u) * row.unit]);
  return V::load(lane);
}

// h before a step, in one direction.
template <class S>
struct PreviousHidden {
  const Layer& layer;
  Index d;
  Walk walk;
  const typename ComputeOf<S>::type* initial;  // [B][Op]

  FASTRNN_INLINE Operand<S> operator()(Index t, Index i) const {
    if (walk.starts_fresh(t, i)) return {nullptr, 1, nullptr};
    if (walk.first(t, i)) return {nullptr, 1, initial + i * padded(layer.O)};
    const Steps& steps = *layer.steps;
    return {at<const S>(layer.output, steps, walk.previous(t), i) + d * layer.O, 1, nullptr};
  }
};

// Whether the gradient of the layer's input is wanted.
FASTRNN_INLINE bool wants_input(const Layer& layer) { return layer.d_below || layer.d_input.data; }

// The pairs in the order of their numbers, from pair n on.
struct PairWalk {
  const Steps& steps;
  Index t = 0, i = 0;
  PairWalk(const Steps& s, Index n) : steps(s) {
    Index low = 0, high = s.T;  // the last step whose offset is at most n
    while (high - low > 1) {
      const Index middle = (low + high) / 2;
      (s.offset[middle] <= n ? low : high) = middle;
    }
    t = low;
    i = s.T > 0 ? n - s.offset[t] : 0;
    skip_empty();
  }
  void advance() {
    ++i;
    skip_empty();
  }

 private:
  void skip_empty() {
    while (t < steps.T && i >= steps.active[t]) {
      i -= steps.active[t];
      ++t;
    }
  }
};

}  // namespace fastrnn::FASTRNN_ISA
