// One layer backward through time.
//
// Maths         csrc/cells/. The steps run in the reverse of forward's order. At each, the gradient
// of h
//               is what the output brings, plus what the step after brings through W_hhᵀ, plus what
//               the cell carries past the product (a GRU's dh·z):
//                 dh_t = dy_t + Σ_gates da_{t+1}·W_hh + carried
//               The product and the cell's backward are one pass over a tile of hidden units. Only
//               the gates' gradients are written; those of weights and input are products over all
//               (step, row) pairs afterwards (weight_gradient, input_gradient).
// Two products  reset-before GRU: dn from dh, then d(r∘h) = dn·W_hn, then dr. Projection: dh of
// size P
//               first, then W_hrᵀ to the hidden units.
// Layouts       d_gates  [D][pairs][width]: planes of Hp as the cell's input_gradient and
//                        hidden_gradient say; in the place of forward's saved values where the
//                        caller gives these up
//               d_out    [pairs][D·O], dy in compute type, where it is not read where it lies
//               d_proj   [D][pairs][Op], dh of a projected
//               carried  [B][Op], d_c [B][Hp]
// Sums          long sums over the pairs run in blocks of kPairs, whose partial sums are added one
// after
//               the other: the same bits whatever the number of threads.
// Threads       the recurrence as forward; then pairs (input) and gate rows (weights) are split.
#pragma once

#include <type_traits>

#include "forward.h"

namespace fastrnn::FASTRNN_ISA {

template <class Cell, class S>
class Backward : protected Shape<Cell, S> {
 protected:
  using K = Shape<Cell, S>;
  using K::lanes, K::gates, K::first, K::wide;
  using typename K::C;
  using typename K::V;
  static constexpr int rows = K::wide_rows;
  static constexpr int block_units = wide * lanes;
  static constexpr Index kPairs = 256;
  static constexpr int kBiasVectors = 8;  // summed over the pairs side by side
  static_assert(Cell::gradients <= Cell::saved, "the gradients take the place of what was saved");

 public:
  Backward(const Layer& layer, void* base)
      : layer_(layer),
        steps_(*layer.steps),
        Hp_(padded(layer.H)),
        Op_(padded(layer.O)),
        saved_width_(saved_width<Cell>(layer)),
        width_(layer.consume_gates ? saved_width_ : Cell::gradients * Hp_),
        heads_(layer.maths.heads),
        head_units_(layer.H / heads_),
        head_outputs_(layer.O / heads_),
        head_out_blocks_(ceil_div(head_outputs_, block_units)),
        blocks_(ceil_div(layer.H, block_units)),
        out_blocks_(heads_ * head_out_blocks_),
        second_blocks_(layer.P           ? blocks_
                       : K::two_products ? heads_ * ceil_div(head_units_, block_units)
                                         : 0),
        second_sums_(layer.P ? layer.P : (gates - first) * head_units_),
        in_blocks_(ceil_div(layer.I, block_units)) {
    Arena arena(base);
    const Index B = steps_.B, D = layer.directions, N = steps_.pairs, H = layer.H;
    // What parts of a layer go on with comes first: its place must not depend on their sizes.
    const Index products = gates * H * (layer.I + head_outputs_) + layer.P * H;
    sums_ = sizeof(S) != sizeof(C) ? arena.take<C>(products) : nullptr;
    vector_sums_ = layer.part ? arena.take<C>(Cell::gradients * Hp_) : nullptr;
    zeros_ = arena.take<C>(Hp_ > Op_ ? Hp_ : Op_);
    d_out_ = reads_output_gradient() ? nullptr : arena.take<C>(N * D * layer.O);
    for (Index d = 0; d < D; ++d) {
      Group& g = group_[d];
      g.weight_hh = arena.take<C>(out_blocks_ * first * head_units_ * block_units);
      g.second = arena.take<C>(second_blocks_ * second_sums_ * block_units);
      g.weight_ih = wants_input() ? arena.take<C>(in_blocks_ * gates * H * block_units) : nullptr;
      g.initial = arena.take<C>(B * Op_);
      g.initial_c = Cell::states > 1 ? arena.take<C>(B * Hp_) : nullptr;
      g.d_h_n = arena.take<C>(B * Op_);
      g.carried = Cell::carries ? arena.take<C>(B * Op_) : nullptr;
      g.d_c = Cell::states > 1 ? arena.take<C>(B * Hp_) : nullptr;
      g.d_gates = layer.consume_gates ? static_cast<C*>(layer.gates) + d * layer.gates_group
                                      : arena.take<C>(N * width_);
      g.d_proj = layer.P ? arena.take<C>(N * Op_) : nullptr;
    }
    for (int gate = 0; gate < gates; ++gate) every_gate_[gate] = gate;
    Product products_of_one[kProducts];
    describe_products(0, products_of_one);
    const Product& last = products_of_one[kProjection];
    rows_slot_ = (last.rows_at + last.groups()) * rows * kPairs;
    panels_slot_ = (last.panels_at + last.panels()) * block_units * kPairs;
    slots_ = count_slots();
    packed_rows_ = arena.take<C>(slots_ * rows_slot_);
    panels_ = arena.take<C>(slots_ * panels_slot_);
    next_rows_of_all_ = arena.take<const C*>(next_rows_count() * layer.plan.threads);
    used_ = arena.used();
  }

  std::size_t used() const { return used_; }

  void run(int thread, int threads) {
    const FlushSubnormals guard;
    const Plan& plan = threads == layer_.plan.threads ? layer_.plan : layer_.single;
    Barrier& everybody = layer_.barriers[0];
    take_thread(thread);
    prepare(thread, threads);
    everybody.wait(threads, Barrier::Wait::start);
    run_directions(
        layer_, plan, thread,
        [&](Index d, const Share& share, Index done) {
          return steps_.T - recur(d, share, steps_.T - done);
        },
        [](const Plan&, int) {});
    everybody.wait(threads, Barrier::Wait::part);
    if (wants_input()) input_gradient(thread, threads);
    if (layer_.d_parameters)
      for (Index d = 0; d < layer_.directions; ++d) parameter_gradients(d, thread, threads);
  }

 private:
  struct Group {
    C *weight_hh, *second, *weight_ih;
    C *initial, *initial_c;  // h0 and c0
    C *d_h_n, *carried, *d_c;
    C *d_gates, *d_proj;
  };

  // A row of values: in storage with its stride, or in compute type; neither: zeros.
  struct Operand {
    const S* storage = nullptr;
    Index unit = 1;
    const C* compute = nullptr;
  };

  bool wants_input() const { return layer_.d_below || layer_.d_input.data; }

  // Whether dy can be read where it lies, a vector at a time.
  bool reads_output_gradient() const {
    if (layer_.d_hidden.data) return false;
    return layer_.d_above || !layer_.d_output.data || layer_.d_output.unit == 1;
  }

  void take_thread(int thread) { next_rows_ = next_rows_of_all_ + thread * next_rows_count(); }
  Index next_rows_count() const { return steps_.B + rows; }

  // ---- before the last step ---------------------------------------------------------------------

  void prepare(int thread, int threads) {
    if (thread == 0)
      for (Index u = 0; u < (Hp_ > Op_ ? Hp_ : Op_); ++u) zeros_[u] = C(0);
    for (Index d = 0; d < layer_.directions; ++d) pack_weights(d, thread, threads);
    const Range mine = split(steps_.B, thread, threads);
    for (Index i = mine.begin; i < mine.end; ++i) {
      for (Index d = 0; d < layer_.directions; ++d) boundary_states(d, i);
      if (steps_.padding && layer_.d_input.data) clear_padding(i);
    }
    const Range steps = split(reads_output_gradient() ? 0 : steps_.T, thread, threads);
    for (Index t = steps.begin; t < steps.end; ++t)
      for (Index i = 0; i < steps_.active[t]; ++i) gather_output(t, i);
  }

  void pack_weights(Index d, int thread, int threads) {
    const Group& g = group_[d];
    const Parameters& p = layer_.parameters[d];
    const Index H = layer_.H;
    const Range outs = split(out_blocks_, thread, threads);
    for (Index b = outs.begin; b < outs.end; ++b) {
      const Index in_head = b % head_out_blocks_;
      const Weight w = head_of(p.weight_hh, b / head_out_blocks_, sizeof(S));
      if (!direct(w, steps_uses(), in_head, head_outputs_))
        pack_columns<wide, C, S>(g.weight_hh + b * first * head_units_ * block_units, w, 0,
                                 first * head_units_, in_head * block_units, head_outputs_);
    }
    const Range hidden = split(second_blocks_, thread, threads);
    for (Index b = hidden.begin; b < hidden.end; ++b) {
      C* to = g.second + b * second_sums_ * block_units;
      const Index blocks_of_head = second_blocks_ / heads_;
      if (layer_.P)
        pack_columns<wide, C, S>(to, p.weight_hr, 0, layer_.P, b * block_units, H);
      else
        pack_columns<wide, C, S>(to, head_of(p.weight_hh, b / blocks_of_head, sizeof(S)),
                                 first * head_units_, second_sums_,
                                 b % blocks_of_head * block_units, head_units_);
    }
    const Range ins = split(wants_input() ? in_blocks_ : 0, thread, threads);
    for (Index b = ins.begin; b < ins.end; ++b)
      if (!direct(p.weight_ih, ceil_div(steps_.pairs, rows), b, layer_.I))
        pack_columns<wide, C, S>(g.weight_ih + b * gates * H * block_units, p.weight_ih, 0,
                                 gates * H, b * block_units, layer_.I);
  }

  // How often the recurrence goes through a block of W_hh.
  Index steps_uses() const { return (steps_.T + 1) * ceil_div(steps_.B, rows); }

  // Whether a block of columns is read where it lies in W: it is a row of whole vectors there, and
  // it is used too seldom to repay packing.
  static bool direct(const Weight& w, Index uses, Index b, Index columns) {
    constexpr Index kFewUses = 4;
    return sizeof(S) == sizeof(C) && w.unit == 1 && uses <= kFewUses &&
           (b + 1) * block_units <= columns;
  }

  // A block of columns for k = 0 …, where it lies.
  struct Columns {
    const C* data;
    Index stride;  // between k
    FASTRNN_INLINE const C* at(Index k) const { return data + k * stride; }
  };
  FASTRNN_INLINE static Columns columns(const Weight& w, const C* packed, Index uses, Index b,
                                        Index count) {
    if constexpr (sizeof(S) == sizeof(C))
      if (direct(w, uses, b, count))
        return {static_cast<const C*>(w.data) + b * block_units, w.row};
    return {packed, block_units};
  }

  void boundary_states(Index d, Index i) {
    const Group& g = group_[d];
    const Index row = steps_.order[i], O = layer_.O, H = layer_.H;
    const bool started = i < layer_.rows_before, goes_on = i < layer_.rows_after;
    load_state<S>(g.initial + i * Op_, started ? layer_.h_before : layer_.h0, d, row, O);
    if (goes_on)
      gather(g.d_h_n + i * Op_, static_cast<const C*>(layer_.carry_h) + i * Op_, 1, Op_);
    else
      load_state<S>(g.d_h_n + i * Op_, layer_.d_h_n, d, row, O);
    if constexpr (Cell::states > 1) {
      if (started)
        load_state<C>(g.initial_c + i * Hp_, layer_.c_before, d, row, H);
      else
        load_state<S>(g.initial_c + i * Hp_, layer_.c0, d, row, H);
      if (goes_on)
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

  // dy of a pair, from the layer above or the caller, and from the caller's gradient of all states.
  void gather_output(Index t, Index i) {
    const Index n = steps_.offset[t] + i, count = layer_.directions * layer_.O;
    C* to = d_out_ + n * count;
    if (layer_.d_above) {
      const C* from = static_cast<const C*>(layer_.d_above) + n * layer_.d_above_width;
      for (Index u = 0; u < count; ++u) to[u] = from[u];
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

  // ---- the steps --------------------------------------------------------------------------------

  struct Position {
    Index d, t;
    const Deal& deal;
    Walk walk;
  };

  bool reverse(Index d) const { return d == 1 || layer_.reverse; }

  C* gates_row(Index d, Index n) const { return group_[d].d_gates + n * width_; }

  const C* saved_row(const Position& p, Index i) const {
    return static_cast<const C*>(layer_.gates) + p.d * layer_.gates_group +
           (steps_.offset[p.t] + i) * saved_width_;
  }

  // The steps before `end`, the last first. Gives how many are left: none, or where the team is to
  // become one thread or a team again.
  Index recur(Index d, const Share& share, Index end) {
    const Deal deal(steps_, share, rows);
    const Range blocks = split(blocks_, share.column, share.columns);
    const Range outs = split(out_blocks_, share.column, share.columns);
    for (Index s = end - 1; s >= 0; --s) {
      if (share.resting > 0 && share.team->gathers(share.resting)) return s + 1;
      const Walk walk{steps_, reverse(d)};
      const Position p{d, walk.step(s), deal, walk};
      const Index n = deal.count(steps_.active[p.t]);
      bool any = false;  // some row has a step after this one
      for (Index j = 0; j < n; ++j) {
        const Index i = deal.row(j), next = walk.following(p.t);
        const bool cut = walk.last(p.t, i) || walk.starts_fresh(next, i);
        next_rows_[j] = cut ? nullptr : gates_row(d, steps_.offset[next] + i);
        any |= !cut;
      }
      if (Cell::projects && layer_.P) {
        if constexpr (Cell::projects) projected_step(p, share, outs, blocks, n, any);
      } else {
        for (Index b = blocks.begin; b < blocks.end; ++b) hidden_step(p, b, n, any);
        if constexpr (K::two_products) {
          share.team->wait(share.columns);
          for (Index j = 0; j < n; ++j)
            next_rows_[j] =
                gates_row(d, steps_.offset[p.t] + deal.row(j)) + Cell::hidden_gradient[first] * Hp_;
          for (Index b = blocks.begin; b < blocks.end; ++b) operand_step(p, b, n);
        }
      }
      if (share.team->wait(share.columns) && share.may_shrink && s > 0) return s;
    }
    initial_gradients(d, deal, outs, blocks);
    return 0;
  }

  // acc = Σ over the gates of `first` and the hidden units: da of the following step times W_hh.
  template <int R>
  FASTRNN_INLINE void through_weights(V (&acc)[R][wide], const C* const* d_gates,
                                      const Columns& w) {
    for (int gate = 0; gate < first; ++gate) {
      const C* plane[R];
      for (int r = 0; r < R; ++r)
        plane[r] = (d_gates[r] ? d_gates[r] + Cell::hidden_gradient[gate] * Hp_ : zeros_);
      accumulate(acc, plane, layer_.H, w.at(gate * layer_.H), w.stride);
    }
  }

  // The gradient of h at tiles of a row: what comes from the step after (or, at the last step,
  // d_h_n), then dy. In this order a sequence cut in two, whose d_h_n is the next piece's d_h0,
  // rounds alike.
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

  // h before a pair's step.
  FASTRNN_INLINE Operand previous_hidden(Index d, Index t, Index i) const {
    const Walk walk{steps_, reverse(d)};
    if (walk.starts_fresh(t, i)) return {nullptr, 1, nullptr};
    if (walk.first(t, i)) return {nullptr, 1, group_[d].initial + i * Op_};
    return {at<const S>(layer_.output, steps_, walk.previous(t), i) + d * layer_.O, 1, nullptr};
  }

  // One block of outputs, those below `limit`, for the thread's n rows: sum(acc, j) adds the
  // products of the rows from j on, done(j, unit, values, count) takes the tiles of row j.
  template <class Sum, class Done>
  FASTRNN_INLINE void product_tiles(Index b, Index n, Index limit, Sum sum, Done done) {
    const Index unit = b * block_units, count = least(wide, ceil_div(limit - unit, lanes));
    in_blocks_of_rows<rows>(n, [&](auto row_count, Index j) {
      constexpr int R = decltype(row_count)::value;
      V acc[R][wide];
      clear(acc);
      sum(acc, j);
      const Sums<R, wide, C> sums(acc);
      for (int r = 0; r < R; ++r) done(j + r, unit, sums.v[r], count);
    });
  }

  // Of block b of all the heads' outputs.
  Columns hidden_weights(Index d, Index b) const {
    const C* packed = group_[d].weight_hh + b * first * head_units_ * block_units;
    if (heads_ == 1)
      return columns(layer_.parameters[d].weight_hh, packed, steps_uses(), b, layer_.O);
    return columns(head_of(layer_.parameters[d].weight_hh, b / head_out_blocks_, sizeof(S)), packed,
                   steps_uses(), b % head_out_blocks_, head_outputs_);
  }

  const C* second_weights(Index d, Index b) const {
    return group_[d].second + b * second_sums_ * block_units;
  }

  // product_tiles() of what comes from the step after; of nothing where no row has one. ahead(j) is
  // called for the rows of a product before it begins.
  template <class Ahead, class Done>
  FASTRNN_INLINE void hidden_tiles(const Position& p, Index b, Index n, Index limit, bool any,
                                   Ahead ahead, Done done) {
    const Columns w = hidden_weights(p.d, b);
    product_tiles(
        b, n, limit,
        [&](auto& acc, Index j) FASTRNN_INLINE_LAMBDA {
          for (Index r = 0; r < Index{std::extent_v<std::remove_reference_t<decltype(acc)>>}; ++r)
            ahead(j + r);
          if (any) through_weights(acc, next_rows_ + j, w);
        },
        done);
  }

  void hidden_step(const Position& p, Index b, Index n, bool any) {
    hidden_tiles(
        p, b, n, layer_.H, any,
        [&](Index j) FASTRNN_INLINE_LAMBDA { fetch(p, p.deal.row(j), b * block_units); },
        [&](Index j, Index unit, const V* products, Index count) {
          cell_backward(p, p.deal.row(j), unit, products, count, !next_rows_[j], true);
        });
  }

  // Calls for what cell_backward() reads of a block of a row and no step has read before: while the
  // product runs, it comes from memory to the core's own cache.
  FASTRNN_INLINE void fetch(const Position& p, Index i, Index unit) const {
    const auto fetch_units = [&](const auto* from) FASTRNN_INLINE_LAMBDA {
      constexpr Index line = 64 / sizeof(*from);
      for (Index u = unit, end = least(unit + block_units, layer_.H); u < end; u += line)
        __builtin_prefetch(from + u);
    };
    for (int s = 0; s < Cell::saved; ++s) fetch_units(saved_row(p, i) + s * Hp_);
    if constexpr (Cell::states > 1)
      if (!p.walk.first(p.t, i))
        fetch_units(at<const C>(layer_.cell, steps_, p.walk.previous(p.t), i) + p.d * layer_.H);
    const Operand dy = output_gradient(p, i);
    if (dy.storage) fetch_units(dy.storage);
    if (dy.compute) fetch_units(dy.compute);
  }

  // dh of the projected size first, then through W_hr to the hidden units.
  void projected_step(const Position& p, const Share& share, const Range& outs, const Range& blocks,
                      Index n, bool any) {
    for (Index b = outs.begin; b < outs.end; ++b) projected_gradient(p, b, n, any);
    share.team->wait(share.columns);
    for (Index j = 0; j < n; ++j)
      next_rows_[j] = group_[p.d].d_proj + (steps_.offset[p.t] + p.deal.row(j)) * Op_;
    for (Index b = blocks.begin; b < blocks.end; ++b) hidden_of_projected(p, b, n);
  }

  void projected_gradient(const Position& p, Index b, Index n, bool any) {
    hidden_tiles(
        p, b, n, layer_.O, any, [](Index) {},
        [&](Index j, Index unit, const V* products, Index count) {
          projected_row(p, p.deal.row(j), unit, products, count, !next_rows_[j]);
        });
  }

  FASTRNN_NOINLINE void projected_row(const Position& p, Index i, Index unit, const V* products,
                                      Index count, bool cut) {
    const Group& g = group_[p.d];
    const Operand dy = output_gradient(p, i);
    const bool last = p.walk.last(p.t, i);
    C* to = g.d_proj + (steps_.offset[p.t] + i) * Op_;
    for (Index v = 0; v < count; ++v, unit += lanes)
      hidden_gradient(g, dy, i, unit, products[v], last, cut).store(to + unit);
  }

  void hidden_of_projected(const Position& p, Index b, Index n) {
    const C* w = second_weights(p.d, b);
    product_tiles(
        b, n, layer_.H,
        [&](auto& acc, Index j)
            FASTRNN_INLINE_LAMBDA { accumulate(acc, next_rows_ + j, layer_.P, w); },
        [&](Index j, Index unit, const V* dh, Index count) {
          const Index i = p.deal.row(j);
          cell_backward(p, i, unit, dh, count, cut_after(p, i), false);
        });
  }

  // Nothing comes from the step after: it belongs to another episode, or there is none.
  FASTRNN_INLINE bool cut_after(const Position& p, Index i) const {
    return p.walk.last(p.t, i) || p.walk.starts_fresh(p.walk.following(p.t), i);
  }

  // The cell (or its half that follows dh) on tiles of one row. `incoming`: of dh, still without
  // what else it is made of, or all of it.
  FASTRNN_NOINLINE void cell_backward(const Position& p, Index i, Index unit, const V* incoming,
                                      Index count, bool cut, bool adds) {
    const Group& g = group_[p.d];
    const Index n = steps_.offset[p.t] + i, left = layer_.H;
    const bool last = p.walk.last(p.t, i), fresh = p.walk.starts_fresh(p.t, i);
    const Operand dy = adds ? output_gradient(p, i) : Operand{};
    const Operand h = Cell::carries ? previous_hidden(p.d, p.t, i) : Operand{};
    const C* keep = saved_row(p, i);
    C* to = gates_row(p.d, n);
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

  // Reset-before GRU: d(r∘h) = dn·W_hn, and what follows from it.
  void operand_step(const Position& p, Index b, Index n) {
    const C* w = second_weights(p.d, b);
    product_tiles(
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
      const Operand h = previous_hidden(p.d, p.t, i);
      const C* keep = saved_row(p, i);
      C* to = gates_row(p.d, steps_.offset[p.t] + i) + Cell::hidden_gradient[0] * Hp_;
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

  // d_h0 and d_c0: one more product past the first step.
  void initial_gradients(Index d, const Deal& deal, const Range& outs, const Range& blocks) {
    const Group& g = group_[d];
    const Walk walk{steps_, reverse(d)};
    const Index n = deal.count(steps_.T > 0 ? steps_.active[0] : 0);
    for (Index j = 0; j < n; ++j) {
      const Index i = deal.row(j), t = first_step(d, i);
      next_rows_[j] = walk.starts_fresh(t, i) ? nullptr : gates_row(d, steps_.offset[t] + i);
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

  // The gradients of the state before a row's first step: the caller's, or for the part before.
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

  Index first_step(Index d, Index i) const { return reverse(d) ? steps_.length[i] - 1 : 0; }

  void initial_hidden(Index d, const Deal& deal, Index b, Index n) {
    const Group& g = group_[d];
    const Columns w = hidden_weights(d, b);
    product_tiles(
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

  // ---- the input --------------------------------------------------------------------------------

  // dx = Σ over directions and gates of da·W_ih, for the thread's pairs.
  void input_gradient(int thread, int threads) {
    const Range mine = split(steps_.pairs, thread, threads);
    for (Index b = 0; b < in_blocks_; ++b) {
      Columns weight[2];
      for (Index d = 0; d < layer_.directions; ++d)
        weight[d] = columns(layer_.parameters[d].weight_ih,
                            group_[d].weight_ih + b * gates * layer_.H * block_units,
                            ceil_div(steps_.pairs, rows), b, layer_.I);
      if (half_block(layer_.I, b))
        input_block<wide / 2>(mine, b, weight);
      else
        input_block<wide>(mine, b, weight);
    }
  }

  template <int N>
  FASTRNN_INLINE void input_block(const Range& mine, Index b, const Columns (&weight)[2]) {
    PairWalk pair(steps_, mine.begin);
    in_blocks_of_rows<rows>(mine.end - mine.begin, [&](auto count, Index m) {
      constexpr int R = decltype(count)::value;
      V acc[R][N];
      clear(acc);
      if (layer_.d_input_before)
        for (int r = 0; r < R; ++r)
          for (int v = 0; v < N; ++v)
            acc[r][v] = input_before(mine.begin + m + r, b * block_units + v * lanes);
      for (Index d = 0; d < layer_.directions; ++d)
        for (int gate = 0; gate < gates; ++gate) {
          const C* plane[R];
          for (int r = 0; r < R; ++r)
            plane[r] = gates_row(d, mine.begin + m + r) + Cell::input_gradient[gate] * Hp_;
          accumulate<R, N>(acc, plane, layer_.H, weight[d].at(gate * layer_.H), weight[d].stride);
        }
      const Sums<R, N, C> sums(acc);
      for (int r = 0; r < R; ++r, pair.advance())
        for (int v = 0; v < N; ++v)
          store_input(pair, mine.begin + m + r, b * block_units + v * lanes, sums.v[r][v]);
    });
  }

  // Runs through the pairs in their order.
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
    void skip_empty() {
      while (t < steps.T && i >= steps.active[t]) {
        i -= steps.active[t];
        ++t;
      }
    }
  };

  V input_before(Index n, Index unit) const {
    if (unit >= layer_.I) return V(0);
    return load_units<C>(static_cast<const C*>(layer_.d_input_before) + n * layer_.I + unit,
                         layer_.I - unit);
  }

  FASTRNN_NOINLINE void store_input(const PairWalk& pair, Index n, Index unit, V dx) {
    if (unit >= layer_.I) return;
    if (layer_.d_below)
      store_units(dx, static_cast<C*>(layer_.d_below) + n * layer_.I + unit, layer_.I - unit);
    else
      store_units(dx, at<S>(layer_.d_input, steps_, pair.t, pair.i) + unit, layer_.I - unit);
  }

  // ---- the weights ------------------------------------------------------------------------------
  //
  // Each gradient is a product over the pairs of gate gradients (its rows) and of the operand of
  // the matrix (its columns). The pairs run in blocks of kPairs: the threads pack the rows and
  // columns of several such blocks together, a slot for each, meet, and then share the blocks of
  // the results. The fewer meetings, the less a thread costs the others that has no core to itself.

  // One matrix of one direction, of one head or several.
  struct Product {
    const C* d_rows = nullptr;  // [pairs][width], the plane of gate g at planes[g]·Hp
    Index width = 0;
    const int* planes = nullptr;
    int first_gate = 0, gates = 1;  // of the matrix
    Index heads = 1;
    Index units = 0;  // rows of a gate, of one head
    Index columns = 0;
    S* to = nullptr;  // [heads][.., columns], `head` elements apart
    Index head = 0;
    const int* slots = nullptr;  // of packed_rows_: gate g begins at rows_at + slots[g]·groups
    Index rows_at = 0;
    Index panels_at = 0;  // of panels_
    C* sums = nullptr;    // where storage is narrower than the sums: [heads, gates·units, columns]

    Index groups_of_head() const { return ceil_div(units, rows); }
    Index groups() const { return heads * groups_of_head(); }
    Index panels_of_head() const { return ceil_div(columns, block_units); }
    Index panels() const { return heads * panels_of_head(); }
    Index blocks_of_head() const { return panels_of_head() * gates * groups_of_head(); }
    Index blocks() const { return to ? heads * blocks_of_head() : 0; }
  };
  enum { kInput, kHidden, kSecond, kProjection, kProducts };

  // A block of a product: which panel of columns, which group of rows of which gate.
  struct Spot {
    Index head, panel, gate, group;
  };

  void parameter_gradients(Index d, int thread, int threads) {
    const Parameters& to = layer_.d_parameters[d];
    Product products[kProducts];
    describe_products(d, products);
    Index all = 0;
    for (const Product& p : products) all += p.blocks();
    constexpr Index kFewPairs = 16;
    const bool whole = layer_.starts_sums && layer_.ends_sums;
    if (all > 0 && whole && steps_.pairs <= kFewPairs)
      few_pairs_gradients(d, products, thread, threads);
    else if (all > 0)
      sums_of_pairs(d, products, split(all, thread, threads), thread, threads);
    vector_gradients(d, to, thread, threads);
    if (d + 1 < layer_.directions) layer_.barriers[0].wait(threads, Barrier::Wait::part);
  }

  void sums_of_pairs(Index d, const Product (&products)[kProducts], const Range& mine, int thread,
                     int threads) {
    const auto pairs_from = [&](Index n0) { return least(kPairs, steps_.pairs - n0); };
    for (Index begin = 0; begin < steps_.pairs; begin += slots_ * kPairs) {
      const Index end = least(begin + slots_ * kPairs, steps_.pairs);
      if (begin > 0)
        layer_.barriers[0].wait(threads, Barrier::Wait::part);  // the slots are done with
      for (Index n0 = begin, slot = 0; n0 < end; n0 += kPairs, ++slot)
        pack_pairs(d, products, slot, n0, pairs_from(n0), thread, threads);
      layer_.barriers[0].wait(threads, Barrier::Wait::part);
      for (Index n0 = begin, slot = 0; n0 < end; n0 += kPairs, ++slot)
        each_block(products, mine, [&](const Product& p, const Spot& at) {
          add_block(p, slot, at, pairs_from(n0), n0 == 0 && layer_.starts_sums);
        });
    }
    if (steps_.pairs == 0 && layer_.starts_sums)
      each_block(products, mine, [&](const Product& p, const Spot& at) { clear_block(p, at); });
    if (sizeof(S) != sizeof(C) && layer_.ends_sums)
      each_block(products, mine, [&](const Product& p, const Spot& at) { narrow_block(p, at); });
  }

  // Of so few pairs a gradient is far more to write than to compute: each of its rows is made and
  // written at once, from the pairs' values as they are.
  void few_pairs_gradients(Index d, const Product (&products)[kProducts], int thread, int threads) {
    for (int which = 0; which < kProducts; ++which)
      if (products[which].to)
        pack_panels(d, which, products[which], 0, 0, steps_.pairs, thread, threads);
    layer_.barriers[0].wait(threads, Barrier::Wait::part);
    for (const Product& p : products) {
      const Range mine = split(p.to ? p.heads * p.gates * p.units : 0, thread, threads);
      for (Index row = mine.begin; row < mine.end; ++row) few_pairs_row(p, row);
    }
  }

  void few_pairs_row(const Product& p, Index row) {
    const Index head = row / (p.gates * p.units), in_head = row % (p.gates * p.units);
    const Index gate = in_head / p.units, unit = in_head % p.units;
    const C* d_row = p.d_rows + p.planes[p.first_gate + gate] * Hp_ + head * p.units + unit;
    S* to = p.to + head * p.head + in_head * p.columns;
    for (Index b = 0; b < p.panels_of_head(); ++b) {
      const C* columns = panel(p, 0, head * p.panels_of_head() + b);
      for (int v = 0; v < wide; ++v) {
        const Index column = b * block_units + v * lanes, left = p.columns - column;
        if (left <= 0) break;
        V sum(0);
        for (Index k = 0; k < steps_.pairs; ++k)
          sum = fma(V(d_row[k * p.width]), V::load(columns + k * block_units + v * lanes), sum);
        store_units(sum, to + column, left);
      }
    }
  }

  void describe_products(Index d, Product (&products)[kProducts]) const {
    const Parameters to = layer_.d_parameters ? layer_.d_parameters[d] : Parameters{};
    static constexpr int only[] = {0};
    const auto data = [](const Weight& w) { return static_cast<S*>(w.data); };
    const Index H = layer_.H, part = head_units_ * head_outputs_;  // one gate of one head
    for (Product& p : products) p = {};
    for (int which : {kInput, kHidden, kSecond}) {
      Product& p = products[which];
      p.d_rows = group_[d].d_gates;
      p.width = width_;
      p.planes = which == kInput ? Cell::input_gradient : Cell::hidden_gradient;
      p.slots = shares_rows() ? p.planes : every_gate_;
    }
    Product &input = products[kInput], &hidden = products[kHidden], &second = products[kSecond];
    input.gates = gates;
    input.units = H;
    input.columns = layer_.I;
    input.to = data(to.weight_ih);
    hidden.gates = first;
    second.first_gate = first;
    second.gates = gates - first;
    for (Product* p : {&hidden, &second}) {
      p->heads = heads_;
      p->units = head_units_;
      p->columns = head_outputs_;
      p->to = data(to.weight_hh);
      p->head = gates * part;
      if (!shares_rows()) p->rows_at = gates * input.groups();
    }
    if (!K::two_products) second = {};
    if (second.to) second.to += first * part;
    Product& projection = products[kProjection];
    projection.d_rows = group_[d].d_proj;
    projection.width = Op_;
    projection.planes = projection.slots = only;
    projection.units = layer_.P;
    projection.columns = layer_.P ? H : 0;
    projection.to = layer_.P ? data(to.weight_hr) : nullptr;
    projection.rows_at =
        shares_rows() ? Cell::gradients * input.groups() : hidden.rows_at + gates * hidden.groups();
    Index panels = 0, sums = 0;
    for (Product& p : products) {
      p.panels_at = panels;
      panels += p.panels();
      p.sums = sums_ ? sums_ + sums : nullptr;
      sums += p.heads * p.gates * p.units * p.columns;
    }
  }

  // Whether the products of W_ih and W_hh read the same planes of gradients, in the same groups.
  bool shares_rows() const { return heads_ == 1; }

  // body(product, spot) for the blocks that lie in `mine`: panel after panel, so that a panel stays
  // in the cache.
  template <class Body>
  FASTRNN_INLINE void each_block(const Product (&products)[kProducts], const Range& mine,
                                 Body body) const {
    Index at = 0;
    for (const Product& p : products) {
      const Index blocks = p.blocks(), groups = p.groups_of_head();
      const Index begin = mine.begin > at ? mine.begin - at : 0;
      const Index end = least(mine.end - at, blocks);
      for (Index all = begin; all < end; ++all) {
        const Index head = p.heads == 1 ? 0 : all / p.blocks_of_head();
        const Index block = all - head * p.blocks_of_head();
        const Index row = block % (p.gates * groups);
        body(p, Spot{head, block / (p.gates * groups), row / groups, row % groups});
      }
      at += blocks;
    }
  }

  // How many blocks of pairs are packed between two meetings: one where nobody is met, else as many
  // as a share of the scratch holds, alike at every meeting.
  Index count_slots() const {
    constexpr Index kSlotBytes = 16 << 20;
    if (layer_.plan.threads == 1) return 1;
    const Index blocks = ceil_div(steps_.pairs, kPairs);
    const Index room = kSlotBytes / ((rows_slot_ + panels_slot_) * static_cast<Index>(sizeof(C)));
    const Index meetings = ceil_div(blocks, room > 1 ? room : 1);
    return meetings > 0 ? ceil_div(blocks, meetings) : 1;
  }

  C* packed_group(const Product& p, Index slot, const Spot& at) const {
    const Index groups = p.slots[p.first_gate + at.gate] * p.groups();
    const Index group = groups + at.head * p.groups_of_head() + at.group;
    return packed_rows_ + slot * rows_slot_ + (p.rows_at + group) * rows * kPairs;
  }
  C* panel(const Product& p, Index slot, Index panel) const {
    return panels_ + slot * panels_slot_ + (p.panels_at + panel) * block_units * kPairs;
  }

  void pack_pairs(Index d, const Product (&products)[kProducts], Index slot, Index n0, Index count,
                  int thread, int threads) {
    pack_rows(d, products, slot, n0, count, thread, threads);
    for (int which = 0; which < kProducts; ++which)
      if (products[which].to)
        pack_panels(d, which, products[which], slot, n0, count, thread, threads);
  }

  // The gates' gradients of `count` pairs, in groups of `rows` units, for each pair in a row.
  void pack_rows(Index d, const Product (&products)[kProducts], Index slot, Index n0, Index count,
                 int thread, int threads) {
    if (shares_rows()) {
      const Index groups = ceil_div(layer_.H, rows);
      for (int plane = 0; plane < Cell::gradients; ++plane)
        pack_groups(packed_rows_ + slot * rows_slot_ + plane * groups * rows * kPairs,
                    group_[d].d_gates + n0 * width_ + plane * Hp_, width_, layer_.H,
                    split(groups, thread, threads), count);
      pack_product(products[kProjection], slot, n0, count, thread, threads);
    } else {
      for (const Product& p : products) pack_product(p, slot, n0, count, thread, threads);
    }
  }

  void pack_product(const Product& p, Index slot, Index n0, Index count, int thread, int threads) {
    if (!p.to) return;
    const Range mine = split(p.groups_of_head(), thread, threads);
    for (Index gate = 0; gate < p.gates; ++gate)
      for (Index head = 0; head < p.heads; ++head)
        pack_groups(packed_group(p, slot, Spot{head, 0, gate, 0}),
                    p.d_rows + n0 * p.width + p.planes[p.first_gate + gate] * Hp_ + head * p.units,
                    p.width, p.units, mine, count);
  }

  static void pack_groups(C* to, const C* from, Index width, Index units, const Range& groups,
                          Index count) {
    constexpr Index kRun = 16;  // pairs whose gradients stay in the cache for the next group
    for (Index k0 = 0; k0 < count; k0 += kRun)
      for (Index m = groups.begin; m < groups.end; ++m) {
        const C* source = from + k0 * width + m * rows;
        C* packed = to + (m * kPairs + k0) * rows;
        const Index have = least(rows, units - m * rows), end = least(k0 + kRun, count);
        for (Index k = k0; k < end; ++k, source += width, packed += rows) {
          if (have == rows)
            __builtin_memcpy(packed, source, rows * sizeof(C));
          else
            for (Index r = 0; r < rows; ++r) packed[r] = r < have ? source[r] : C(0);
        }
      }
  }

  // The operand's columns of `count` pairs, in blocks of columns, for each pair in a row.
  void pack_panels(Index d, int which, const Product& p, Index slot, Index n0, Index count,
                   int thread, int threads) {
    const Range mine = split(p.panels(), thread, threads);
    if (mine.begin == mine.end) return;
    PairWalk pair(steps_, n0);
    const Index panels = p.panels_of_head(), first_head = mine.begin / panels;
    for (Index k = 0; k < count; ++k, pair.advance()) {
      const Operand row = operand(d, which, pair, n0 + k);
      Index head = first_head, in_head = mine.begin - first_head * panels;
      for (Index b = mine.begin; b < mine.end; ++b) {
        C* to = panel(p, slot, b) + k * block_units;
        const Index column = head * p.columns + in_head * block_units;
        for (int v = 0; v < wide; ++v)
          operand_tile(row, column + v * lanes, (head + 1) * p.columns).store(to + v * lanes);
        if (++in_head == panels) in_head = 0, ++head;
      }
    }
  }

  Operand operand(Index d, int which, const PairWalk& pair, Index n) const {
    if (which == kInput)
      return {at<const S>(layer_.input, steps_, pair.t, pair.i), layer_.input.unit, nullptr};
    if constexpr (K::two_products)
      if (which == kSecond) return {nullptr, 1, saved_plane(d, n, Cell::operand)};
    if (which == kProjection) return {nullptr, 1, saved_plane(d, n, Cell::saved)};
    return previous_hidden(d, pair.t, pair.i);
  }

  FASTRNN_INLINE static V operand_tile(const Operand& row, Index column, Index columns) {
    const Index left = columns - column;
    if (left <= 0 || (!row.storage && !row.compute)) return V(0);
    if (row.compute) return load_units<C>(row.compute + column, left);
    if (row.unit == 1) return load_units<C>(row.storage + column, left);
    C lane[lanes] = {};
    for (Index u = 0; u < least(lanes, left); ++u)
      lane[u] = widen(row.storage[(column + u) * row.unit]);
    return V::load(lane);
  }

  const C* saved_plane(Index d, Index n, int plane) const {
    return static_cast<const C*>(layer_.gates) + d * layer_.gates_group + n * saved_width_ +
           plane * Hp_;
  }

  // The rows of a block that the matrix has.
  static Index rows_of(const Product& p, const Spot& at) {
    return least(rows, p.units - at.group * rows);
  }

  // Row r of a block, in the gradient.
  static S* result_row(const Product& p, const Spot& at, Index r) {
    return p.to + at.head * p.head + (at.gate * p.units + at.group * rows + r) * p.columns;
  }
  // Where its sums grow: there, or in scratch where storage is narrower.
  static C* sums_row(const Product& p, const Spot& at, Index r) {
    if constexpr (sizeof(S) == sizeof(C))
      return result_row(p, at, r);
    else
      return p.sums + ((at.head * p.gates + at.gate) * p.units + at.group * rows + r) * p.columns;
  }

  void add_block(const Product& p, Index slot, const Spot& at, Index count, bool start) {
    if (half_block(p.columns, at.panel))
      add_vectors<wide / 2>(p, slot, at, count, start);
    else
      add_vectors<wide>(p, slot, at, count, start);
  }

  // A last block of columns that fills no more than half of its vectors.
  static bool half_block(Index columns, Index b) {
    return columns - b * block_units <= block_units / 2;
  }

  template <int N>
  FASTRNN_INLINE void add_vectors(const Product& p, Index slot, const Spot& at, Index count,
                                  bool start) {
    const Index have = rows_of(p, at), column = at.panel * block_units;
    const bool whole = p.columns - column >= N * lanes;
    for (Index r = 0; whole && r < have; ++r)  // to come while the product runs
      for (int v = 0; v < N; ++v) __builtin_prefetch(sums_row(p, at, r) + column + v * lanes, 1);
    V acc[rows][N];
    clear(acc);
    accumulate_packed<rows, N>(acc, packed_group(p, slot, at), count,
                               panel(p, slot, at.head * p.panels_of_head() + at.panel),
                               block_units);
    const Sums<rows, N, C> block(acc);
    for (Index r = 0; r < rows && r < have; ++r) {
      C* to = sums_row(p, at, r) + column;
      for (int v = 0; v < N; ++v, to += lanes) {
        const Index left = whole ? Index{lanes} : p.columns - column - v * lanes;
        if (left <= 0) break;
        store_units(start ? block.v[r][v] : load_units<C>(to, left) + block.v[r][v], to, left);
      }
    }
  }

  void clear_block(const Product& p, const Spot& at) {
    const Index column = at.panel * block_units, count = least(block_units, p.columns - column);
    for (Index r = 0; r < rows_of(p, at); ++r) {
      C* to = sums_row(p, at, r) + column;
      for (Index u = 0; u < count; ++u) to[u] = C(0);
    }
  }

  void narrow_block(const Product& p, const Spot& at) {
    const Index column = at.panel * block_units, count = least(block_units, p.columns - column);
    for (Index r = 0; r < rows_of(p, at); ++r)
      scatter(result_row(p, at, r) + column, sums_row(p, at, r) + column, count);
  }

  // Each plane of the gates' gradients is summed over the pairs once, for the biases that take it.
  void vector_gradients(Index d, const Parameters& to, int thread, int threads) {
    if (!to.bias_ih.data && !to.bias_hh.data) return;
    const Range mine = split(ceil_div(layer_.H, lanes), thread, threads);
    for (int plane = 0; plane < Cell::gradients; ++plane)
      in_blocks_of_rows<kBiasVectors>(mine.end - mine.begin, [&](auto count, Index m) {
        bias_gradient<count.value>(d, to, plane, (mine.begin + m) * lanes);
      });
  }

  // N vectors of a plane, from `unit` on.
  template <int N>
  void bias_gradient(Index d, const Parameters& to, int plane, Index unit) {
    const C* from = group_[d].d_gates + plane * Hp_ + unit;
    C* grown = vector_sums_ ? vector_sums_ + plane * Hp_ + unit : nullptr;
    V total[N];
    for (int v = 0; v < N; ++v) total[v] = layer_.starts_sums ? V(0) : V::load(grown + v * lanes);
    for (Index n0 = 0; n0 < steps_.pairs; n0 += kPairs) {
      V sum[1][N];
      clear(sum);
      const Index end = least(n0 + kPairs, steps_.pairs);
      for (Index n = n0; n < end; ++n)
#pragma GCC unroll 8
        for (int v = 0; v < N; ++v) sum[0][v] = sum[0][v] + V::load(from + n * width_ + v * lanes);
      for (int v = 0; v < N; ++v) total[v] = total[v] + sum[0][v];
    }
    for (int v = 0; v < N; ++v) {
      if (!layer_.ends_sums)
        total[v].store(grown + v * lanes);
      else
        store_biases(to, plane, unit + v * lanes, total[v]);
    }
  }

  void store_biases(const Parameters& to, int plane, Index unit, V sum) const {
    const auto store = [&](const Weight& bias, const int* planes) {
      for (int gate = 0; gate < gates && bias.data; ++gate)
        if (planes[gate] == plane)
          store_units(sum, static_cast<S*>(bias.data) + gate * layer_.H + unit, layer_.H - unit);
    };
    store(to.bias_ih, Cell::input_gradient);
    store(to.bias_hh, Cell::hidden_gradient);
  }

  const Layer& layer_;
  const Steps& steps_;
  const Index Hp_, Op_, saved_width_, width_;
  const Index heads_, head_units_, head_outputs_;  // and the hidden units and outputs of one
  const Index head_out_blocks_, blocks_, out_blocks_, second_blocks_;
  const Index second_sums_;  // products of an output of the second matrix
  const Index in_blocks_;
  // Planes of the gradients that are multiplied: for input and W_ih, for h and W_hh.
  int every_gate_[gates];
  Group group_[2] = {};
  C *zeros_ = nullptr, *d_out_ = nullptr;
  // Of the weights' gradients.
  C *packed_rows_ = nullptr, *panels_ = nullptr, *sums_ = nullptr, *vector_sums_ = nullptr;
  Index rows_slot_ = 0, panels_slot_ = 0, slots_ = 1;
  const C** next_rows_of_all_ = nullptr;
  std::size_t used_ = 0;
  const C** next_rows_ = nullptr;  // the thread's own
};

}  // namespace fastrnn::FASTRNN_ISA
