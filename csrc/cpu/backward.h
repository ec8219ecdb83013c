// One layer backward through time.
//
// Maths         csrc/cells/. The steps run in the reverse of forward's order. At each step the
//               gradient of h is the gradient of the output, plus the gradients of the next step's
//               gates through W_hhᵀ, plus what the cell carries past the product (a GRU's dh·z):
//                 dh_t = dy_t + Σ_gates da_{t+1}·W_hh + carried
//               The product and the cell's backward are one pass over a tile of hidden units. Only
//               the gradients of the gates are written. Those of the input and of the weights are
//               products over all (step, row) pairs afterwards (input_gradient.h,
//               weight_gradients.h).
// Two products  reset-before GRU: dn from dh, then d(r∘h) = dn·W_hn, then dr. Projection: dh of
//               size P first, then through W_hrᵀ to the hidden units.
// Layouts       weights   backward_weights.h
//               d_gates   [D][pairs][width]: planes of Hp as the cell's input_gradient and
//                         hidden_gradient say; over the saved values where the caller allows it
//                         (Layer::consume_saved)
//               d_out     [pairs][D·O], compute type: dy where it cannot be read in place
//               d_proj    [D][pairs][Op]: dh of a projected state
//               carried   [B][Op], d_c [B][Hp]
// Threads       share.h for the recurrence. Before it, blocks of weights and rows are split; after
//               it, pairs and tiles of the gradients.
// Cost          per step and row G·H·O products, and 4·G·H·O bytes of packed W_hh from the cache
//               for each block of rows.
#pragma once

#include <type_traits>

#include "input_gradient.h"
#include "share.h"
#include "weight_gradients.h"

namespace fastrnn::FASTRNN_ISA {

template <class Cell, class S>
class Backward : BackwardTiling<Cell, S> {
  using K = BackwardTiling<Cell, S>;
  using K::lanes, K::gates, K::first, K::wide, K::rows, K::block_units;
  using typename K::C;
  using typename K::V;
  using Operand = FASTRNN_ISA::Operand<S>;
  using Columns = FASTRNN_ISA::Columns<C>;
  static constexpr CellShape shape_ = CellShape::of<Cell>();

 public:
  Backward(const Layer& layer, void* base)
      : layer_(layer),
        steps_(*layer.steps),
        Hp_(padded(layer.H)),
        Op_(padded(layer.O)),
        saved_width_(saved_width<Cell>(layer)),
        blocks_(ceil_div(layer.H, block_units)),
        weights_(layer),
        weight_gradients_(layer, shape_) {
    Arena arena(base);
    const Index B = steps_.B, D = layer.directions, N = steps_.pairs;
    // Sums that the parts of a layer continue come first: their address must not depend on the size
    // of a part.
    weight_gradients_.lay_out_sums(arena);
    zeros_ = arena.take<C>(most(Hp_, Op_));
    d_out_ = reads_output_gradient() ? nullptr : arena.take<C>(N * D * layer.O);
    weights_.lay_out(arena);
    gradients_.width = layer.consume_saved ? saved_width_ : Cell::gradients * Hp_;
    for (Index d = 0; d < D; ++d) {
      Group& g = group_[d];
      g.initial = arena.take<C>(B * Op_);
      g.initial_c = Cell::states > 1 ? arena.take<C>(B * Hp_) : nullptr;
      g.d_h_n = arena.take<C>(B * Op_);
      g.carried = Cell::carries ? arena.take<C>(B * Op_) : nullptr;
      g.d_c = Cell::states > 1 ? arena.take<C>(B * Hp_) : nullptr;
      gradients_.d_gates[d] = layer.consume_saved
                                  ? static_cast<C*>(layer.saved) + d * layer.saved_group
                                  : arena.take<C>(N * gradients_.width);
      gradients_.d_proj[d] = layer.P ? arena.take<C>(N * Op_) : nullptr;
    }
    weight_gradients_.lay_out_slots(arena);
    next_rows_of_all_ = arena.take<const C*>(next_rows_count() * layer.plan.threads);
    used_ = arena.used();
  }

  std::size_t used() const { return used_; }

  void run(int thread, int threads) {
    const FlushSubnormals guard;
    const Plan& plan = threads == layer_.plan.threads ? layer_.plan : layer_.single;
    Barrier& all = layer_.barriers[0];
    next_rows_ = next_rows_of_all_ + thread * next_rows_count();
    prepare(thread, threads);
    all.wait(threads, Barrier::Wait::start);
    if (!layer_.parameters_alone) {
      run_directions(
          layer_, plan, thread,
          [&](Index d, const Share& share, Index done) {
            return steps_.T - recur(d, share, steps_.T - done);
          },
          [](const Plan&, int) {});
      all.wait(threads, Barrier::Wait::part);
    }
    finish(thread, threads);
  }

 private:
  struct Group {
    C *initial, *initial_c;  // h0 and c0
    C *d_h_n, *carried, *d_c;
  };

  // Whether dy can be read in place, a vector at a time.
  bool reads_output_gradient() const {
    if (layer_.d_hidden.data) return false;
    return layer_.d_above || !layer_.d_output.data || layer_.d_output.unit == 1;
  }

  Index next_rows_count() const { return steps_.B + rows; }

  // ---- before the last step ---------------------------------------------------------------------

  void prepare(int thread, int threads) {
    if (thread == 0)
      for (Index u = 0; u < most(Hp_, Op_); ++u) zeros_[u] = C(0);
    if (!layer_.parameters_alone) weights_.pack(thread, threads);
    const Range mine = split(steps_.B, thread, threads);
    for (Index i = mine.begin; i < mine.end; ++i) {
      for (Index d = 0; d < layer_.directions; ++d) boundary_states(d, i);
      if (steps_.padding && layer_.d_input.data) clear_padding(i);
    }
    const Range steps = split(reads_output_gradient() ? 0 : steps_.T, thread, threads);
    for (Index t = steps.begin; t < steps.end; ++t)
      for (Index i = 0; i < steps_.active[t]; ++i) gather_output(t, i);
  }

  // The states before a row's first step, and the gradients of those after its last.
  void boundary_states(Index d, Index i) {
    const Group& g = group_[d];
    const Index row = steps_.order[i], O = layer_.O, H = layer_.H;
    const bool started = i < layer_.rows_before, continues = i < layer_.rows_after;
    load_state<S>(g.initial + i * Op_, started ? layer_.h_before : layer_.h0, d, row, O);
    if (continues)
      gather(g.d_h_n + i * Op_, static_cast<const C*>(layer_.carry_h) + i * Op_, 1, Op_);
    else
      load_state<S>(g.d_h_n + i * Op_, layer_.d_h_n, d, row, O);
    if constexpr (Cell::states > 1) {
      if (started)
        load_state<C>(g.initial_c + i * Hp_, layer_.c_before, d, row, H);
      else
        load_state<S>(g.initial_c + i * Hp_, layer_.c0, d, row, H);
      if (continues)
        gather(g.d_c + i * Hp_, static_cast<const C*>(layer_.carry_c) + i * Hp_, 1, Hp_);
      else
        load_state<S>(g.d_c + i * Hp_, layer_.d_c_n, d, row, H);
    }
    if (steps_.length[i] == 0) {  // the final state is the initial one
      if (layer_.d_h0)
        scatter(static_cast<S*>(layer_.d_h0) + (d * layer_.rows + row) * O, g.d_h_n + i * Op_, O);
      if constexpr (Cell::states > 1)
        if (layer_.d_c0)
          scatter(static_cast<S*>(layer_.d_c0) + (d * layer_.rows + row) * H, g.d_c + i * Hp_, H);
    }
  }

  void clear_padding(Index i) {
    const S zero{};
    for (Index t = steps_.length[i]; t < steps_.T; ++t) {
      S* x = at<S>(layer_.d_input, steps_, t, i);
      for (Index u = 0; u < layer_.I; ++u) x[u] = zero;
    }
  }

  // dy of a pair: from the layer above or the caller, plus the caller's gradient of all states.
  void gather_output(Index t, Index i) {
    const Index n = steps_.offset[t] + i, count = layer_.directions * layer_.O;
    C* to = d_out_ + n * count;
    if (layer_.d_above) {
      gather(to, static_cast<const C*>(layer_.d_above) + n * layer_.d_above_width, 1, count);
    } else if (layer_.d_output.data) {
      gather(to, at<const S>(layer_.d_output, steps_, t, i), layer_.d_output.unit, count);
    } else {
      for (Index u = 0; u < count; ++u) to[u] = C(0);
    }
    if (layer_.d_hidden.data) {
      const S* from = at<const S>(layer_.d_hidden, steps_, t, i);
      for (Index u = 0; u < count; ++u) to[u] += widen(from[u * layer_.d_hidden.unit]);
    }
  }

  // ---- after the first step ---------------------------------------------------------------------

  // The gradients of the input and of the parameters. Where the gate gradients of a block of pairs
  // stay in a core's own cache, both are computed from them block by block.
  void finish(int thread, int threads) {
    constexpr Index kPairs = WeightGradients<S>::kPairs, kCached = 256 << 10;
    const InputGradient<S> input(layer_, shape_, gradients_);
    const Index block_bytes = kPairs * gradients_.width * static_cast<Index>(sizeof(C));
    const bool wants = wants_input(layer_) && !layer_.parameters_alone;
    const bool together = layer_.d_parameters && block_bytes <= kCached;
    if (wants && !together) input.run(weights_, {0, steps_.pairs}, thread, threads);
    for (Index d = 0; layer_.d_parameters && d < layer_.directions; ++d)
      for (Index n = 0; n == 0 || n < steps_.pairs; n += kPairs) {
        const Range pairs{n, least(n + kPairs, steps_.pairs)};
        if (wants && together && d == layer_.directions - 1)
          input.run(weights_, pairs, thread, threads);
        weight_gradients_.add(d, gradients_, previous_hidden(d), pairs, thread, threads);
      }
  }

  // ---- the steps --------------------------------------------------------------------------------

  struct Position {
    Index d, t;
    const Deal& deal;
    Walk walk;
  };

  bool reverse(Index d) const { return d == 1 || layer_.reverse; }

  const C* saved_row(const Position& p, Index i) const {
    return static_cast<const C*>(layer_.saved) + p.d * layer_.saved_group +
           (steps_.offset[p.t] + i) * saved_width_;
  }

  // Runs the steps before `end`, the last first. Returns the number of steps left: 0, or more where
  // a solo phase of the team begins or ends.
  Index recur(Index d, const Share& share, Index end) {
    const Deal deal(steps_, share, rows);
    const Range blocks = split(blocks_, share.column, share.columns);
    const Range outs = split(weights_.out_blocks(), share.column, share.columns);
    for (Index s = end - 1; s >= 0; --s) {
      if (share.resting > 0 && share.team->all_ready(share.resting)) return s + 1;
      const Walk walk{steps_, reverse(d)};
      const Position p{d, walk.step(s), deal, walk};
      const Index n = deal.count(steps_.active[p.t]);
      bool any = false;  // some row has a step after this one
      for (Index j = 0; j < n; ++j) {
        const Index i = deal.row(j);
        const bool cut = cut_after(p, i);
        next_rows_[j] = cut ? nullptr : gradients_.row(d, steps_.offset[walk.following(p.t)] + i);
        any |= !cut;
      }
      if (Cell::projects && layer_.P) {
        if constexpr (Cell::projects) projected_step(p, share, outs, blocks, n, any);
      } else {
        for (Index b = blocks.begin; b < blocks.end; ++b) hidden_step(p, b, n, any);
        if constexpr (K::two_products) {
          share.team->wait(share.columns);
          for (Index j = 0; j < n; ++j)
            next_rows_[j] = gradients_.row(d, steps_.offset[p.t] + deal.row(j)) +
                            Cell::hidden_gradient[first] * Hp_;
          for (Index b = blocks.begin; b < blocks.end; ++b) operand_step(p, b, n);
        }
      }
      if (share.team->wait(share.columns) && share.may_shrink && s > 0) return s;
    }
    initial_gradients(d, deal, outs, blocks);
    return 0;
  }

  // acc = Σ da·W_hh over the gates of the first product and the hidden units. d_gates: the
  // gradients of the next step; null: zeros.
  template <int R, int N>
  FASTRNN_INLINE void through_weights(V (&acc)[R][N], const C* const* d_gates, const Columns& w) {
    for (int gate = 0; gate < first; ++gate) {
      const C* plane[R];
      for (int r = 0; r < R; ++r)
        plane[r] = (d_gates[r] ? d_gates[r] + Cell::hidden_gradient[gate] * Hp_ : zeros_);
      accumulate(acc, plane, layer_.H, w.at(gate * layer_.H), w.stride);
    }
  }

  // dh of a tile: the gradient from the next step (at the last step d_h_n), then dy. Added in this
  // order, a sequence run in chunks gives the same bits: the d_h_n of a chunk is the d_h0 of the
  // next.
  FASTRNN_INLINE V hidden_gradient(const Group& g, const Operand& dy, Index i, Index unit,
                                   V product, bool last, bool cut) const {
    V dh = product;
    if (last)
      dh = V::load(g.d_h_n + i * Op_ + unit);
    else if (Cell::carries && !cut && !layer_.P)
      dh = dh + V::load(g.carried + i * Op_ + unit);
    return dh + operand_tile(dy, unit, layer_.O);
  }

  // dy of a pair.
  FASTRNN_INLINE Operand output_gradient(const Position& p, Index i) const {
    const Index n = steps_.offset[p.t] + i, column = p.d * layer_.O;
    if (d_out_) return {nullptr, 1, d_out_ + n * layer_.directions * layer_.O + column};
    if (layer_.d_above)
      return {nullptr, 1,
              static_cast<const C*>(layer_.d_above) + n * layer_.d_above_width + column};
    if (!layer_.d_output.data) return {nullptr, 1, nullptr};
    return {at<const S>(layer_.d_output, steps_, p.t, i) + p.d * layer_.O, 1, nullptr};
  }

  FASTRNN_INLINE PreviousHidden<S> previous_hidden(Index d) const {
    return {layer_, d, Walk{steps_, reverse(d)}, group_[d].initial};
  }

  // Block b of outputs, up to `limit`, for the thread's n rows, N vectors of it: sum(acc, j) adds
  // the products of the rows from j on, then done(j, unit, values, count) is called with the tiles
  // of row j.
  template <int N, class Sum, class Done>
  FASTRNN_INLINE void product_tiles(Index b, Index n, Index limit, Sum sum, Done done) {
    const Index unit = b * block_units, count = ColumnTiling<S>::vectors_of(limit, b);
    in_blocks_of_rows<rows>(n, [&](auto row_count, Index j) {
      constexpr int R = decltype(row_count)::value;
      V acc[R][N];
      clear(acc);
      sum(acc, j);
      const Sums<R, N, C> sums(acc);
      for (int r = 0; r < R; ++r) done(j + r, unit, sums.v[r], count);
    });
  }

  // product_tiles() of the next step's gradients through W_hh; zeros where no row has a next step.
  // ahead(j) runs for the rows of a product before it begins.
  template <int N, class Ahead, class Done>
  FASTRNN_INLINE void hidden_tiles(const Position& p, Index b, Index n, Index limit, bool any,
                                   Ahead ahead, Done done) {
    const Columns w = weights_.weight_hh(p.d, b);
    product_tiles<N>(
        b, n, limit,
        [&](auto& acc, Index j) FASTRNN_INLINE_LAMBDA {
          for (Index r = 0; r < Index{std::extent_v<std::remove_reference_t<decltype(acc)>>}; ++r)
            ahead(j + r);
          if (any) through_weights(acc, next_rows_ + j, w);
        },
        done);
  }

  void hidden_step(const Position& p, Index b, Index n, bool any) {
    // A narrow layer has one block, of which it may need half.
    if (ColumnTiling<S>::vectors_of(layer_.H, b) <= wide / 2)
      hidden_block<wide / 2>(p, b, n, any);
    else
      hidden_block<wide>(p, b, n, any);
  }

  template <int N>
  FASTRNN_NOINLINE void hidden_block(const Position& p, Index b, Index n, bool any) {
    hidden_tiles<N>(
        p, b, n, layer_.H, any,
        [&](Index j) FASTRNN_INLINE_LAMBDA { prefetch(p, p.deal.row(j), b * block_units); },
        [&](Index j, Index unit, const V* products, Index count) {
          cell_backward(p, p.deal.row(j), unit, products, count, !next_rows_[j], true);
        });
  }

  // Prefetches what cell_backward() reads of a block of a row, while the product runs.
  FASTRNN_INLINE void prefetch(const Position& p, Index i, Index unit) const {
    const auto prefetch_units = [&](const auto* from) FASTRNN_INLINE_LAMBDA {
      constexpr Index line = 64 / sizeof(*from);
      for (Index u = unit, end = least(unit + block_units, layer_.H); u < end; u += line)
        __builtin_prefetch(from + u);
    };
    for (int s = 0; s < Cell::saved; ++s) prefetch_units(saved_row(p, i) + s * Hp_);
    if constexpr (Cell::states > 1)
      if (!p.walk.first(p.t, i))
        prefetch_units(at<const C>(layer_.cell, steps_, p.walk.previous(p.t), i) + p.d * layer_.H);
    const Operand dy = output_gradient(p, i);
    if (dy.storage) prefetch_units(dy.storage);
    if (dy.compute) prefetch_units(dy.compute);
  }

  // dh of the projected size first, then through W_hr to the hidden units.
  void projected_step(const Position& p, const Share& share, const Range& outs, const Range& blocks,
                      Index n, bool any) {
    for (Index b = outs.begin; b < outs.end; ++b)
      hidden_tiles<wide>(
          p, b, n, layer_.O, any, [](Index) {},
          [&](Index j, Index unit, const V* products, Index count) {
            projected_row(p, p.deal.row(j), unit, products, count, !next_rows_[j]);
          });
    share.team->wait(share.columns);
    for (Index j = 0; j < n; ++j)
      next_rows_[j] = gradients_.d_proj[p.d] + (steps_.offset[p.t] + p.deal.row(j)) * Op_;
    for (Index b = blocks.begin; b < blocks.end; ++b) hidden_of_projected(p, b, n);
  }

  FASTRNN_NOINLINE void projected_row(const Position& p, Index i, Index unit, const V* products,
                                      Index count, bool cut) {
    const Group& g = group_[p.d];
    const Operand dy = output_gradient(p, i);
    const bool last = p.walk.last(p.t, i);
    C* to = gradients_.d_proj[p.d] + (steps_.offset[p.t] + i) * Op_;
    for (Index v = 0; v < count; ++v, unit += lanes)
      hidden_gradient(g, dy, i, unit, products[v], last, cut).store(to + unit);
  }

  void hidden_of_projected(const Position& p, Index b, Index n) {
    const C* w = weights_.weight_hr(p.d, b);
    product_tiles<wide>(
        b, n, layer_.H,
        [&](auto& acc, Index j)
            FASTRNN_INLINE_LAMBDA { accumulate(acc, next_rows_ + j, layer_.P, w); },
        [&](Index j, Index unit, const V* dh, Index count) {
          const Index i = p.deal.row(j);
          cell_backward(p, i, unit, dh, count, cut_after(p, i), false);
        });
  }

  // Whether no gradient comes from the next step: it belongs to another episode, or there is none.
  FASTRNN_INLINE bool cut_after(const Position& p, Index i) const {
    return p.walk.last(p.t, i) || p.walk.starts_fresh(p.walk.following(p.t), i);
  }

  // The cell's backward (with two products, its half before the second) on tiles of one row.
  // `incoming`: with `adds` the product's part of dh, to which dy and the rest are added; else dh.
  FASTRNN_NOINLINE void cell_backward(const Position& p, Index i, Index unit, const V* incoming,
                                      Index count, bool cut, bool adds) {
    const Group& g = group_[p.d];
    const Index n = steps_.offset[p.t] + i, left = layer_.H;
    const bool last = p.walk.last(p.t, i), fresh = p.walk.starts_fresh(p.t, i);
    const Operand dy = adds ? output_gradient(p, i) : Operand{};
    const Operand h = Cell::carries ? previous_hidden(p.d)(p.t, i) : Operand{};
    const C* keep = saved_row(p, i);
    C* to = gradients_.row(p.d, n);
    const C *c_before = nullptr, *c = nullptr;
    if constexpr (Cell::states > 1) {
      c = at<const C>(layer_.cell, steps_, p.t, i) + p.d * layer_.H;
      if (!fresh)
        c_before = p.walk.first(p.t, i)
                       ? g.initial_c + i * Hp_
                       : at<const C>(layer_.cell, steps_, p.walk.previous(p.t), i) + p.d * layer_.H;
    }
    for (Index v = 0; v < count; ++v, unit += lanes) {
      V saved[Cell::saved], previous[2], next[2], d_next[2], d_previous[2], d_a[Cell::gradients];
      for (int s = 0; s < Cell::saved; ++s) saved[s] = V::load(keep + s * Hp_ + unit);
      if constexpr (Cell::carries) previous[0] = operand_tile(h, unit, layer_.O);
      d_next[0] = adds ? hidden_gradient(g, dy, i, unit, incoming[v], last, cut) : incoming[v];
      C* d_c = nullptr;
      if constexpr (Cell::states > 1) {
        previous[1] = c_before ? load_units<C>(c_before + unit, left - unit) : V(0);
        next[1] = load_units<C>(c + unit, left - unit);
        d_c = g.d_c + i * Hp_ + unit;
        d_next[1] = cut && !last ? V(0) : V::load(d_c);
        if (layer_.d_cell.data) d_next[1] = d_next[1] + cell_gradient(p, i, unit);
      }
      if constexpr (K::two_products) {
        Cell::backward_second(layer_.maths, saved, previous, d_next, d_previous, d_a);
        for (int gate = 1; gate < gates; ++gate)
          d_a[Cell::hidden_gradient[gate]].store(to + Cell::hidden_gradient[gate] * Hp_ + unit);
      } else {
        Cell::backward(layer_.maths, saved, previous, next, d_next, d_previous, d_a);
        for (int a = 0; a < Cell::gradients; ++a) d_a[a].store(to + a * Hp_ + unit);
      }
      if constexpr (Cell::carries) d_previous[0].store(g.carried + i * Op_ + unit);
      if constexpr (Cell::states > 1) d_previous[1].store(d_c);
    }
  }

  V cell_gradient(const Position& p, Index i, Index unit) const {
    const C* from =
        at<const C>(layer_.d_cell, steps_, p.t, i) + (p.d * layer_.H + unit) * layer_.d_cell.unit;
    C lane[lanes] = {};
    for (Index u = 0; u < least(lanes, layer_.H - unit); ++u)
      lane[u] = from[u * layer_.d_cell.unit];
    return V::load(lane);
  }

  // Reset-before GRU: d(r∘h) = dn·W_hn, then the other half of the cell's backward.
  void operand_step(const Position& p, Index b, Index n) {
    const C* w = weights_.weight_hn(p.d, b);
    product_tiles<wide>(
        b, n, layer_.H,
        [&](auto& acc, Index j)
            FASTRNN_INLINE_LAMBDA { accumulate(acc, next_rows_ + j, layer_.H, w); },
        [&](Index j, Index unit, const V* d_operands, Index count) {
          finish_operand(p, p.deal.row(j), unit, d_operands, count);
        });
  }

  FASTRNN_NOINLINE void finish_operand(const Position& p, Index i, Index unit, const V* d_operands,
                                       Index count) {
    if constexpr (K::two_products) {
      const Operand h = previous_hidden(p.d)(p.t, i);
      const C* keep = saved_row(p, i);
      C* to = gradients_.row(p.d, steps_.offset[p.t] + i) + Cell::hidden_gradient[0] * Hp_;
      C* carried = group_[p.d].carried + i * Op_;
      for (Index v = 0; v < count; ++v, unit += lanes) {
        V saved[Cell::saved], d_a[Cell::gradients];
        for (int s = 0; s < Cell::saved; ++s) saved[s] = V::load(keep + s * Hp_ + unit);
        const V previous[1] = {operand_tile(h, unit, layer_.O)};
        V d_previous[1] = {V::load(carried + unit)};
        Cell::backward_first(layer_.maths, saved, previous, d_operands + v, d_previous, d_a);
        d_previous[0].store(carried + unit);
        d_a[0].store(to + unit);
      }
    }
  }

  // d_h0 and d_c0: one more product, of the gradients of each row's first step.
  void initial_gradients(Index d, const Deal& deal, const Range& outs, const Range& blocks) {
    const Group& g = group_[d];
    const Walk walk{steps_, reverse(d)};
    const Index n = deal.count(steps_.T > 0 ? steps_.active[0] : 0);
    for (Index j = 0; j < n; ++j) {
      const Index i = deal.row(j), t = reverse(d) ? steps_.length[i] - 1 : 0;
      next_rows_[j] = walk.starts_fresh(t, i) ? nullptr : gradients_.row(d, steps_.offset[t] + i);
    }
    if (layer_.d_h0 || layer_.rows_before > 0)
      for (Index b = outs.begin; b < outs.end; ++b) initial_hidden(d, deal, b, n);
    if constexpr (Cell::states > 1)
      if (layer_.d_c0 || layer_.rows_before > 0)
        for (Index j = 0; j < n; ++j) {
          const Index i = deal.row(j), end = least(layer_.H, blocks.end * block_units);
          for (Index unit = blocks.begin * block_units; unit < end; unit += lanes)
            store_initial_cell(d, i, unit, next_rows_[j] ? V::load(g.d_c + i * Hp_ + unit) : V(0));
        }
  }

  // Stores the gradients of the state before a row's first step: for the caller, or for the part of
  // the layer before this one.
  FASTRNN_INLINE void store_initial_hidden(Index d, Index i, Index unit, V dh) const {
    const Index row = d * layer_.rows + steps_.order[i], O = layer_.O;
    if (i < layer_.rows_before)
      dh.store(static_cast<C*>(layer_.carry_h) + i * Op_ + unit);
    else if (layer_.d_h0)
      store_units(dh, static_cast<S*>(layer_.d_h0) + row * O + unit, O - unit);
  }
  FASTRNN_INLINE void store_initial_cell(Index d, Index i, Index unit, V dc) const {
    const Index row = d * layer_.rows + steps_.order[i], H = layer_.H;
    if (i < layer_.rows_before)
      dc.store(static_cast<C*>(layer_.carry_c) + i * Hp_ + unit);
    else if (layer_.d_c0)
      store_units(dc, static_cast<S*>(layer_.d_c0) + row * H + unit, H - unit);
  }

  void initial_hidden(Index d, const Deal& deal, Index b, Index n) {
    const Group& g = group_[d];
    const Columns w = weights_.weight_hh(d, b);
    product_tiles<wide>(
        b, n, layer_.O,
        [&](auto& acc, Index j) FASTRNN_INLINE_LAMBDA { through_weights(acc, next_rows_ + j, w); },
        [&](Index j, Index unit, const V* products, Index count) {
          const Index i = deal.row(j);
          for (Index v = 0; v < count; ++v, unit += lanes) {
            V dh = next_rows_[j] ? products[v] : V(0);
            if (Cell::carries && next_rows_[j] && !layer_.P)
              dh = dh + V::load(g.carried + i * Op_ + unit);
            store_initial_hidden(d, i, unit, dh);
          }
        });
  }

  const Layer& layer_;
  const Steps& steps_;
  const Index Hp_, Op_, saved_width_;
  const Index blocks_;  // of hidden units
  BackwardWeights<Cell, S> weights_;
  WeightGradients<S> weight_gradients_;
  GateGradients<C> gradients_;
  Group group_[2] = {};
  C *zeros_ = nullptr, *d_out_ = nullptr;
  const C** next_rows_of_all_ = nullptr;
  std::size_t used_ = 0;
  const C** next_rows_ = nullptr;  // the thread's: gradients of each row's next step, null: none
};

}  // namespace fastrnn::FASTRNN_ISA
