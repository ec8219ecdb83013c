// What both passes of a layer share: the sizes that a cell and a storage type fix at compile time,
// and access to the rows of a layer's arrays.
#pragma once

#include "layer.h"
#include "pack.h"

namespace fastrnn::FASTRNN_ISA {

constexpr int kWide = 4;  // vectors of a block of columns

// How the micro-kernel tiles a layer of this cell and storage type.
template <class Cell_, class S_>
struct Tiling {
  using Cell = Cell_;
  using S = S_;                           // storage
  using C = typename ComputeOf<S>::type;  // of sums, cells and saved values
  using E = typename FactorOf<S>::type;   // of the factors of forward's products
  using V = Vec<C>;
  static constexpr int lanes = V::lanes;
  static constexpr int gates = Cell::gates;
  static constexpr int tiles = tiles_per_block(gates);
  static constexpr int vectors = gates * tiles;
  static constexpr int rows = rows_per_block(vectors);
  static constexpr int units = tiles * lanes;  // hidden units of a block
  static constexpr int first = Cell::first_gates;
  static constexpr bool two_products = first != gates;
  static constexpr int wide = kWide;
  static constexpr int wide_rows = rows_per_block(wide);
};

// Element (t, i, 0) of a sequence array; i: a sorted row (steps.h).
template <class S>
FASTRNN_INLINE S* at(const Sequence& a, const Steps& steps, Index t, Index i) {
  return static_cast<S*>(a.data) + steps.position[t] * a.step + steps.order[i] * a.row;
}

// Loads one row of a state, padded with zeros; zeros where the state is absent.
template <class S, class T>
void load_state(T* to, const State& state, Index d, Index row, Index count) {
  const Index width = padded(count);
  for (Index u = state.data ? count : 0; u < width; ++u) to[u] = T{};
  if (state.data)
    gather(to, static_cast<const S*>(state.data) + d * state.group + row * state.row, state.unit,
           count);
}

// Values saved for a pair.
FASTRNN_INLINE Index saved_width(const Layer& layer, int planes) {
  return (planes + (layer.P ? 1 : 0)) * padded(layer.H);
}
template <class Cell>
FASTRNN_INLINE Index saved_width(const Layer& layer) {
  return saved_width(layer, Cell::saved);
}

// Entries of the tables of kernels. Work: a pass, or packed weights.
template <class Work>
std::size_t bytes_of(const Layer& layer) {
  return Work(layer, nullptr).used();
}
template <class Weights>
void pack_weights(const Layer& layer, int thread, int threads) {
  Weights(layer, layer.packed).pack(thread, threads);
}
template <class Pass>
void run_pass(const Layer& layer, int thread, int threads) {
  Pass(layer, layer.scratch).run(thread, threads);
}

}  // namespace fastrnn::FASTRNN_ISA
