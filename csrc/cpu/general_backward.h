// One layer backward through time where something adds to the cell (general_forward.h).
//
// Maths         csrc/cells/. A step is, for all the thread's rows, what comes from the step after
//               through W_hh, then row by row:
//                 dh   = clip(W_hhᵀ·(h side's gradients) ∘ mask + carried + dy)
//                 zoneout's part of dh to `carried`, the rest through the cell
//                 with layer norm the gradients of both sides, through their norms
//               What goes to a state before a step that starts afresh belongs to the state after a
//               reset: it is added up row by row and the rows' sums at the end.
//               Gradients of gains and peepholes are added up row by row, too.
// Layouts       d_gates  [D][pairs][width]: as saved; the cell's planes of gradients in the place
//                        of its saved values, those of the sums of x and h before their norms in
//                        that of the normalised
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
  using K = BackwardTiling<Cell, S>;
  using Base::layer_, Base::steps_, Base::Hp_, Base::Op_, Base::group_, Base::zeros_;
  using Base::next_rows_, Base::weights_, Base::gradients_;
  using K::lanes, K::gates, K::first, K::wide, K::rows, K::block_units;
  using typename Base::Columns, typename Base::Operand, typename Base::Position;
  using typename K::C, typename K::V;
  friend Base;

 public:
  GeneralBackward(const Layer& layer, void* base)
      : Base(layer, base),
        heads_(layer.maths.heads),
        head_units_(layer.H / heads_),
        head_outputs_(layer.O / heads_),
        plane_count_(gates * Hp_),
        norm_at_((Cell::saved + (layer.P ? 1 : 0)) * Hp_),
        sums_width_(Base::row_sums_width(layer)),
        norm_c_sums_(2 * plane_count_),
        peephole_sums_(sums_width_ - 3 * Hp_),
        limit_(static_cast<C>(layer.maths.grad_clip)),
        zoneout_h_(layer.zoneout_h_mask, layer.maths.zoneout_h, layer.O),
        zoneout_c_(layer.zoneout_c_mask, layer.maths.zoneout_c, layer.H) {
    if (layer.maths.layer_norm) {
      const int first_plane = static_cast<int>(norm_at_ / Hp_);
      for (int gate = 0; gate < gates; ++gate) {
        of_x_[gate] = first_plane + gate;
        of_h_[gate] = first_plane + gates + gate;
      }
      gradients_.input_planes = of_x_;
      gradients_.hidden_planes = of_h_;
    }
    Arena arena(base);
    arena.take<char>(static_cast<Index>(Base::used()));
    const Index B = steps_.B;
    for (Index d = 0; d < layer.directions; ++d) {
      Constants& k = constants_[d];
      k.reset_h = arena.take<C>(Op_);
      k.reset_c = Cell::states > 1 ? arena.take<C>(Hp_) : nullptr;
      k.d_seen = arena.take<C>(B * Op_);
      k.d_units = second_blocks() ? arena.take<C>(B * Hp_) : nullptr;
      k.d_reset_h = group_[d].d_reset_h;
      k.d_reset_c = group_[d].d_reset_c;
      k.sums = group_[d].row_sums;
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
    C* sums;                   // [B][sums_width]
    C* mask;                   // [B][Op]
    C *gain_x, *gain_h;        // [G·Hp]
    C *gain_c, *bias_c;        // [Hp]
    C* peephole;               // [3·Hp]
  };

  // Blocks of hidden units of the second product: through W_hr, or through W_hn.
  Index second_blocks() const { return layer_.P ? Base::blocks_ : weights_.hn_blocks(); }

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
      if (layer_.starts_sums) clear_sums(d, split(layer_.rows, thread, threads));
      C* mask = constants_[d].mask;
      for (Index i = mine.begin; i < mine.end && mask; ++i)
        load_state<S>(mask + i * Op_, layer_.dropout_mask, d, steps_.order[i], layer_.O);
    }
  }

  // Of some rows.
  void clear_sums(Index d, const Range& mine) {
    const Constants& k = constants_[d];
    const auto clear_rows = [&](C* sums, Index width) {
      for (Index at = mine.begin * width; at < mine.end * width && sums; ++at) sums[at] = C(0);
    };
    clear_rows(k.d_reset_h, Op_);
    clear_rows(k.d_reset_c, Hp_);
    clear_rows(k.sums, sums_width_);
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
    const Range outs = split(weights_.out_blocks(), share.column, share.columns);
    const Range seconds = split(second_blocks(), share.column, share.columns);
    for (Index s = end - 1; s >= 0; --s) {
      if (share.resting > 0 && share.team->gathers(share.resting)) return s + 1;
      const Position p{d, walk.step(s), deal, walk};
      const Index n = deal.count(steps_.active[p.t]), next = walk.following(p.t);
      const Range mine = split(n, share.column, share.columns);
      bool any = false;  // some row has a step after this one
      for (Index j = 0; j < n; ++j) {
        const Index i = deal.row(j);
        const bool last = walk.last(p.t, i);
        next_rows_[j] = last ? nullptr : gradients_.row(d, steps_.offset[next] + i);
        any |= !last;
      }
      for (Index b = outs.begin; b < outs.end && any; ++b) hidden_product(d, deal, b, n);
      share.team->wait(share.columns);
      for (Index j = mine.begin; j < mine.end; ++j) hidden_row(p, deal.row(j));
      if (second_blocks()) second_step(p, share, seconds, n, mine);
      if (share.team->wait(share.columns) && share.may_shrink && s > 0) return s;
    }
    initial_gradients(d, deal, share, outs);
    return 0;
  }

  // What comes from the step after through a block of W_hh, for the outputs of one head.
  void hidden_product(Index d, const Deal& deal, Index b, Index n) {
    const Index head = b / weights_.head_out_blocks(),
                unit = b % weights_.head_out_blocks() * block_units;
    const Columns w = weights_.weight_hh(d, b);
    in_blocks_of_rows<rows>(n, [&](auto count, Index j) {
      constexpr int R = decltype(count)::value;
      V acc[R][wide];
      clear(acc);
      for (int gate = 0; gate < first; ++gate) {
        const C* plane[R];
        for (int r = 0; r < R; ++r)
          plane[r] = next_rows_[j + r] ? next_rows_[j + r] + gradients_.hidden_planes[gate] * Hp_ +
                                             head * head_units_
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
    C* to = layer_.P ? gradients_.d_proj[p.d] + (steps_.offset[p.t] + i) * Op_ : outputs_;
    for (Index u = 0; u < layer_.O; u += lanes) {
      V dh = last ? V::load(g.d_h_n + i * Op_ + u)
                  : from_after(to_state_before(k, carried, i, u), fresh, k.d_reset_h + i * Op_ + u);
      dh = clip(dh + operand_tile(dy, u, layer_.O));
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
    const Index plane = layer_.P ? 0 : gradients_.hidden_planes[first % gates] * Hp_;
    for (Index j = 0; j < n; ++j) {
      const Index pair = steps_.offset[p.t] + p.deal.row(j);
      next_rows_[j] =
          layer_.P ? gradients_.d_proj[p.d] + pair * Op_ : gradients_.row(p.d, pair) + plane;
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
    const Index heads = layer_.P ? 1 : heads_, units_of_head = layer_.H / heads;
    const Index blocks = second_blocks() / heads;
    const Index head = b / blocks, unit = b % blocks * block_units;
    const C* w = layer_.P ? weights_.weight_hr(p.d, b) : weights_.weight_hn(p.d, b);
    in_blocks_of_rows<rows>(n, [&](auto count, Index j) {
      constexpr int R = decltype(count)::value;
      V acc[R][wide];
      clear(acc);
      const C* d[R];
      for (int r = 0; r < R; ++r) d[r] = next_rows_[j + r] + head * units_of_head;
      // The gates of a second product are planes, one after the other; W_hr has one.
      const Index planes = layer_.P ? 1 : gates - first;
      const Index count_of_plane = layer_.P ? layer_.P : head_units_;
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

  // ---- the cell, row by row --------------------------------------------------------------------

  // h before a pair's step, of which W_hh sees what the mask lets through.
  FASTRNN_INLINE Operand hidden_before(Index d, Index t, Index i) const {
    const Walk walk{steps_, Base::reverse(d)};
    if (walk.starts_fresh(t, i)) return {nullptr, 1, constants_[d].reset_h};
    return Base::previous_hidden(d, t, i);
  }
  FASTRNN_INLINE V seen(const Constants& k, const Operand& h, Index i, Index u) const {
    const V all = operand_tile(h, u, layer_.O);
    return k.mask ? all * V::load(k.mask + i * Op_ + u) : all;
  }

  // d_units: [Hp] the gradient of the hidden units.
  void cell_row(const Position& p, Index i, const C* d_units) {
    C* to = gradients_.row(p.d, steps_.offset[p.t] + i);
    const C* saved = Base::saved_row(p, i);
    if constexpr (Cell::states > 1)
      state_row(p, i, d_units, saved, to);
    else
      stateless_row(p, i, d_units, saved, to);
    if (!layer_.maths.layer_norm) return;
    const Constants& k = constants_[p.d];
    if constexpr (K::two_products) {
      hidden_norm(k, i, first, gates, saved, kScaleSecond, to);
    } else {
      hidden_norm(k, i, 0, gates, saved, kScaleH, to);
      input_norm(k, i, saved, to);
    }
  }

  // From the gradients of one side's sums those of the sums before their norm, of gates begin … end
  // − 1; of the gains on top of the row's. They take the place of y.
  void hidden_norm(const Constants& k, Index i, int begin, int end, const C* saved,
                   NormScalar scale, C* to) const {
    if (begin == end) return;
    const Index at = plane_count_ + begin * Hp_;
    normalize_row_backward(to + norm_at_ + at, to, Cell::hidden_gradient + begin, end - begin,
                           layer_.H, k.gain_h + begin * Hp_, saved + norm_at_ + at,
                           saved[norm_at_ + 2 * plane_count_ + scale],
                           k.sums + i * sums_width_ + at);
  }
  void input_norm(const Constants& k, Index i, const C* saved, C* to) const {
    normalize_row_backward(to + norm_at_, to, Cell::input_gradient, gates, layer_.H, k.gain_x,
                           saved + norm_at_, saved[norm_at_ + 2 * plane_count_ + kScaleX],
                           k.sums + i * sums_width_);
  }

  void stateless_row(const Position& p, Index i, const C* d_units, const C* saved, C* to) {
    const Operand h = Cell::carries ? hidden_before(p.d, p.t, i) : Operand{};
    C* carried = group_[p.d].carried + i * Op_;
    for (Index unit = 0; unit < layer_.H; unit += lanes) {
      V kept[Cell::saved], previous[1], d_previous[1], d_a[Cell::gradients];
      const V d_next[1] = {V::load(d_units + unit)};
      for (int s = 0; s < Cell::saved; ++s) kept[s] = V::load(saved + s * Hp_ + unit);
      previous[0] = Cell::carries ? operand_tile(h, unit, layer_.O) : V(0);
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
    C* to = gradients_.row(p.d, steps_.offset[p.t] + i);
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
    hidden_norm(k, i, 0, first, saved, kScaleH, to);
    input_norm(k, i, saved, to);
  }

  // ---- a cell with a c -------------------------------------------------------------------------

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
      static constexpr int only[] = {0};
      const Constants& k = constants_[p.d];
      C *d_c = units_[0], *d_y = units_[1], *d_gain = k.sums + i * sums_width_ + norm_c_sums_;
      normalize_row_backward(d_y, d_y, only, 1, layer_.H, k.gain_c, units_[2],
                             saved[norm_at_ + 2 * plane_count_ + kScaleC], d_gain);
      for (Index unit = 0; unit < layer_.H; unit += lanes)
        (V::load(d_c + unit) + V::load(d_y + unit)).store(d_c + unit);
    }
    state_half(p, i, saved, to);
  }

  FASTRNN_INLINE static void add(V x, C* sum) { (V::load(sum) + x).store(sum); }

  // The gradient of c' to units_[0], but for what passes a norm, zoneout's part of that of c to
  // d_c. With layer norm y goes to units_[2] and the gradient of what it became to units_[1].
  void output_half(const Position& p, Index i, const C* d_units, const C* saved, C* to) {
    const Constants& k = constants_[p.d];
    const bool last = p.walk.last(p.t, i);
    const bool fresh = !last && p.walk.starts_fresh(p.walk.following(p.t), i);
    const bool* keeps = zoneout_c_.row(steps_, p.d, p.t, i);
    const C* before = state_before(p.walk, p.d, p.t, i);
    const C* after = at<const C>(layer_.cell, steps_, p.t, i) + p.d * layer_.H;
    const C* scalars = saved + norm_at_ + 2 * plane_count_;
    C* sums = k.sums + i * sums_width_;
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
        d_y.store(units_[1] + unit);
        add(d_y, sums + norm_c_sums_ + Hp_ + unit);
      } else {
        d = Cell::backward_output(layer_.maths, kept, c, d_out, d, d_a);
      }
      if (k.peephole) {
        d = fma(d_a[o], V::load(k.peephole + 2 * Hp_ + unit), d);
        add(d_a[o] * c, sums + peephole_sums_ + 2 * Hp_ + unit);
      }
      d_a[o].store(to + o * Hp_ + unit);
      d.store(units_[0] + unit);
    }
  }

  void state_half(const Position& p, Index i, const C* saved, C* to) {
    const Constants& k = constants_[p.d];
    const C* before = state_before(p.walk, p.d, p.t, i);
    C* sums = k.sums + i * sums_width_;
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
        add(d_a[0] * c, sums + peephole_sums_ + unit);
        add(d_a[1] * c, sums + peephole_sums_ + Hp_ + unit);
      }
      for (int a = 0; a < Cell::gradients; ++a)
        if (a != o) d_a[a].store(to + a * Hp_ + unit);
      C* d_c = group_[p.d].d_c + i * Hp_ + unit;
      if (zoneout_c_.on()) d_before = d_before + V::load(d_c);
      d_before.store(d_c);
    }
  }

  // ---- past the first step ---------------------------------------------------------------------

  // d_h0 and d_c0 or, of rows that begin with a reset, what that state gets.
  void initial_gradients(Index d, const Deal& deal, const Share& share, const Range& outs) {
    const Walk walk{steps_, Base::reverse(d)};
    const Index n = deal.count(steps_.T > 0 ? steps_.active[0] : 0);
    for (Index j = 0; j < n; ++j) {
      const Index i = deal.row(j);
      next_rows_[j] = gradients_.row(d, steps_.offset[Base::first_step(d, i)] + i);
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

  // Of the state after a reset.
  void reset_gradients(Index d, int thread, int threads) {
    const Constants& k = constants_[d];
    const auto of_direction = [&](void* to, Index units) {
      return Weight{to ? static_cast<S*>(to) + d * units : nullptr};
    };
    sum_rows(of_direction(layer_.d_reset_h, layer_.O), k.d_reset_h, Op_, 1, layer_.O, thread,
             threads);
    sum_rows(of_direction(layer_.d_reset_c, layer_.H), k.d_reset_c, Hp_, 1, layer_.H, thread,
             threads);
  }

  // The sum over all the rows, `width` apart, of `runs` runs of `units` values.
  void sum_rows(const Weight& to, const C* rows_of_all, Index width, int runs, Index units,
                int thread, int threads) {
    if (!to.data) return;
    const Index tiles = ceil_div(units, lanes);
    const Range mine = split(runs * tiles, thread, threads);
    for (Index m = mine.begin; m < mine.end; ++m) {
      const Index run = m / tiles, unit = m % tiles * lanes;
      const C* from = rows_of_all + run * padded(units) + unit;
      V sum(0);
      for (Index i = 0; i < layer_.rows; ++i) sum = sum + V::load(from + i * width);
      store_units(sum, static_cast<S*>(to.data) + run * units + unit, units - unit);
    }
  }

  // ---- the weights -----------------------------------------------------------------------------

  void parameter_gradients(Index d, int thread, int threads) {
    const Constants& k = constants_[d];
    const auto hidden = [&](Index t, Index i) -> Operand {
      const Operand h = hidden_before(d, t, i);
      if (!k.mask) return h;
      for (Index u = 0; u < layer_.O; u += lanes) seen(k, h, i, u).store(outputs_ + u);
      return {nullptr, 1, outputs_};
    };
    Base::weight_gradients_.run(d, gradients_, hidden, thread, threads);
    if (!layer_.ends_sums) return;
    const Parameters& to = layer_.d_parameters[d];
    const auto sum = [&](const Weight& weight, Index at, int runs) {
      sum_rows(weight, k.sums + at, sums_width_, runs, layer_.H, thread, threads);
    };
    sum(to.norm_ih, 0, gates);
    sum(to.norm_hh, plane_count_, gates);
    sum(to.norm_c, norm_c_sums_, 1);
    sum(to.norm_c_bias, norm_c_sums_ + Hp_, 1);
    sum(to.weight_ci, peephole_sums_, 1);
    sum(to.weight_cf, peephole_sums_ + Hp_, 1);
    sum(to.weight_co, peephole_sums_ + 2 * Hp_, 1);
  }

  const Index heads_, head_units_, head_outputs_;  // hidden units and outputs of one head
  const Index plane_count_;                        // values of a row of planes: G·Hp
  const Index norm_at_;                            // of what layer norm saved, in a pair's values
  // Of a row's sums: of gains of x and h, [gate] each, of a norm of c gain and bias, of peepholes.
  const Index sums_width_, norm_c_sums_, peephole_sums_;
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
