// The weights of a layer in the order in which backward reads them: blocks of columns, since the
// gradients go through the transposed matrices.
//
// Layouts       weight_hh  [block of outputs][gate][k][vector][lane], k < H: the gates of a
//                          step's first product (all of them but in a reset-before GRU)
//               weight_hn  [block of units][k][vector][lane], k < (gates − first)·H:
//                          the gates of a reset-before GRU that multiply r∘h
//               weight_hr  [block of units][k][vector][lane], k < P: with projection
//               weight_ih  [block of inputs][gate][k][vector][lane], k < H
// In place      blocks of W_hh and W_ih that are whole vectors and used too seldom to repay packing
//               are read in place (Columns has a stride); storage of compute type alone.
// Ownership     packed by all threads, a run of blocks each, into scratch.
#pragma once

#include "backward_tiling.h"

namespace fastrnn::FASTRNN_ISA {

// A block of columns, for k = 0 …
template <class C>
struct Columns {
  const C* data;
  Index stride;  // between k
  FASTRNN_INLINE const C* at(Index k) const { return data + k * stride; }
};

template <class Cell, class S>
class BackwardWeights : BackwardTiling<Cell, S> {
  using K = BackwardTiling<Cell, S>;
  using K::gates, K::first, K::wide, K::rows, K::block_units;
  using typename K::C;

 public:
  explicit BackwardWeights(const Layer& layer)
      : layer_(layer),
        out_blocks_(ceil_div(layer.O, block_units)),
        hn_blocks_(K::two_products ? ceil_div(layer.H, block_units) : 0),
        hr_blocks_(layer.P ? ceil_div(layer.H, block_units) : 0),
        in_blocks_(ceil_div(layer.I, block_units)),
        block_hh_(first * layer.H * block_units),
        block_hn_((gates - first) * layer.H * block_units),
        block_hr_(layer.P * block_units),
        block_ih_(gates * layer.H * block_units) {}

  void lay_out(Arena& arena) {
    for (Index d = 0; d < layer_.directions; ++d) {
      Group& g = group_[d];
      g.weight_hh = arena.take<C>(out_blocks_ * block_hh_);
      g.weight_hn = arena.take<C>(hn_blocks_ * block_hn_);
      g.weight_hr = arena.take<C>(hr_blocks_ * block_hr_);
      g.weight_ih = wants_input(layer_) ? arena.take<C>(in_blocks_ * block_ih_) : nullptr;
    }
  }

  // Packs the thread's blocks.
  void pack(int thread, int threads) const {
    for (Index d = 0; d < layer_.directions; ++d) {
      pack_hidden(d, thread, threads);
      const Weight& w = layer_.parameters[d].weight_ih;
      const Range ins = split(wants_input(layer_) ? in_blocks_ : 0, thread, threads);
      for (Index b = ins.begin; b < ins.end; ++b)
        if (!in_place(w, input_uses(), b, layer_.I))
          pack_columns<wide, C, S>(group_[d].weight_ih + b * block_ih_, w, 0, gates * layer_.H,
                                   b * block_units, layer_.I);
    }
  }

  Index out_blocks() const { return out_blocks_; }
  Index in_blocks() const { return in_blocks_; }

  // Block b of direction d.
  Columns<C> weight_hh(Index d, Index b) const {
    return columns(layer_.parameters[d].weight_hh, group_[d].weight_hh + b * block_hh_,
                   hidden_uses(), b, layer_.O);
  }
  const C* weight_hn(Index d, Index b) const { return group_[d].weight_hn + b * block_hn_; }
  const C* weight_hr(Index d, Index b) const { return group_[d].weight_hr + b * block_hr_; }
  Columns<C> weight_ih(Index d, Index b) const {
    return columns(layer_.parameters[d].weight_ih, group_[d].weight_ih + b * block_ih_,
                   input_uses(), b, layer_.I);
  }

 private:
  struct Group {
    C *weight_hh, *weight_hn, *weight_hr, *weight_ih;
  };

  void pack_hidden(Index d, int thread, int threads) const {
    const Group& g = group_[d];
    const Parameters& p = layer_.parameters[d];
    const Range outs = split(out_blocks_, thread, threads);
    for (Index b = outs.begin; b < outs.end; ++b)
      if (!in_place(p.weight_hh, hidden_uses(), b, layer_.O))
        pack_columns<wide, C, S>(g.weight_hh + b * block_hh_, p.weight_hh, 0, first * layer_.H,
                                 b * block_units, layer_.O);
    const Range operands = split(hn_blocks_, thread, threads);
    for (Index b = operands.begin; b < operands.end; ++b)
      pack_columns<wide, C, S>(g.weight_hn + b * block_hn_, p.weight_hh, first * layer_.H,
                               (gates - first) * layer_.H, b * block_units, layer_.H);
    const Range projected = split(hr_blocks_, thread, threads);
    for (Index b = projected.begin; b < projected.end; ++b)
      pack_columns<wide, C, S>(g.weight_hr + b * block_hr_, p.weight_hr, 0, layer_.P,
                               b * block_units, layer_.H);
  }

  // How often a pass reads a block of W_hh, and of W_ih.
  Index hidden_uses() const {
    return (layer_.steps->T + 1) * ceil_div(layer_.steps->B, Index{rows});
  }
  Index input_uses() const { return ceil_div(layer_.steps->pairs, Index{rows}); }

  static bool in_place(const Weight& w, Index uses, Index b, Index columns) {
    constexpr Index kFewUses = 4;
    return sizeof(S) == sizeof(C) && w.unit == 1 && uses <= kFewUses &&
           (b + 1) * block_units <= columns;
  }

  FASTRNN_INLINE static Columns<C> columns(const Weight& w, const C* packed, Index uses, Index b,
                                           Index count) {
    if constexpr (sizeof(S) == sizeof(C))
      if (in_place(w, uses, b, count))
        return {static_cast<const C*>(w.data) + b * block_units, w.row};
    return {packed, block_units};
  }

  const Layer& layer_;
  const Index out_blocks_, hn_blocks_, hr_blocks_, in_blocks_;
  const Index block_hh_, block_hn_, block_hr_, block_ih_;  // elements of one block
  Group group_[2] = {};
};

}  // namespace fastrnn::FASTRNN_ISA
