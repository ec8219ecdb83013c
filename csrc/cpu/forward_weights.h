// The weights of a layer in the order in which forward reads them.
//
// Layouts       weight_ih  [block][k][tile][gate][lane], k < I            (pack.h: gates)
//               weight_hh  [block][k][tile][gate][lane], k < O: the gates of a step's first
//                          product (all of them but in a reset-before GRU)
//               weight_hn  likewise, k < H, compute type: the gates of a reset-before GRU
//                          that multiply r∘h
//               weight_hr  [block of outputs][k][vector][lane], k < H, compute type: projection
//               bias_x     [block][tile][gate][lane] b_ih, plus b_hh where the cell adds both sides
//               bias_h     likewise, b_hh
// In place      weights that few rows are multiplied by are read in place (Layer::x_in_place,
//               h_in_place); the accessors return either form.
// Products      multiplied() and multiply_into(), of rows that are read where they are.
// Ownership     packed by all threads, a run of blocks each, into scratch or into Layer::packed.
#pragma once

#include "tiling.h"

namespace fastrnn::FASTRNN_ISA {

// Rows that products read where they are.
template <class E>
struct RowsInPlace {
  const E* const* rows = nullptr;

  RowsInPlace() = default;
  // Takes the memory of up to `count` rows of K units: none.
  FASTRNN_INLINE RowsInPlace(Arena& arena, Index count, Index K) {
    (void)arena, (void)count, (void)K;
  }
  // The next products' rows.
  FASTRNN_INLINE void take(const E* const* from, Index count, Index K) {
    (void)count, (void)K;
    rows = from;
  }
};

// acc + rows from j on · W for one block of weights, then added(sum, r, n) of each sum: a sum that
// started from a large number would round it anew at each product.
template <int R, int N, class F, class S, class C, class Added>
FASTRNN_INLINE Sums<R, N, C> multiplied(Vec<C> (&acc)[R][N], const RowsInPlace<F>& x, Index j,
                                        Index K, const BlockOfWeights<F, S>& w, Added added) {
  if (w.packed) {
    accumulate<R, N>(acc, x.rows + j, K, w.packed);
    add_each(acc, added);
    return Sums<R, N, C>(acc);
  }
  Sums<R, N, C> sums(acc);
  add_in_place<F, S>(sums.v[0], R, N, x.rows + j, K, w.in_place);
  add_each(sums.v, added);
  return sums;
}
template <int R, int N, class F, class S, class C>
FASTRNN_INLINE Sums<R, N, C> multiplied(Vec<C> (&acc)[R][N], const RowsInPlace<F>& x, Index j,
                                        Index K, const BlockOfWeights<F, S>& w) {
  if (w.packed) accumulate<R, N>(acc, x.rows + j, K, w.packed);
  Sums<R, N, C> sums(acc);
  if (!w.packed) add_in_place<F, S>(sums.v[0], R, N, x.rows + j, K, w.in_place);
  return sums;
}

// The same, stored one row after the other.
template <int R, int N, class F, class S, class C>
FASTRNN_INLINE void multiply_into(C* to, Vec<C> (&acc)[R][N], const RowsInPlace<F>& x, Index j,
                                  Index K, const BlockOfWeights<F, S>& w) {
  if (!w.packed) {
    const auto sums = multiplied(acc, x, j, K, w);
    __builtin_memcpy(to, sums.v, sizeof(sums.v));
    return;
  }
  accumulate<R, N>(acc, x.rows + j, K, w.packed);
#pragma GCC unroll 24
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 24
    for (int n = 0; n < N; ++n) acc[r][n].store(to + (r * N + n) * Vec<C>::lanes);
}

template <class Cell, class S>
class ForwardWeights : Tiling<Cell, S> {
  using K = Tiling<Cell, S>;
  using K::lanes, K::gates, K::tiles, K::vectors, K::units, K::first, K::wide;
  using typename K::C;

 public:
  using typename K::E;
  using FirstRows = RowsInPlace<E>;
  using SecondRows = RowsInPlace<C>;
  // Lays out the weights from `base`; a null base only counts the bytes. The parameters of a layer
  // that is already packed may be null.
  ForwardWeights(const Layer& layer, void* base)
      : layer_(layer),
        blocks_(ceil_div(layer.H, units)),
        out_blocks_(ceil_div(layer.O, wide * lanes)),
        block_ih_(whole_steps<E>(layer.I) * vectors * lanes),
        block_hh_(whole_steps<E>(layer.O) * first * tiles * lanes),
        block_hn_(layer.H * (gates - first) * tiles * lanes),
        block_hr_(layer.H * wide * lanes),
        packs_x_(layer.packed || !layer.x_in_place),
        packs_h_(layer.packed || !layer.h_in_place) {
    Arena arena(base);
    for (Index d = 0; d < layer.directions; ++d) {
      Group& g = group_[d];
      if (packs_x_) g.weight_ih = arena.take<E>(blocks_ * block_ih_);
      if (packs_h_) {
        g.weight_hh = arena.take<E>(blocks_ * block_hh_);
        if (K::two_products) g.weight_hn = arena.take<C>(blocks_ * block_hn_);
        if (layer.P) g.weight_hr = arena.take<C>(out_blocks_ * block_hr_);
      }
      g.bias_x = arena.take<C>(blocks_ * vectors * lanes);
      g.bias_h = arena.take<C>(blocks_ * vectors * lanes);
    }
    used_ = arena.used();
  }

  std::size_t used() const { return used_; }

  // Block b of direction d.
  BlockOfWeights<E, S> weight_ih(Index d, Index b) const {
    if (packs_x_) return {group_[d].weight_ih + b * block_ih_, {}};
    return {nullptr, {layer_.parameters[d].weight_ih, layer_.H, 0, gates, b * units}};
  }
  BlockOfWeights<E, S> weight_hh(Index d, Index b) const {
    if (packs_h_) return {group_[d].weight_hh + b * block_hh_, {}};
    return {nullptr, hidden_in_place(d, b, 0, first)};
  }
  BlockOfWeights<C, S> weight_hn(Index d, Index b) const {
    if (packs_h_) return {group_[d].weight_hn + b * block_hn_, {}};
    return {nullptr, hidden_in_place(d, b, first, gates - first)};
  }
  BlockOfWeights<C, S> weight_hr(Index d, Index b) const {
    if (packs_h_) return {group_[d].weight_hr + b * block_hr_, {}};
    return {nullptr, {layer_.parameters[d].weight_hr, layer_.O, 0, 1, b * wide * lanes}};
  }
  const C* bias_x(Index d, Index b) const { return group_[d].bias_x + b * vectors * lanes; }
  const C* bias_h(Index d, Index b) const { return group_[d].bias_h + b * vectors * lanes; }

  // Packs the thread's blocks. The biases are always copied.
  void pack(int thread, int threads) const {
    for (Index d = 0; d < layer_.directions; ++d) {
      const Range blocks = split(blocks_, thread, threads);
      for (Index b = blocks.begin; b < blocks.end; ++b) pack_input(d, b);
      if (!packs_h_) continue;
      for (Index b = blocks.begin; b < blocks.end; ++b) pack_hidden(d, b);
      const Range outs = split(layer_.P ? out_blocks_ : 0, thread, threads);
      for (Index b = outs.begin; b < outs.end; ++b) pack_projection(d, b);
    }
  }

 private:
  struct Group {
    E *weight_ih, *weight_hh;
    C *weight_hn, *weight_hr;
    C *bias_x, *bias_h;
  };

  BlockInPlace hidden_in_place(Index d, Index b, int begin, int count) const {
    return {layer_.parameters[d].weight_hh, layer_.H, begin, count, b * units};
  }

  void pack_hidden(Index d, Index b) const {
    const Weight& w = layer_.parameters[d].weight_hh;
    pack_gates<E, S>(group_[d].weight_hh + b * block_hh_, w, layer_.H, layer_.O, 0, first, tiles,
                     b * units);
    if constexpr (K::two_products)
      pack_gates<C, S>(group_[d].weight_hn + b * block_hn_, w, layer_.H, layer_.H, first,
                       gates - first, tiles, b * units);
  }

  void pack_input(Index d, Index b) const {
    const Parameters& p = layer_.parameters[d];
    const Group& g = group_[d];
    const Index unit = b * units;
    if (packs_x_)
      pack_gates<E, S>(g.weight_ih + b * block_ih_, p.weight_ih, layer_.H, layer_.I, 0, gates,
                       tiles, unit);
    for (Index v = 0; v < vectors; ++v)
      for (Index lane = 0; lane < lanes; ++lane) {
        const Index gate = v % gates, u = unit + v / gates * lanes + lane;
        const Index to = (b * vectors + v) * lanes + lane;
        const C input = bias(p.bias_ih, gate, u), hidden = bias(p.bias_hh, gate, u);
        g.bias_x[to] = Cell::separate[gate] ? input : input + hidden;
        g.bias_h[to] = hidden;
      }
  }

  C bias(const Weight& w, Index gate, Index u) const {
    if (!w.data || u >= layer_.H) return C(0);
    return widen(static_cast<const S*>(w.data)[(gate * layer_.H + u) * w.unit]);
  }

  // W_hr [P, H]: its rows are the outputs, so it packs as one gate.
  void pack_projection(Index d, Index b) const {
    pack_gates<C, S>(group_[d].weight_hr + b * block_hr_, layer_.parameters[d].weight_hr, layer_.O,
                     layer_.H, 0, 1, wide, b * wide * lanes);
  }

  const Layer& layer_;
  const Index blocks_, out_blocks_;
  const Index block_ih_, block_hh_, block_hn_, block_hr_;  // elements of one block
  const bool packs_x_, packs_h_;
  Group group_[2] = {};
  std::size_t used_ = 0;
};

}  // namespace fastrnn::FASTRNN_ISA
