// The gradient of a layer's input, after the recurrence.
//
// Maths         dx = Σ over directions and gates of da·W_ih, for every (step, row) pair
// Layouts       d_gates   backward_tiling.h: GateGradients
//               dx        to the layer below in compute type, [pairs][I], or to the caller's array
// Threads       the pairs are split: each thread computes whole rows of dx.
// Cost          D·G·H·I products a pair.
#pragma once

#include "backward_weights.h"

namespace fastrnn::FASTRNN_ISA {

template <class S>
class InputGradient : ColumnTiling<S> {
  using K = ColumnTiling<S>;
  using K::lanes, K::wide, K::block_units;
  using typename K::C, typename K::V;

 public:
  InputGradient(const Layer& layer, const CellShape& shape, const GateGradients<C>& gradients)
      : layer_(layer),
        steps_(*layer.steps),
        shape_(shape),
        gradients_(gradients),
        Hp_(padded(layer.H)) {}

  // The thread's part of some pairs. weights: the cell's BackwardWeights.
  template <class Weights>
  void run(const Weights& weights, const Range& pairs, int thread, int threads) const {
    const Range part = split(pairs.end - pairs.begin, thread, threads);
    const Range mine{pairs.begin + part.begin, pairs.begin + part.end};
    for (Index b = 0; b < weights.in_blocks(); ++b) {
      Columns<C> weight[2];
      for (Index d = 0; d < layer_.directions; ++d) weight[d] = weights.weight_ih(d, b);
      const Index vectors = K::vectors_of(layer_.I, b);
      if (vectors == 1)
        block<1>(mine, b, weight);
      else if (vectors == 2)
        block<2>(mine, b, weight);
      else
        block<wide>(mine, b, weight);
    }
  }

 private:
  template <int N>
  FASTRNN_NOINLINE void block(const Range& mine, Index b, const Columns<C> (&weight)[2]) const {
    PairWalk pair(steps_, mine.begin);
    // More than eight rows have more pointers than there are registers.
    constexpr int most_rows = rows_per_block(N) < 8 ? rows_per_block(N) : 8;
    in_blocks_of_rows<most_rows>(mine.end - mine.begin, [&](auto count, Index m) {
      constexpr int R = decltype(count)::value;
      V acc[R][N];
      clear(acc);
      if (layer_.d_input_before)
        for (int r = 0; r < R; ++r)
          for (int v = 0; v < N; ++v)
            acc[r][v] = other_direction(mine.begin + m + r, b * block_units + v * lanes);
      for (Index d = 0; d < layer_.directions; ++d)
        for (int gate = 0; gate < shape_.gates; ++gate) {
          const C* plane[R];
          for (int r = 0; r < R; ++r)
            plane[r] = gradients_.row(d, mine.begin + m + r) + shape_.input_gradient[gate] * Hp_;
          accumulate<R, N>(acc, plane, layer_.H, weight[d].at(gate * layer_.H), weight[d].stride);
        }
      const Sums<R, N, C> sums(acc);
      for (int r = 0; r < R; ++r, pair.advance())
        for (int v = 0; v < N; ++v)
          store(pair, mine.begin + m + r, b * block_units + v * lanes, sums.v[r][v]);
    });
  }

  // dx of the direction that ran before, where each direction is a layer of its own (recompute.h).
  V other_direction(Index n, Index unit) const {
    if (unit >= layer_.I) return V(0);
    return load_units<C>(static_cast<const C*>(layer_.d_input_before) + n * layer_.I + unit,
                         layer_.I - unit);
  }

  FASTRNN_NOINLINE void store(const PairWalk& pair, Index n, Index unit, V dx) const {
    if (unit >= layer_.I) return;
    if (layer_.d_below)
      store_units(dx, static_cast<C*>(layer_.d_below) + n * layer_.I + unit, layer_.I - unit);
    else
      store_units(dx, at<S>(layer_.d_input, steps_, pair.t, pair.i) + unit, layer_.I - unit);
  }

  const Layer& layer_;
  const Steps& steps_;
  const CellShape& shape_;
  const GateGradients<C>& gradients_;
  const Index Hp_;
};

}  // namespace fastrnn::FASTRNN_ISA
