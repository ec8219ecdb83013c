// One layer backward through time where something adds to the cell (general_forward.h).
//
// Maths         csrc/cells/. A step is, for all the thread's rows, what comes from the step after
//               through W_hh, then row by row:
//                 dh   = clip(W_hhᵀ·(h side's gradients) ∘ mask + carried + dy)
//                 zoneout's part of dh to `carried`, the rest through the cell
//                 with layer norm the gradients of both sides, through their norms
//               What goes to a state before a step that starts afresh belongs to the state after a
//               reset: it is added up row by row and the rows' sums at the end.
// Layouts       d_gates  [D][pairs][width]: the cell's planes of gradients; with layer norm then
//                        those of the sums of x and of h, [gate] each; with peephole da_i·c,
//                        da_f·c, da_o·c'; with layer norm of c d(γy + β)·y and d(γy + β)
//               d_seen   [B][Op] what comes through W_hh; d_units [B][Hp] through W_hr, or of r∘h
//               reset_h  [B][Op], reset_c [B][Hp]: sums for the state after a reset
// Sums, threads as backward.h; rows are dealt as in general_forward.h.
#pragma once

#include "backward.h"
#include "general.h"

namespace fastrnn::FASTRNN_ISA {

template <class Cell, class S>
class GeneralBackward : Backward<Cell, S> {
  using Base = Backward<Cell, S>;
  using K = Shape<Cell, S>;
  using Base::layer_, Base::steps_, Base::Hp_, Base::Op_, Base::group_, Base::zeros_;
  using Base::next_rows_, Base::rows, Base::block_units, Base::head_units_, Base::head_outputs_;
  using K::lanes, K::gates, K::first, K::wide;
  using typename Base::Columns, typename Base::Operand, typename Base::PairWalk;
  using typename Base::Position, typename Base::Vector;
  using typename K::C, typename K::V;
  friend Base;

 public:
  GeneralBackward(const Layer& layer, void* base)
      : Base(layer, base),
        plane_count_(gates * Hp_),
        norm_at_((Cell::saved + (layer.P ? 1 : 0)) * Hp_),
        peephole_at_((Cell::gradients + (layer.maths.layer_norm ? 2 * gates : 0)) * Hp_),
        norm_c_at_(peephole_at_ + (layer.maths.peephole ? 3 * Hp_ : 0)),
        limit_(static_cast<C>(layer.maths.grad_clip)),
        zoneout_h_(layer.zoneout_h_mask, layer.maths.zoneout_h, layer.O),
        zoneout_c_(layer.zoneout_c_mask, layer.maths.zoneout_c, layer.H) {
    if (layer.maths.layer_norm) {
      for (int gate = 0; gate < gates; ++gate) {
        of_x_[gate] = Cell::gradients + gate;
        of_h_[gate] = Cell::gradients + gates + gate;
      }
      Base::input_planes_ = of_x_;
      Base::hidden_planes_ = of_h_;
    }
    Arena arena(base);
    arena.take<char>(static_cast<Index>(Base::used()));
    const Index B = steps_.B;
    for (Index d = 0; d < layer.directions; ++d) {
      Constants& k = constants_[d];
      k.reset_h = arena.take<C>(Op_);
      k.reset_c = Cell::states > 1 ? arena.take<C>(Hp_) : nullptr;
      k.d_seen = arena.take<C>(B * Op_);
      k.d_units = Base::second_blocks_ ? arena.take<C>(B * Hp_) : nullptr;
      k.d_reset_h = group_[d].d_reset_h;
      k.d_reset_c = group_[d].d_reset_c;
      k.mask = layer.dropout_mask.data ? arena.take<C>(B * Op_) : nullptr;
      if (layer.maths.layer_norm) {
        k.gain_x = arena.take<C>(plane_count_);
        k.gain_h = arena.take<C>(plane_count_);
        k.gain_c = arena.take<C>(Hp_);
        k.bias_c = arena.take<C>(Hp_);
      }
      if (layer.maths.peephole) k.peephole = arena.take<C>(3 * Hp_);
    }
    scratch_of_all_ = arena.take<C>(layer.plan.threads * thread_scratch());
    used_ = arena.used();
  }

  std::size_t used() const { return used_; }
  void run(int thread, int threads) {
    this->run_as(*this, thread, threads);
    if (!layer_.ends_sums) return;
    for (Index d = 0; d < layer_.directions; ++d) reset_gradients(d, thread, threads);
  }

 private:
  struct Constants {
    C *reset_h, *reset_c;      // [Op], [Hp]: the state after a reset
    C *d_seen, *d_units;       // [B][Op], [B][Hp]
    C *d_reset_h, *d_reset_c;  // [B][Op], [B][Hp]
    C* mask;                   // [B][Op]
    C *gain_x, *gain_h;        // [G·Hp]
    C *gain_c, *bias_c;        // [Hp]
    C* peephole;               // [3·Hp]
  };

  // A thread's rows: of h's size one, of hidden units three.
  Index thread_scratch() const { return Op_ + 3 * Hp_; }

  void take_thread(int thread) {
    Base::take_thread(thread);
    outputs_ = scratch_of_all_ + thread * thread_scratch();
    for (int i = 0; i < 3; ++i) units_[i] = outputs_ + Op_ + i * Hp_;
  }

  // ---- before the last step ---------------------------------------------------------------------

  void prepare(int thread, int threads) {
    Base::prepare(thread, threads);
    const Range mine = split(steps_.B, thread, threads);
    for (Index d = 0; d < layer_.directions; ++d) {
      if (thread == 0) load_constants(d);
      if (layer_.starts_sums) clear_reset_sums(d, split(layer_.rows, thread, threads));
      C* mask = constants_[d].mask;
      for (Index i = mine.begin; i < mine.end && mask; ++i)
        load_state<S>(mask + i * Op_, layer_.dropout_mask, d, steps_.order[i], layer_.O);
    }
  }

  void clear_reset_sums(Index d, const Range& mine) {
    const Constants& k = constants_[d];
    for (Index at = mine.begin * Op_; at < mine.end * Op_; ++at) k.d_reset_h[at] = C(0);
    for (Index at = mine.begin * Hp_; at < mine.end * Hp_ && k.d_reset_c; ++at)
      k.d_reset_c[at] = C(0);
  }

  void load_constants(Index d) {
    const Parameters& p = layer_.parameters[d];
    const Constants& k = constants_[d];
    const Index H = layer_.H;
    load_state<S>(k.reset_h, layer_.reset_h, d, 0, layer_.O);
    if (Cell::states > 1) load_state<S>(k.reset_c, layer_.reset_c, d, 0, H);
    if (layer_.maths.layer_norm) {
      load_planes<S>(k.gain_x, p.norm_ih, gates, H);
      load_planes<S>(k.gain_h, p.norm_hh, gates, H);
      load_planes<S>(k.gain_c, p.norm_c, 1, H);
      load_planes<S>(k.bias_c, p.norm_c_bias, 1, H);
    }
    if (layer_.maths.peephole) {
      load_planes<S>(k.peephole, p.weight_ci, 1, H);
      load_planes<S>(k.peephole + Hp_, p.weight_cf, 1, H);
      load_planes<S>(k.peephole + 2 * Hp_, p.weight_co, 1, H);
    }
  }

  // ---- the steps --------------------------------------------------------------------------------

  Index recur(Index d, const Share& share, Index end) {
    const Deal deal(steps_, share, rows);
    const Walk walk{steps_, Base::reverse(d)};
    const Range outs = split(Base::out_blocks_, share.column, share.columns);
    const Range seconds = split(Base::second_blocks_, share.column, share.columns);
    for (Index s = end - 1; s >= 0; --s) {
      const Position p{d, walk.step(s), deal, walk};
      const Index n = deal.count(steps_.active[p.t]), next = walk.following(p.t);
      const Range mine = split(n, share.column, share.columns);
      bool any = false;  // some row has a step after this one
      for (Index j = 0; j < n; ++j) {
        const Index i = deal.row(j);
        const bool last = walk.last(p.t, i);
        next_rows_[j] = last ? nullptr : Base::gates_row(d, steps_.offset[next] + i);
        any |= !last;
      }
      for (Index b = outs.begin; b < outs.end && any; ++b) hidden_product(d, deal, b, n);
      share.team->wait(share.columns);
      for (Index j = mine.begin; j < mine.end; ++j) hidden_row(p, deal.row(j));
      if (Base::second_blocks_) second_step(p, share, seconds, n, mine);
      if (share.team->wait(share.columns) && share.may_shrink && s > 0) return s;
    }
    initial_gradients(d, deal, share, outs);
    return 0;
  }

  // What comes from the step after through a block of W_hh, for the outputs of one head.
  void hidden_product(Index d, const Deal& deal, Index b, Index n) {
    const Index head = b / Base::head_out_blocks_, unit = b % Base::head_out_blocks_ * block_units;
    const Columns w = Base::hidden_weights(d, b);
    in_blocks_of_rows<rows>(n, [&](auto count, Index j) {
      constexpr int R = decltype(count)::value;
      V acc[R][wide];
      clear(acc);
      for (int gate = 0; gate < first; ++gate) {
        const C* plane[R];
        for (int r = 0; r < R; ++r)
          plane[r] = next_rows_[j + r]
                         ? next_rows_[j + r] + Base::hidden_planes_[gate] * Hp_ + head * head_units_
                         : zeros_;
        accumulate<R, wide>(acc, plane, head_units_, w.at(gate * head_units_), w.stride);
      }
      const Sums<R, wide, C> sums(acc);
      for (int r = 0; r < R; ++r)
        store_tiles(sums.v[r],
                    constants_[d].d_seen + deal.row(j + r) * Op_ + head * head_outputs_ + unit,
                    head_outputs_ - unit);
    });
  }

  // Tiles of a block of outputs, of which `left` are wanted.
  FASTRNN_NOINLINE static void store_tiles(const V* sums, C* to, Index left) {
    for (int v = 0; v < wide && left > 0; ++v, to += lanes, left -= lanes)
      store_units(sums[v], to, left);
  }

  FASTRNN_INLINE V clip(V d) const { return limit_ > 0 ? clamp(d, V(limit_)) : d; }

  // What reaches the state before the first of a row's steps that come after step t, or a part of
  // it: to the state at t or, where an episode begins in between, to that after a reset.
  FASTRNN_INLINE V from_after(V d, bool fresh, C* d_reset) const {
    if (!fresh) return d;
    (V::load(d_reset) + d).store(d_reset);
    return V(0);
  }

  // Of W_hh's operand and of what passes it.
  FASTRNN_INLINE V to_state_before(const Constants& k, const C* carried, Index i, Index u) const {
    V d = V::load(k.d_seen + i * Op_ + u);
    if (k.mask) d = d * V::load(k.mask + i * Op_ + u);
    return d + V::load(carried + u);
  }

  // The whole gradient of h, of which zoneout's part is carried on; then through the cell, or,
  // where there is a projection, no further.
  FASTRNN_NOINLINE void hidden_row(const Position& p, Index i) {
    const Constants& k = constants_[p.d];
    const auto& g = group_[p.d];
    const bool last = p.walk.last(p.t, i);
    const bool fresh = !last && p.walk.starts_fresh(p.walk.following(p.t), i);
    const Operand dy = Base::output_gradient(p, i);
    const bool* keeps = zoneout_h_.row(steps_, p.d, p.t, i);
    C* carried = g.carried + i * Op_;
    C* to = layer_.P ? g.d_proj + (steps_.offset[p.t] + i) * Op_ : outputs_;
    for (Index u = 0; u < layer_.O; u += lanes) {
      V dh = last ? V::load(g.d_h_n + i * Op_ + u)
                  : from_after(to_state_before(k, carried, i, u), fresh, k.d_reset_h + i * Op_ + u);
      dh = clip(dh + Base::operand_tile(dy, u, layer_.O));
      V d_old(0);
      if (zoneout_h_.on()) zoneout_h_.divide(keeps, u, dh, d_old, dh);
      d_old.store(carried + u);
      dh.store(to + u);
    }
    if (!layer_.P) cell_row(p, i, outputs_);
  }

  // The other product of a step: through W_hr to the hidden units, or through W_hn to r∘h.
  void second_step(const Position& p, const Share& share, const Range& blocks, Index n,
                   const Range& mine) {
    share.team->wait(share.columns);
    const Index plane = layer_.P ? 0 : Base::hidden_planes_[first % gates] * Hp_;
    for (Index j = 0; j < n; ++j) {
      const Index pair = steps_.offset[p.t] + p.deal.row(j);
      next_rows_[j] =
          layer_.P ? group_[p.d].d_proj + pair * Op_ : Base::gates_row(p.d, pair) + plane;
    }
    for (Index b = blocks.begin; b < blocks.end; ++b) second_product(p, b, n);
    share.team->wait(share.columns);
    for (Index j = mine.begin; j < mine.end; ++j) {
      const Index i = p.deal.row(j);
      if (layer_.P)
        cell_row(p, i, constants_[p.d].d_units + i * Hp_);
      else
        operand_row(p, i);
    }
  }

  void second_product(const Position& p, Index b, Index n) {
    const Index heads = layer_.P ? 1 : Base::heads_, units_of_head = layer_.H / heads;
    const Index blocks = Base::second_blocks_ / heads;
    const Index head = b / blocks, unit = b % blocks * block_units;
    const C* w = Base::second_weights(p.d, b);
    in_blocks_of_rows<rows>(n, [&](auto count, Index j) {
      constexpr int R = decltype(count)::value;
      V acc[R][wide];
      clear(acc);
      const C* d[R];
      for (int r = 0; r < R; ++r) d[r] = next_rows_[j + r] + head * units_of_head;
      // The gates of a second product are planes, one after the other; W_hr has one.
      const Index planes = layer_.P ? 1 : gates - first;
      const Index count_of_plane = Base::second_sums_ / (planes > 0 ? planes : 1);
      for (Index plane = 0; plane < planes; ++plane) {
        accumulate<R, wide>(acc, d, count_of_plane, w + plane * count_of_plane * block_units);
        for (int r = 0; r < R; ++r) d[r] += Hp_;
      }
      const Sums<R, wide, C> sums(acc);
      for (int r = 0; r < R; ++r)
        store_tiles(sums.v[r],
                    constants_[p.d].d_units + p.deal.row(j + r) * Hp_ + head * units_of_head + unit,
                    units_of_head - unit);
    });
  }

  // ---- the cell, row by row
  // -----------------------------------------------------------------------

  // h before a pair's step, of which W_hh sees what the mask lets through.
  FASTRNN_INLINE Operand hidden_before(Index d, Index t, Index i) const {
    const Walk walk{steps_, Base::reverse(d)};
    if (walk.starts_fresh(t, i)) return {nullptr, 1, constants_[d].reset_h};
    return Base::previous_hidden(d, t, i);
  }
  FASTRNN_INLINE V seen(const Constants& k, const Operand& h, Index i, Index u) const {
    const V all = Base::operand_tile(h, u, layer_.O);
    return k.mask ? all * V::load(k.mask + i * Op_ + u) : all;
  }

  // d_units: [Hp] the gradient of the hidden units.
  void cell_row(const Position& p, Index i, const C* d_units) {
    C* to = Base::gates_row(p.d, steps_.offset[p.t] + i);
    const C* saved = Base::saved_row(p, i);
    if constexpr (Cell::states > 1)
      state_row(p, i, d_units, saved, to);
    else
      stateless_row(p, i, d_units, saved, to);
    if (!layer_.maths.layer_norm) return;
    const Constants& k = constants_[p.d];
    if constexpr (K::two_products) {
      hidden_norm(k, first, gates, saved, kScaleSecond, to);
    } else {
      hidden_norm(k, 0, gates, saved, kScaleH, to);
      input_norm(k, saved, to);
    }
  }

  // Of the cell's gradients for one side the sums' before their norm; in the order of the gates.
  void hidden_norm(const Constants& k, int begin, int end, const C* saved, NormScalar scale,
                   C* to) const {
    if (begin == end) return;
    C* d = to + of_h_[begin] * Hp_;
    for (int gate = begin; gate < end; ++gate)
      gather(to + of_h_[gate] * Hp_, to + Cell::hidden_gradient[gate] * Hp_, 1, Hp_);
    normalize_row_backward(d, d, end - begin, layer_.H, k.gain_h + begin * Hp_,
                           saved + norm_at_ + plane_count_ + begin * Hp_,
                           saved[norm_at_ + 2 * plane_count_ + scale]);
  }
  void input_norm(const Constants& k, const C* saved, C* to) const {
    C* d = to + of_x_[0] * Hp_;
    for (int gate = 0; gate < gates; ++gate)
      gather(to + of_x_[gate] * Hp_, to + Cell::input_gradient[gate] * Hp_, 1, Hp_);
    normalize_row_backward(d, d, gates, layer_.H, k.gain_x, saved + norm_at_,
                           saved[norm_at_ + 2 * plane_count_ + kScaleX]);
  }

  void stateless_row(const Position& p, Index i, const C* d_units, const C* saved, C* to) {
    const Operand h = Cell::carries ? hidden_before(p.d, p.t, i) : Operand{};
    C* carried = group_[p.d].carried + i * Op_;
    for (Index unit = 0; unit < layer_.H; unit += lanes) {
      V kept[Cell::saved], previous[1], d_previous[1], d_a[Cell::gradients];
      const V d_next[1] = {V::load(d_units + unit)};
      for (int s = 0; s < Cell::saved; ++s) kept[s] = V::load(saved + s * Hp_ + unit);
      previous[0] = Cell::carries ? Base::operand_tile(h, unit, layer_.O) : V(0);
      if constexpr (K::two_products) {
        Cell::backward_second(layer_.maths, kept, previous, d_next, d_previous, d_a);
        for (int gate = 1; gate < gates; ++gate)
          d_a[Cell::hidden_gradient[gate]].store(to + Cell::hidden_gradient[gate] * Hp_ + unit);
      } else {
        Cell::backward(layer_.maths, kept, previous, previous, d_next, d_previous, d_a);
        for (int a = 0; a < Cell::gradients; ++a) d_a[a].store(to + a * Hp_ + unit);
      }
      if (Cell::carries) (V::load(carried + unit) + d_previous[0]).store(carried + unit);
    }
  }

  // Reset-before GRU: what follows d(r∘h).
  FASTRNN_NOINLINE void operand_row(const Position& p, Index i) {
    const Constants& k = constants_[p.d];
    C* to = Base::gates_row(p.d, steps_.offset[p.t] + i);
    const C* saved = Base::saved_row(p, i);
    if constexpr (K::two_products) {
      const Operand h = hidden_before(p.d, p.t, i);
      C* carried = group_[p.d].carried + i * Op_;
      for (Index unit = 0; unit < layer_.H; unit += lanes) {
        V kept[Cell::saved], d_a[Cell::gradients];
        for (int s = 0; s < Cell::saved; ++s) kept[s] = V::load(saved + s * Hp_ + unit);
        const V previous[1] = {seen(k, h, i, unit)};
        const V d_operand[1] = {V::load(k.d_units + i * Hp_ + unit)};
        V d_seen[1] = {V(0)};
        Cell::backward_first(layer_.maths, kept, previous, d_operand, d_seen, d_a);
        if (k.mask) d_seen[0] = d_seen[0] * V::load(k.mask + i * Op_ + unit);
        (V::load(carried + unit) + d_seen[0]).store(carried + unit);
        d_a[0].store(to + Cell::hidden_gradient[0] * Hp_ + unit);
      }
    }
    if (!layer_.maths.layer_norm) return;
    hidden_norm(k, 0, first, saved, kScaleH, to);
    input_norm(k, saved, to);
  }

  // ---- a cell with a c
  // ----------------------------------------------------------------------------

  // c before a pair's step, [Hp] or up to H.
  FASTRNN_INLINE const C* state_before(const Walk& walk, Index d, Index t, Index i) const {
    if (walk.starts_fresh(t, i)) return constants_[d].reset_c;
    if (walk.first(t, i)) return group_[d].initial_c + i * Hp_;
    return at<const C>(layer_.cell, steps_, walk.previous(t), i) + d * layer_.H;
  }

  // c' of a pair: the c that forward kept or, where zoneout has changed that, made again.
  FASTRNN_INLINE V state_after(const C* c, const V* saved, V before, Index unit) const {
    return zoneout_c_.on() ? Cell::next_state(saved, before)
                           : load_units<C>(c + unit, layer_.H - unit);
  }

  void state_row(const Position& p, Index i, const C* d_units, const C* saved, C* to) {
    output_half(p, i, d_units, saved, to);
    if (layer_.maths.layer_norm) {
      const C scale = saved[norm_at_ + 2 * plane_count_ + kScaleC];
      C *d_y = to + norm_c_at_ + Hp_, *d_c = units_[0];
      normalize_row_backward(units_[1], d_y, 1, layer_.H, constants_[p.d].gain_c, units_[2], scale);
      for (Index unit = 0; unit < layer_.H; unit += lanes)
        (V::load(d_c + unit) + V::load(units_[1] + unit)).store(d_c + unit);
    }
    state_half(p, i, saved, to);
  }

  // The gradient of c' to units_[0], but for what passes a norm, zoneout's part of that of c to
  // d_c. With layer norm y goes to units_[2] and the gradients of its scale and bias to `to`.
  void output_half(const Position& p, Index i, const C* d_units, const C* saved, C* to) {
    const Constants& k = constants_[p.d];
    const bool last = p.walk.last(p.t, i);
    const bool fresh = !last && p.walk.starts_fresh(p.walk.following(p.t), i);
    const bool* keeps = zoneout_c_.row(steps_, p.d, p.t, i);
    const C* before = state_before(p.walk, p.d, p.t, i);
    const C* after = at<const C>(layer_.cell, steps_, p.t, i) + p.d * layer_.H;
    const C* scalars = saved + norm_at_ + 2 * plane_count_;
    const int o = Cell::output_gate;
    for (Index unit = 0; unit < layer_.H; unit += lanes) {
      V kept[Cell::saved], d_a[Cell::gradients];
      for (int s = 0; s < Cell::saved; ++s) kept[s] = V::load(saved + s * Hp_ + unit);
      const V c = state_after(after, kept, load_units<C>(before + unit, layer_.H - unit), unit);
      const V d_out = V::load(d_units + unit);
      C* d_c = group_[p.d].d_c + i * Hp_ + unit;
      V d = from_after(V::load(d_c), fresh, k.d_reset_c + i * Hp_ + unit);
      if (layer_.d_cell.data) d = d + Base::cell_gradient(p, i, unit);
      if (zoneout_c_.on()) {
        V d_old;
        zoneout_c_.divide(keeps, unit, clip(d), d_old, d);
        d_old.store(d_c);
      }
      if (layer_.maths.layer_norm) {
        const V y = normalize(c, V(scalars[kMeanC]), V(scalars[kScaleC]));
        const V out = fma(y, V::load(k.gain_c + unit), V::load(k.bias_c + unit));
        const V d_y = Cell::backward_output(layer_.maths, kept, out, d_out, V(0), d_a);
        y.store(units_[2] + unit);
        (d_y * y).store(to + norm_c_at_ + unit);
        d_y.store(to + norm_c_at_ + Hp_ + unit);
      } else {
        d = Cell::backward_output(layer_.maths, kept, c, d_out, d, d_a);
      }
      if (k.peephole) {
        d = fma(d_a[o], V::load(k.peephole + 2 * Hp_ + unit), d);
        (d_a[o] * c).store(to + peephole_at_ + 2 * Hp_ + unit);
      }
      d_a[o].store(to + o * Hp_ + unit);
      d.store(units_[0] + unit);
    }
  }

  void state_half(const Position& p, Index i, const C* saved, C* to) {
    const Constants& k = constants_[p.d];
    const C* before = state_before(p.walk, p.d, p.t, i);
    const int o = Cell::output_gate;
    for (Index unit = 0; unit < layer_.H; unit += lanes) {
      V kept[Cell::saved], d_a[Cell::gradients];
      for (int s = 0; s < Cell::saved; ++s) kept[s] = V::load(saved + s * Hp_ + unit);
      const V c = load_units<C>(before + unit, layer_.H - unit);
      V d = V::load(units_[0] + unit);
      if (!zoneout_c_.on()) d = clip(d);
      V d_before = Cell::backward_state(layer_.maths, kept, c, d, d_a);
      if (k.peephole) {
        const V w[2] = {V::load(k.peephole + unit), V::load(k.peephole + Hp_ + unit)};
        d_before = Cell::peep_backward(w, d_a, d_before);
        (d_a[0] * c).store(to + peephole_at_ + unit);
        (d_a[1] * c).store(to + peephole_at_ + Hp_ + unit);
      }
      for (int a = 0; a < Cell::gradients; ++a)
        if (a != o) d_a[a].store(to + a * Hp_ + unit);
      C* d_c = group_[p.d].d_c + i * Hp_ + unit;
      if (zoneout_c_.on()) d_before = d_before + V::load(d_c);
      d_before.store(d_c);
    }
  }

  // ---- past the first step
  // ------------------------------------------------------------------------

  // d_h0 and d_c0 or, of rows that begin with a reset, what that state gets.
  void initial_gradients(Index d, const Deal& deal, const Share& share, const Range& outs) {
    const Walk walk{steps_, Base::reverse(d)};
    const Index n = deal.count(steps_.T > 0 ? steps_.active[0] : 0);
    for (Index j = 0; j < n; ++j) {
      const Index i = deal.row(j);
      next_rows_[j] = Base::gates_row(d, steps_.offset[Base::first_step(d, i)] + i);
    }
    for (Index b = outs.begin; b < outs.end; ++b) hidden_product(d, deal, b, n);
    share.team->wait(share.columns);
    const Range mine = split(n, share.column, share.columns);
    for (Index j = mine.begin; j < mine.end; ++j) {
      const Index i = deal.row(j);
      initial_row(d, i, walk.starts_fresh(Base::first_step(d, i), i));
    }
  }

  void initial_row(Index d, Index i, bool fresh) {
    const Constants& k = constants_[d];
    const auto& g = group_[d];
    for (Index u = 0; u < layer_.O; u += lanes)
      Base::store_initial_hidden(d, i, u,
                                 from_after(to_state_before(k, g.carried + i * Op_, i, u), fresh,
                                            k.d_reset_h + i * Op_ + u));
    if constexpr (Cell::states > 1)
      for (Index u = 0; u < layer_.H; u += lanes)
        Base::store_initial_cell(
            d, i, u, from_after(V::load(g.d_c + i * Hp_ + u), fresh, k.d_reset_c + i * Hp_ + u));
  }

  // Of the state after a reset: the sum of the rows'.
  void reset_gradients(Index d, int thread, int threads) {
    const Constants& k = constants_[d];
    reset_gradient(layer_.d_reset_h, d, k.d_reset_h, layer_.O, thread, threads);
    if (Cell::states > 1)
      reset_gradient(layer_.d_reset_c, d, k.d_reset_c, layer_.H, thread, threads);
  }

  void reset_gradient(void* to, Index d, const C* of_rows, Index units, int thread, int threads) {
    if (!to) return;
    const Index width = padded(units);
    const Range mine = split(ceil_div(units, lanes), thread, threads);
    for (Index u = mine.begin * lanes; u < mine.end * lanes; u += lanes) {
      V sum(0);
      for (Index i = 0; i < layer_.rows; ++i) sum = sum + V::load(of_rows + i * width + u);
      store_units(sum, static_cast<S*>(to) + d * units + u, units - u);
    }
  }

  // ---- the weights
  // --------------------------------------------------------------------------------

  Operand operand(Index d, int which, const PairWalk& pair, Index n) const {
    if (which != Base::kHidden) return Base::operand(d, which, pair, n);
    const Constants& k = constants_[d];
    const Operand h = hidden_before(d, pair.t, pair.i);
    if (!k.mask) return h;
    for (Index u = 0; u < layer_.O; u += lanes) seen(k, h, pair.i, u).store(outputs_ + u);
    return {nullptr, 1, outputs_};
  }

  void vector_gradients(Index d, const Parameters& to, int thread, int threads) {
    Base::vector_gradients(d, to, thread, threads);
    const Weight* peepholes[] = {&to.weight_ci, &to.weight_cf, &to.weight_co};
    const Weight* norms[] = {&to.norm_c, &to.norm_c_bias};
    for (int i = 0; i < 3; ++i)
      plane_gradient(d, peephole_at_ + i * Hp_, {*peepholes[i], Base::kPeephole + i, 1}, thread,
                     threads);
    for (int i = 0; i < 2; ++i)
      plane_gradient(d, norm_c_at_ + i * Hp_, {*norms[i], Base::kNormC + i, 1}, thread, threads);
    gain_gradient(d, Cell::input_gradient, norm_at_, {to.norm_ih, Base::kNormX, gates}, thread,
                  threads);
    gain_gradient(d, Cell::hidden_gradient, norm_at_ + plane_count_,
                  {to.norm_hh, Base::kNormH, gates}, thread, threads);
  }

  // The sum of a plane of d_gates.
  void plane_gradient(Index d, Index plane, const Vector& vector, int thread, int threads) {
    Base::sum_pairs(vector, thread, threads, [&](Index, Index unit) {
      const C* from = group_[d].d_gates + plane + unit;
      const Index width = Base::width_;
      return [=](Index n) { return V::load(from + n * width); };
    });
  }

  // Of a norm's gains: gradients of the gates times what was normalised.
  void gain_gradient(Index d, const int* planes, Index norm, const Vector& vector, int thread,
                     int threads) {
    Base::sum_pairs(vector, thread, threads, [&](Index gate, Index unit) {
      const C* from = group_[d].d_gates + planes[gate] * Hp_ + unit;
      const C* y = Base::saved_plane(d, 0, 0) + norm + gate * Hp_ + unit;
      const Index width = Base::width_, saved_width = Base::saved_width_;
      return [=](Index n) { return V::load(from + n * width) * V::load(y + n * saved_width); };
    });
  }

  const Index plane_count_;              // values of a row of planes: G·Hp
  const Index norm_at_;                  // of what layer norm saved, in a pair's values
  const Index peephole_at_, norm_c_at_;  // in a row of d_gates
  const C limit_;
  const Zoneout<C> zoneout_h_, zoneout_c_;
  int of_x_[gates] = {}, of_h_[gates] = {};  // planes of d_gates, with layer norm
  Constants constants_[2] = {};
  C* scratch_of_all_ = nullptr;
  std::size_t used_ = 0;
  // The thread's own rows.
  C *outputs_ = nullptr, *units_[3] = {};
};

}  // namespace fastrnn::FASTRNN_ISA
