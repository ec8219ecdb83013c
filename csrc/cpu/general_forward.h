// One layer forward where something adds to the cell: peephole, layer norm, heads, zoneout, a
// dropout mask on h.
//
// Maths         csrc/cells/, options.h of it first. Steps run in blocks as in forward.h, which this
//               builds on, but a step is two passes: the products of all the thread's rows into
//               memory, then the cell, row by row, since a norm needs all of its row:
//                 sums of x   [row of the block of steps][gate][Hp], normalised for the whole block
//                 sums of h   [B][gate][Hp], of one step
//               A second product (W_hr, a reset-before GRU's W_hn) and what follows it likewise.
// Layouts       seen        [2][B][Op] dropout_mask∘h, what W_hh multiplies, where there is a mask
//               saved       the cell's planes, the hidden units before a projection, then with
//                           layer norm y of the sums of x, y of those of h, scalars of the row
// Threads       as forward. Those that share rows deal units for the products and rows for the
//               cell: two meetings for each product of a step.
// Cost          forward's, and 8·G·H bytes written and read again per step and row.
#pragma once

#include "forward.h"
#include "general.h"

namespace fastrnn::FASTRNN_ISA {

template <class Cell, class S>
class GeneralForward : Forward<Cell, S> {
  using Base = Forward<Cell, S>;
  using K = Tiling<Cell, S>;
  using Base::blocks_, Base::out_blocks_, Base::saved_width_, Base::h_rows_, Base::second_rows_;
  using Base::layer_, Base::steps_, Base::Hp_, Base::Op_, Base::group_, Base::weights_;
  using K::lanes, K::gates, K::tiles, K::vectors, K::rows, K::units, K::first, K::wide;
  using typename Base::Block, typename Base::Group, typename Base::Position;
  using typename K::C, typename K::E, typename K::V;
  friend Base;

 public:
  GeneralForward(const Layer& layer, void* base)
      : Base(layer, base),
        width_(gates * Hp_),
        norm_at_((Cell::saved + (layer.P ? 1 : 0)) * Hp_),
        head_units_(layer.H / layer.maths.heads),
        head_outputs_(layer.O / layer.maths.heads),
        zoneout_h_(layer.zoneout_h_mask, layer.maths.zoneout_h, layer.O),
        zoneout_c_(layer.zoneout_c_mask, layer.maths.zoneout_c, layer.H) {
    Arena arena(base);
    arena.take<char>(static_cast<Index>(Base::used()));
    const Index B = steps_.B;
    for (Index d = 0; d < layer.directions; ++d) {
      Constants& k = constants_[d];
      k.bias_h = arena.take<C>(width_);
      k.sums = arena.take<C>(B * width_);
      if (layer.maths.layer_norm) {
        k.bias_x = arena.take<C>(width_);
        k.gain_x = arena.take<C>(width_);
        k.gain_h = arena.take<C>(width_);
        k.gain_c = arena.take<C>(Hp_);
        k.bias_c = arena.take<C>(Hp_);
      }
      if (layer.maths.peephole) k.peephole = arena.take<C>(3 * Hp_);
      if (layer.dropout_mask.data) {
        k.mask = arena.take<C>(B * Op_);
        k.seen_initial = arena.take<E>(B * Op_);
        k.seen_reset = arena.take<E>(B * Op_);
        k.seen = arena.take<E>(2 * B * Op_);
      }
    }
    const Index many = sums_of_x(layer.plan), alone = sums_of_x(layer.single);
    x_sums_count_ = many > alone ? many : alone;
    x_sums_of_all_ = arena.take<C>(x_sums_count_);
    rows_of_all_ = arena.take<C>(layer.plan.threads * Hp_);
    before_of_all_ = arena.take<const E*>(layer.plan.threads * before_count());
    used_ = arena.used();
  }

  std::size_t used() const { return used_; }
  void run(int thread, int threads) { this->run_as(*this, thread, threads); }

 private:
  // Parameters in planes, and what else a direction needs.
  struct Constants {
    C *bias_x, *gain_x;  // [G·Hp]
    C *bias_h, *gain_h;  // [G·Hp]
    C *bias_c, *gain_c;  // [Hp]
    C* peephole;         // [3·Hp]
    C* mask;             // [B][Op]; null: W_hh sees all of h
    E *seen_initial, *seen_reset, *seen;
    C* sums;
  };

  Index sums_of_x(const Plan& plan) const {
    return plan.direction_threads * plan.row_threads * Base::per_thread(plan).cap * width_;
  }
  Index before_count() const { return steps_.B + rows; }

  void take_thread(const Plan& plan, int thread) {
    Base::take_thread(plan, thread);
    x_sums_of_team_ = Base::per_thread(plan).cap * width_;
    row_ = rows_of_all_ + thread * Hp_;
    before_ = before_of_all_ + thread * before_count();
  }

  // ---- before the first step ------------------------------------------------------------------

  void prepare(int thread, int threads) {
    Base::prepare(thread, threads);
    if (thread == 0)
      for (Index d = 0; d < layer_.directions; ++d) load_constants(d);
    if (layer_.saved) clear_lanes(thread, threads);
    if (!layer_.dropout_mask.data) return;
    const Range mine = split(steps_.B, thread, threads);
    for (Index d = 0; d < layer_.directions; ++d)
      for (Index i = mine.begin; i < mine.end; ++i) seen_states(d, i);
  }

  // What the sums hold beyond H is never written, but comes out in the saved planes.
  void clear_lanes(int thread, int threads) {
    const auto clear_planes = [&](C* sums, Index count) {
      const Range mine = split(count / Hp_, thread, threads);
      for (Index plane = mine.begin; plane < mine.end; ++plane)
        for (Index unit = layer_.H; unit < Hp_; ++unit) sums[plane * Hp_ + unit] = C(0);
    };
    clear_planes(x_sums_of_all_, x_sums_count_);
    for (Index d = 0; d < layer_.directions; ++d)
      clear_planes(constants_[d].sums, steps_.B * width_);
  }

  void load_constants(Index d) {
    const Parameters& p = layer_.parameters[d];
    const Constants& k = constants_[d];
    const Index H = layer_.H;
    load_planes<S>(k.bias_h, p.bias_hh, gates, H);
    if (layer_.maths.layer_norm) {
      load_planes<S>(k.bias_x, p.bias_ih, gates, H);
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

  // The state after a reset is read here from where it comes: that of another thread may not be
  // ready.
  void seen_states(Index d, Index i) {
    const Constants& k = constants_[d];
    C* mask = k.mask + i * Op_;
    load_state<S>(mask, layer_.dropout_mask, d, steps_.order[i], layer_.O);
    E* reset = k.seen_reset + i * Op_;
    load_state<S>(reset, layer_.reset_h, d, 0, layer_.O);
    mask_row(reset, reset, mask);
    mask_row(k.seen_initial + i * Op_, group_[d].initial + i * Op_, mask);
  }

  void mask_row(E* to, const E* h, const C* mask) const {
    for (Index u = 0; u < Op_; u += lanes)
      store_units(load_units<C>(h + u, lanes) * V::load(mask + u), to + u, lanes);
  }

  // ---- the sums of x --------------------------------------------------------------------------

  C* x_row(const Share& share, Index m) const {
    const Index team = share.team - layer_.barriers - 1;
    return x_sums_of_all_ + team * x_sums_of_team_ + m * width_;
  }

  void project(const Block& block, const Share& share, const Range& blocks) {
    C* sums = x_row(share, 0);
    for (Index b = blocks.begin; b < blocks.end; ++b) project_units(block, b, sums);
    if (!layer_.maths.layer_norm) return;
    share.team->wait(share.columns);
    normalize_block(block, share, sums);
  }

  void project_units(const Block& block, Index b, C* sums) {
    const BlockOfWeights<E> weights = weights_.weight_ih(block.d, b);
    const C* bias = weights_.bias_x(block.d, b);
    in_blocks_of_rows<rows>(block.pairs, [&](auto count, Index m) {
      constexpr int R = decltype(count)::value;
      V acc[R][vectors];
      clear(acc);
      if (!layer_.maths.layer_norm) {
#pragma GCC unroll 24
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 24
          for (int v = 0; v < vectors; ++v) acc[r][v] = V::load(bias + v * lanes);
      }
      const Sums<R, vectors, C> results =
          Base::multiplied(acc, Base::x_rows_ + m, layer_.I, weights);
      for (int r = 0; r < R; ++r)
        store_tiles(results.v[r], gates, sums + (m + r) * width_ + b * units, layer_.H - b * units);
    });
  }

  // Tiles of `count` gates from `to` on; `left` units are wanted.
  FASTRNN_NOINLINE void store_tiles(const V* sums, int count, C* to, Index left) const {
    for (int tile = 0; tile < tiles; ++tile, to += lanes, left -= lanes)
      for (int g = 0; g < count && left > 0; ++g)
        store_units(sums[tile * count + g], to + g * Hp_, left);
  }

  // The rows of a block of steps are dealt to the threads that share them.
  void normalize_block(const Block& block, const Share& share, C* sums) {
    const Constants& k = constants_[block.d];
    const Walk walk{steps_, Base::reverse(block.d)};
    const Range mine = split(block.pairs, share.column, share.columns);
    Index m = 0;
    for (Index s = block.steps.begin; s < block.steps.end; ++s) {
      const Index t = walk.step(s), n = block.deal.count(steps_.active[t]);
      for (Index j = 0; j < n; ++j, ++m) {
        if (m < mine.begin || m >= mine.end) continue;
        C* kept = kept_row(block.d, t, block.deal.row(j));
        normalize_row(sums + m * width_, gates, layer_.H, k.gain_x, k.bias_x,
                      kept ? kept + norm_at_ : nullptr, scalar(kept, kScaleX));
      }
    }
  }

  // Where a pair's values are saved for backward; null where they are not.
  C* kept_row(Index d, Index t, Index i) const {
    if (!layer_.saved) return nullptr;
    return static_cast<C*>(layer_.saved) + d * layer_.saved_group +
           (steps_.offset[t] + i) * saved_width_;
  }
  C* scalar(C* kept, NormScalar which) const {
    return kept ? kept + norm_at_ + 2 * width_ + which : nullptr;
  }

  // ---- a step ---------------------------------------------------------------------------------

  bool step(const Position& p, const Share& share, const Range&, Index n, Index m) {
    for (Index j = 0; j < n; ++j) find_state(p, j);
    const Range products = split(weights_.hidden_blocks(), share.column, share.columns);
    for (Index b = products.begin; b < products.end; ++b) first_product(p, b, n);
    share.team->wait(share.columns);
    const Range mine = split(n, share.column, share.columns);
    for (Index j = mine.begin; j < mine.end; ++j) cell_row(p, j, x_row(share, m + j));
    const bool crowded = share.team->wait(share.columns);
    if constexpr (Cell::projects) {
      if (!layer_.P) return crowded;
      Base::second_operands(p, n, Cell::saved);
      const Range outs = split(out_blocks_, share.column, share.columns);
      for (Index b = outs.begin; b < outs.end; ++b)
        Base::hidden_tiles(p, b, n, [&](Index j, Index unit, V h) { finish_unit(p, j, unit, h); });
      return share.team->wait(share.columns);
    } else if constexpr (K::two_products) {
      Base::second_operands(p, n, Cell::operand);
      for (Index b = products.begin; b < products.end; ++b) second_product(p, b, n);
      share.team->wait(share.columns);
      for (Index j = mine.begin; j < mine.end; ++j) second_row(p, j, x_row(share, m + j));
      return share.team->wait(share.columns);
    }
    return crowded;
  }

  // h before the step, and what W_hh sees of it.
  void find_state(const Position& p, Index j) {
    const Index i = p.deal.row(j), parity = ((~p.t & 1) * steps_.B + i) * Op_;
    const Walk walk{steps_, p.reverse};
    const Constants& k = constants_[p.d];
    if (walk.starts_fresh(p.t, i)) {
      before_[j] = group_[p.d].reset_h;
      h_rows_[j] = k.mask ? k.seen_reset + i * Op_ : before_[j];
    } else if (walk.first(p.t, i)) {
      before_[j] = group_[p.d].initial + i * Op_;
      h_rows_[j] = k.mask ? k.seen_initial + i * Op_ : before_[j];
    } else {
      before_[j] = group_[p.d].h + parity;
      h_rows_[j] = k.mask ? k.seen + parity : before_[j];
    }
  }

  // A block of a head's units.
  struct HeadBlock {
    Index head, unit, left;  // the unit in the head, and how many there are from it on
  };
  HeadBlock head_block(Index b) const {
    const Index unit = b % weights_.head_blocks() * units;
    return {b / weights_.head_blocks(), unit, head_units_ - unit};
  }
  C* sums_row(const Position& p, Index j) const {
    return constants_[p.d].sums + p.deal.row(j) * width_;
  }

  void first_product(const Position& p, Index b, Index n) {
    constexpr int N = first * tiles;
    const BlockOfWeights<E> weights = weights_.weight_hh(p.d, b);
    const HeadBlock at = head_block(b);
    in_blocks_of_rows<rows>(n, [&](auto count, Index j) {
      constexpr int R = decltype(count)::value;
      const E* h[R];
      for (int r = 0; r < R; ++r) h[r] = h_rows_[j + r] + at.head * head_outputs_;
      V acc[R][N];
      clear(acc);
      const Sums<R, N, C> results = Base::multiplied(acc, h, head_outputs_, weights);
      for (int r = 0; r < R; ++r)
        store_tiles(results.v[r], first, sums_row(p, j + r) + at.head * head_units_ + at.unit,
                    at.left);
    });
  }

  // Reset-before GRU: the gates that read r∘h.
  void second_product(const Position& p, Index b, Index n) {
    constexpr int G = gates - first, N = G * tiles;
    const BlockOfWeights<C> weights = weights_.weight_hn(p.d, b);
    const HeadBlock at = head_block(b);
    in_blocks_of_rows<rows>(n, [&](auto count, Index j) {
      constexpr int R = decltype(count)::value;
      const C* operand[R];
      for (int r = 0; r < R; ++r) operand[r] = second_rows_[j + r] + at.head * head_units_;
      V acc[R][N];
      clear(acc);
      const Sums<R, N, C> results = Base::multiplied(acc, operand, head_units_, weights);
      for (int r = 0; r < R; ++r)
        store_tiles(results.v[r], G,
                    sums_row(p, j + r) + first * Hp_ + at.head * head_units_ + at.unit, at.left);
    });
  }

  // ---- the cell, row by row -------------------------------------------------------------------

  // The sum of the h side of gate g, with its bias where a norm has not added it.
  FASTRNN_INLINE V hidden_sum(const Constants& k, const C* h, Index g, Index unit) const {
    const V sum = V::load(h + g * Hp_ + unit);
    if (layer_.maths.layer_norm || !Cell::separate[g]) return sum;
    return sum + V::load(k.bias_h + g * Hp_ + unit);
  }

  // Gates first … last − 1 as the cell takes them: a of both sides, or of h where it is separate.
  FASTRNN_INLINE void gate_sums(const Constants& k, const C* x, const C* h, int begin, int end,
                                Index unit, V* a) const {
    for (int g = begin; g < end; ++g) {
      a[g] = hidden_sum(k, h, g, unit);
      if (!Cell::separate[g]) a[g] = a[g] + V::load(x + g * Hp_ + unit);
    }
  }

  FASTRNN_NOINLINE void cell_row(const Position& p, Index j, const C* x) {
    const Constants& k = constants_[p.d];
    const Index i = p.deal.row(j);
    C *h = sums_row(p, j), *kept = kept_row(p.d, p.t, i);
    if (layer_.maths.layer_norm)
      normalize_row(h, first, layer_.H, k.gain_h, k.bias_h,
                    kept ? kept + norm_at_ + width_ : nullptr, scalar(kept, kScaleH));
    if constexpr (K::two_products)
      first_half(p, j, x, h);
    else if constexpr (Cell::states > 1)
      state_row(p, j, x, h);
    else
      stateless_row(p, j, x, h);
  }

  void stateless_row(const Position& p, Index j, const C* x, const C* h) {
    const Constants& k = constants_[p.d];
    C* kept = kept_row(p.d, p.t, p.deal.row(j));
    for (Index unit = 0; unit < layer_.H; unit += lanes) {
      V of_x[gates], a[gates], saved[Cell::saved], next[1];
      const V previous[1] = {load_units<C>(before_[j] + unit, lanes)};
      for (int g = 0; g < gates; ++g) of_x[g] = V::load(x + g * Hp_ + unit);
      gate_sums(k, x, h, 0, gates, unit, a);
      Cell::forward(layer_.maths, of_x, a, previous, next, saved);
      if (kept) Base::store_saved(kept, unit, saved);
      finish_unit(p, j, unit, next[0]);
    }
  }

  // A cell with a c: up to c', whose norm needs all of its row, then what follows.
  void state_row(const Position& p, Index j, const C* x, const C* h) {
    const Constants& k = constants_[p.d];
    const Index i = p.deal.row(j);
    C* kept = kept_row(p.d, p.t, i);
    const Group& g = group_[p.d];
    const C* c = before_[j] == g.reset_h ? g.reset_c : g.c + i * Hp_;
    for (Index unit = 0; unit < layer_.H; unit += lanes) {
      V a[gates], saved[Cell::saved];
      const V before = V::load(c + unit);
      gate_sums(k, x, h, 0, gates, unit, a);
      if (k.peephole) {
        const V w[2] = {V::load(k.peephole + unit), V::load(k.peephole + Hp_ + unit)};
        Cell::peep_before(w, before, a);
      }
      Cell::forward_state(layer_.maths, a, before, saved).store(row_ + unit);
      if (kept)
        for (int s = 0; s < Cell::saved; ++s)
          if (s != Cell::output_gate) saved[s].store(kept + s * Hp_ + unit);
    }
    Moments<C> norm{};
    if (layer_.maths.layer_norm) {
      norm = moments(row_, 1, layer_.H);
      if (kept) {
        *scalar(kept, kMeanC) = norm.mean;
        *scalar(kept, kScaleC) = norm.scale;
      }
    }
    output_row(p, j, x, h, c, norm);
  }

  void output_row(const Position& p, Index j, const C* x, const C* h, const C* c,
                  const Moments<C>& norm) {
    const Constants& k = constants_[p.d];
    const Index i = p.deal.row(j);
    const int o = Cell::output_gate;
    C *kept = kept_row(p.d, p.t, i), *keep = Base::saved_row(p, i);
    const bool* keeps_c = zoneout_c_.row(steps_, p.d, p.t, i);
    for (Index unit = 0; unit < layer_.H; unit += lanes) {
      V a[gates], saved[Cell::saved];
      const V next = V::load(row_ + unit);
      gate_sums(k, x, h, o, o + 1, unit, a);
      if (k.peephole) a[o] = Cell::peep_after(V::load(k.peephole + 2 * Hp_ + unit), next, a[o]);
      const V out =
          Cell::forward_output(layer_.maths, a[o], normalized_c(k, next, norm, unit), saved);
      if (kept) saved[o].store(kept + o * Hp_ + unit);
      const V after =
          zoneout_c_.on() ? zoneout_c_.blend(keeps_c, unit, V::load(c + unit), next) : next;
      Base::finish_cell(p, i, unit, after, group_[p.d].c + i * Hp_ + unit);
      if (layer_.P)
        out.store(keep + Cell::saved * Hp_ + unit);
      else
        finish_unit(p, j, unit, out);
    }
  }

  FASTRNN_INLINE V normalized_c(const Constants& k, V c, const Moments<C>& norm, Index unit) const {
    if (!layer_.maths.layer_norm) return c;
    return fma(normalize(c, V(norm.mean), V(norm.scale)), V::load(k.gain_c + unit),
               V::load(k.bias_c + unit));
  }

  // Reset-before GRU: r, z and what the second product reads.
  void first_half(const Position& p, Index j, const C* x, const C* h) {
    const Constants& k = constants_[p.d];
    C* keep = Base::saved_row(p, p.deal.row(j));
    for (Index unit = 0; unit < layer_.H; unit += lanes) {
      V a[gates], saved[Cell::saved];
      const V seen[1] = {load_units<C>(h_rows_[j] + unit, lanes)};
      gate_sums(k, x, h, 0, first, unit, a);
      if constexpr (K::two_products) Cell::forward_first(layer_.maths, a, seen, saved);
      Base::store_saved(keep, unit, saved);
    }
  }

  FASTRNN_NOINLINE void second_row(const Position& p, Index j, const C* x) {
    const Constants& k = constants_[p.d];
    const Index i = p.deal.row(j);
    C *h = sums_row(p, j), *kept = kept_row(p.d, p.t, i), *keep = Base::saved_row(p, i);
    const Index at = first * Hp_;
    if (layer_.maths.layer_norm)
      normalize_row(h + at, gates - first, layer_.H, k.gain_h + at, k.bias_h + at,
                    kept ? kept + norm_at_ + width_ + at : nullptr, scalar(kept, kScaleSecond));
    for (Index unit = 0; unit < layer_.H; unit += lanes) {
      V a[gates], saved[Cell::saved], next[1];
      const V previous[1] = {load_units<C>(before_[j] + unit, lanes)};
      gate_sums(k, x, h, first, gates, unit, a);
      for (int s = 0; s < Cell::saved; ++s) saved[s] = V::load(keep + s * Hp_ + unit);
      if constexpr (K::two_products)
        Cell::forward_second(layer_.maths, a + first, previous, next, saved);
      Base::store_saved(keep, unit, saved);
      finish_unit(p, j, unit, next[0]);
    }
  }

  // h of one tile, after zoneout, and what W_hh is to see of it.
  FASTRNN_NOINLINE void finish_unit(const Position& p, Index j, Index unit, V h) {
    const Index i = p.deal.row(j);
    const Constants& k = constants_[p.d];
    if (zoneout_h_.on())
      h = zoneout_h_.blend(zoneout_h_.row(steps_, p.d, p.t, i), unit,
                           load_units<C>(before_[j] + unit, lanes), h);
    Base::finish_hidden(p, i, unit, h);
    if (k.mask)
      store_units(rounded<S>(h) * V::load(k.mask + i * Op_ + unit),
                  k.seen + ((p.t & 1) * steps_.B + i) * Op_ + unit, lanes);
  }

  const Index width_;    // of a row of planes: G·Hp
  const Index norm_at_;  // of what layer norm saves, in a pair's values
  const Index head_units_, head_outputs_;
  const Zoneout<C> zoneout_h_, zoneout_c_;
  Constants constants_[2] = {};
  C *x_sums_of_all_ = nullptr, *rows_of_all_ = nullptr;
  Index x_sums_count_ = 0;
  const E** before_of_all_ = nullptr;
  std::size_t used_ = 0;
  // The thread's own.
  Index x_sums_of_team_ = 0;
  C* row_ = nullptr;  // [Hp] c'
  const E** before_ = nullptr;
};

}  // namespace fastrnn::FASTRNN_ISA
