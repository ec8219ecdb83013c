// The weights of a layer in the order in which backward reads them: blocks of columns, since the
// gradients go through the transposed matrices.
//
// Layouts       weight_hh  [head · block of outputs][gate][k][vector][lane], k < H / heads: the
//                          gates of a step's first product (all of them but in a reset-before GRU)
//               weight_hn  [head · block of units][k][vector][lane], k < (gates − first)·H / heads:
//                          the gates of a reset-before GRU that multiply r∘h
//               weight_hr  [block of units][k][vector][lane], k < P: with projection
//               weight_ih  [block of inputs][gate][k][vector][lane], k < H
// In place      blocks of W_hh and W_ih that are whole vectors and used too seldom to repay packing
//               are read where they are (Columns has a stride); storage of compute type alone.
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
        heads_(layer.maths.heads),
        head_units_(layer.H / heads_),
        head_outputs_(layer.O / heads_),
        head_out_blocks_(ceil_div(head_outputs_, block_units)),
        head_unit_blocks_(ceil_div(head_units_, block_units)),
        hr_blocks_(layer.P ? ceil_div(layer.H, block_units) : 0),
        in_blocks_(ceil_div(layer.I, block_units)),
        block_hh_(first * head_units_ * block_units),
        block_hn_((gates - first) * head_units_ * block_units),
        block_hr_(layer.P * block_units),
        block_ih_(gates * layer.H * block_units) {}

  void lay_out(Arena& arena) {
    for (Index d = 0; d < layer_.directions; ++d) {
      Group& g = group_[d];
      g.weight_hh = arena.take<C>(out_blocks() * block_hh_);
      g.weight_hn = arena.take<C>(hn_blocks() * block_hn_);
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

  Index head_out_blocks() const { return head_out_blocks_; }
  Index out_blocks() const { return heads_ * head_out_blocks_; }  // of the outputs of all heads
  Index hn_blocks() const { return K::two_products ? heads_ * head_unit_blocks_ : 0; }
  Index in_blocks() const { return in_blocks_; }

  // Block b of direction d.
  Columns<C> weight_hh(Index d, Index b) const {
    const C* packed = group_[d].weight_hh + b * block_hh_;
    const Weight& w = layer_.parameters[d].weight_hh;
    if (heads_ == 1) return columns(w, packed, hidden_uses(), b, layer_.O);
    return columns(head_of(w, b / head_out_blocks_, sizeof(S)), packed, hidden_uses(),
                   b % head_out_blocks_, head_outputs_);
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
    const Range outs = split(out_blocks(), thread, threads);
    for (Index b = outs.begin; b < outs.end; ++b) {
      const Index in_head = b % head_out_blocks_;
      const Weight w = head_of(p.weight_hh, b / head_out_blocks_, sizeof(S));
      if (!in_place(w, hidden_uses(), in_head, head_outputs_))
        pack_columns<wide, C, S>(g.weight_hh + b * block_hh_, w, 0, first * head_units_,
                                 in_head * block_units, head_outputs_);
    }
    const Range operands = split(hn_blocks(), thread, threads);
    for (Index b = operands.begin; b < operands.end; ++b)
      pack_columns<wide, C, S>(g.weight_hn + b * block_hn_,
                               head_of(p.weight_hh, b / head_unit_blocks_, sizeof(S)),
                               first * head_units_, (gates - first) * head_units_,
                               b % head_unit_blocks_ * block_units, head_units_);
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
  const Index heads_, head_units_, head_outputs_;
  const Index head_out_blocks_, head_unit_blocks_, hr_blocks_, in_blocks_;
  const Index block_hh_, block_hn_, block_hr_, block_ih_;  // elements of one block
  Group group_[2] = {};
};

}  // namespace fastrnn::FASTRNN_ISA
