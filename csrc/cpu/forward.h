// One layer forward.
//
// Maths         csrc/cells/. For each direction, the steps run in blocks. First the projection of
//               the whole block, x·W_ihᵀ + b. Then, step by step, it is added to h·W_hhᵀ and the
//               cell runs, with all gates of a tile of hidden units in registers, two or three
//               rows at a time. Where no backward pass follows, the gates never reach memory.
// Two products  reset-before GRU: r and z first, then n from r∘h (W_hn). Projection (proj_size):
//               the hidden units first, then W_hr. Both are a second pass over the step.
// Layouts       weights   forward_weights.h
//               x_gates   [block of units][row of the block of steps][tile][gate][lane], compute
//                         type: the projection
//               h         [2][B][padded(O)], the operands of the products; step t writes to t mod 2
//                         and reads the other
//               c         [B][Hp], compute type, in place
// Saved         for each pair a row of planes·Hp, compute type: the cell's saved values, then, with
//               projection, the hidden units before it
// Threads       share.h. A thread owns its x_gates; a team that shares rows has a barrier for
//               each product of a step.
// Weights_      how weights are kept and rows multiplied by them: ForwardWeights, or Int8Weights
//               (int8.h), whose products quantise their rows.
// Cost          per step and row G·H·(I + O) products, and 4·G·H·O bytes of packed W_hh (int8: a
//               quarter) from the cache for each block of rows.
#pragma once

#include "forward_weights.h"
#include "host.h"
#include "share.h"

namespace fastrnn::FASTRNN_ISA {

template <class Cell, class S, class Weights_ = ForwardWeights<Cell, S>>
class Forward : Tiling<Cell, S> {
  using K = Tiling<Cell, S>;
  using K::lanes, K::gates, K::tiles, K::vectors, K::rows, K::units, K::first, K::wide;
  using typename K::C;
  using typename K::V;
  using E = typename Weights_::E;  // of the rows that products read
  using FirstRows = typename Weights_::FirstRows;
  using SecondRows = typename Weights_::SecondRows;

 public:
  // Lays out the scratch from `base`; a null base only counts the bytes.
  Forward(const Layer& layer, void* base)
      : layer_(layer),
        steps_(*layer.steps),
        Hp_(padded(layer.H)),
        Op_(padded(layer.O)),
        blocks_(ceil_div(layer.H, units)),
        out_blocks_(ceil_div(layer.O, wide * lanes)),
        saved_width_(saved_width<Cell>(layer)),
        copies_(sizeof(S) != sizeof(E) || layer.input.unit != 1),
        weights_(layer, layer.packed ? layer.packed : base) {
    Arena arena(base);
    const Index B = steps_.B;
    if (!layer.packed) arena.take<char>(static_cast<Index>(weights_.used()));
    for (Index d = 0; d < layer.directions; ++d) {
      Group& g = group_[d];
      g.initial = arena.take<E>(B * Op_);
      g.h = arena.take<E>(2 * B * Op_);
      g.reset_h = arena.take<E>(Op_);
      g.reset_c = Cell::states > 1 ? arena.take<C>(Hp_) : nullptr;
      g.c = Cell::states > 1 ? arena.take<C>(B * Hp_) : nullptr;
      const bool keeps = (layer.P || K::two_products) && !layer.saved;
      g.saved = keeps ? arena.take<C>(B * saved_width_) : nullptr;
    }
    threads_ = arena.take<char>(
        most(per_thread(layer.plan).total * layer.plan.threads, per_thread(layer.single).total));
    used_ = arena.used();
  }

  std::size_t used() const { return used_; }

  void run(int thread, int threads) {
    const FlushSubnormals guard;
    const Plan& plan = threads == layer_.plan.threads ? layer_.plan : layer_.single;
    prepare(thread, threads);
    layer_.barriers[0].wait(threads, Barrier::Wait::start);
    run_directions(
        layer_, plan, thread,
        [&](Index d, const Share& share, Index done) { return recur(d, share, done); },
        [&](const Plan& entered, int place) { take_thread(entered, place); });
  }

 private:
  struct Group {
    E* initial;  // [B][Op] h0
    E* h;
    C* c;
    E* reset_h;  // [Op] the state after a reset
    C* reset_c;  // [Hp]
    C* saved;    // [B][saved_width] of one step, for a second product where nothing is saved
  };

  // The most pairs of a block of steps, and the bytes of each thread's own scratch.
  struct PerThread {
    Index pairs, rows, x_gates, x_rows, h_rows, pointers, operands, total;
  };

  PerThread per_thread(const Plan& plan) const {
    PerThread p{};
    const Index rows_mine = p.rows =
        ceil_div(steps_.B, plan.row_threads) + (plan.row_threads > 1 ? rows : 0);
    const Index blocks_mine = ceil_div(blocks_, plan.column_threads);
    const Index row_bytes = blocks_mine * vectors * lanes * static_cast<Index>(sizeof(C));
    // Projected gates of a block of steps stay in the core's own cache, unless the weights do not
    // fit there anyway: then a longer block reads those of the input less often.
    const Index weights = row_bytes * (layer_.I + layer_.O);
    const Index bytes = weights <= static_cast<Index>(kInnerBytes) ? 256 * 1024 : 4 * 1024 * 1024;
    p.pairs = most(least(bytes / most(row_bytes, 1), 256), most(4 * rows, rows_mine));
    p.x_gates = p.pairs * row_bytes;
    p.x_rows = copies_ ? round_up(p.pairs * layer_.I * static_cast<Index>(sizeof(E))) : 0;
    p.pointers = round_up(p.pairs * static_cast<Index>(sizeof(void*)));
    p.h_rows = round_up(rows_mine * static_cast<Index>(sizeof(void*)));
    Arena operands(nullptr);
    FirstRows(operands, p.pairs, layer_.I), FirstRows(operands, p.rows, layer_.O);
    SecondRows(operands, p.rows, layer_.H);
    p.operands = static_cast<Index>(operands.used());
    p.total = round_up(p.x_gates) + p.x_rows + p.pointers + 2 * p.h_rows + p.operands;
    return p;
  }
  static Index round_up(Index bytes) { return (bytes + 63) / 64 * 64; }

  void take_thread(const Plan& plan, int thread) {
    const PerThread p = per_thread(plan);
    char* base = threads_ + thread * p.total;
    most_pairs_ = p.pairs;
    x_gates_ = reinterpret_cast<C*>(base);
    x_copied_ = reinterpret_cast<E*>(base + round_up(p.x_gates));
    x_rows_ = reinterpret_cast<const E**>(base + round_up(p.x_gates) + p.x_rows);
    h_rows_ = reinterpret_cast<const E**>(base + round_up(p.x_gates) + p.x_rows + p.pointers);
    second_rows_ = reinterpret_cast<const C**>(reinterpret_cast<char*>(h_rows_) + p.h_rows);
    Arena operands(base + p.total - p.operands);
    x_ = FirstRows(operands, p.pairs, layer_.I);
    h_ = FirstRows(operands, p.rows, layer_.O);
    second_ = SecondRows(operands, p.rows, layer_.H);
  }

  // ---- before the first step ------------------------------------------------------------------

  void prepare(int thread, int threads) {
    if (thread == 0 && steps_.fresh)
      for (Index d = 0; d < layer_.directions; ++d) {
        load_state<S>(group_[d].reset_h, layer_.reset_h, d, 0, layer_.O);
        if constexpr (Cell::states > 1)
          load_state<S>(group_[d].reset_c, layer_.reset_c, d, 0, layer_.H);
      }
    if (!layer_.packed) weights_.pack(thread, threads);
    const Range mine = split(steps_.B, thread, threads);
    for (Index i = mine.begin; i < mine.end; ++i) {
      for (Index d = 0; d < layer_.directions; ++d) initial_state(d, i);
      if (steps_.padding) clear_padding(i);
    }
  }

  void initial_state(Index d, Index i) {
    const Group& g = group_[d];
    const Index row = steps_.order[i], O = layer_.O, H = layer_.H;
    const bool started = i < layer_.rows_before;
    load_state<S>(g.initial + i * Op_, started ? layer_.h_before : layer_.h0, d, row, O);
    if constexpr (Cell::states > 1) {
      if (started)
        load_state<C>(g.c + i * Hp_, layer_.c_before, d, row, H);
      else if (layer_.wide_c0)
        load_state<C>(g.c + i * Hp_, layer_.c0, d, row, H);
      else
        load_state<S>(g.c + i * Hp_, layer_.c0, d, row, H);
    }
    if (steps_.length[i] == 0) {  // the final state is the initial one
      scatter(static_cast<S*>(layer_.h_n) + (d * steps_.B + row) * O, g.initial + i * Op_, O);
      if constexpr (Cell::states > 1)
        scatter(static_cast<S*>(layer_.c_n) + (d * steps_.B + row) * H, g.c + i * Hp_, H);
    }
  }

  void clear_padding(Index i) {
    const S zero{};
    for (Index t = steps_.length[i]; t < steps_.T; ++t) {
      for (const Sequence* to : {&layer_.output, &layer_.copy})
        for (Index u = 0; u < layer_.directions * layer_.O && to->data; ++u)
          at<S>(*to, steps_, t, i)[u] = zero;
      if (layer_.cell.data) {
        C* c = at<C>(layer_.cell, steps_, t, i);
        for (Index u = 0; u < layer_.directions * layer_.H; ++u) c[u] = C(0);
      }
    }
  }

  // ---- the steps ------------------------------------------------------------------------------

  struct Position {
    Index d, t;
    const Deal& deal;
    bool reverse;
  };

  // Runs the steps from s on. Returns the number of completed steps: T, or less where a solo phase
  // of the team begins or ends.
  Index recur(Index d, const Share& share, Index s) {
    const Deal deal(steps_, share, rows);
    const Walk walk{steps_, reverse(d)};
    const Range blocks = split(blocks_, share.column, share.columns);
    while (s < steps_.T) {
      if (share.resting > 0 && share.team->all_ready(share.resting)) return s;
      Index end = s, pairs = 0;
      for (; end < steps_.T; ++end) {
        const Index t = walk.step(end), n = deal.count(steps_.active[t]);
        if (end > s && pairs + n > most_pairs_) break;
        for (Index j = 0; j < n; ++j, ++pairs) x_rows_[pairs] = input_row(t, deal.row(j), pairs);
      }
      project(d, pairs, blocks);
      for (Index m = 0; s < end; ++s) {
        const Index t = walk.step(s), n = deal.count(steps_.active[t]);
        const bool oversubscribed = step(Position{d, t, deal, reverse(d)}, share, blocks, n, m);
        m += n;
        if (oversubscribed && share.may_shrink) return s + 1;
      }
    }
    return s;
  }

  // A part of a layer has one direction, which may be the one that runs backwards in time.
  bool reverse(Index d) const { return d == 1 || layer_.reverse; }

  // A row of x as an operand: in place, or copied where the kernel cannot read it in place.
  const E* input_row(Index t, Index i, Index pair) {
    const S* x = at<const S>(layer_.input, steps_, t, i);
    if constexpr (sizeof(S) == sizeof(E)) {
      if (!copies_) return x;
    }
    E* row = x_copied_ + pair * layer_.I;
    gather(row, x, layer_.input.unit, layer_.I);
    return row;
  }

  // The projection of pair m of the block of steps, for the units of block b.
  C* x_gates(const Range& blocks, Index b, Index m) const {
    return x_gates_ + ((b - blocks.begin) * most_pairs_ + m) * vectors * lanes;
  }

  // Projects the inputs of a block of steps.
  void project(Index d, Index pairs, const Range& blocks) {
    x_.take(x_rows_, pairs, layer_.I);
    for (Index b = blocks.begin; b < blocks.end; ++b) {
      const auto weights = weights_.weight_ih(d, b);
      const C* bias = weights_.bias_x(d, b);
      in_blocks_of_rows<rows>(pairs, [&](auto count, Index m) {
        constexpr int R = decltype(count)::value;
        V acc[R][vectors];
#pragma GCC unroll 24
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 24
          for (int v = 0; v < vectors; ++v) acc[r][v] = V::load(bias + v * lanes);
        multiply_into<R, vectors>(x_gates(blocks, b, m), acc, x_, m, layer_.I, weights);
      });
    }
  }

  // One step of n rows, whose projections are the pairs from m on. Returns whether the team's cores
  // are oversubscribed.
  bool step(const Position& p, const Share& share, const Range& blocks, Index n, Index m) {
    const Group& g = group_[p.d];
    const Walk walk{steps_, p.reverse};
    for (Index j = 0; j < n; ++j) {
      const Index i = p.deal.row(j);
      h_rows_[j] = walk.starts_fresh(p.t, i) ? g.reset_h
                   : walk.first(p.t, i)      ? g.initial + i * Op_
                                             : g.h + ((~p.t & 1) * steps_.B + i) * Op_;
    }
    h_.take(h_rows_, n, layer_.O);
    for (Index b = blocks.begin; b < blocks.end; ++b) first_product(p, blocks, b, n, m);
    const bool oversubscribed = share.team->wait(share.columns);
    if constexpr (Cell::projects) {
      if (!layer_.P) return oversubscribed;
      second_operands(p, n, Cell::saved);
      const Range outs = split(out_blocks_, share.column, share.columns);
      for (Index b = outs.begin; b < outs.end; ++b) project_hidden(p, b, n);
      return share.team->wait(share.columns);
    } else if constexpr (K::two_products) {
      second_operands(p, n, Cell::operand);
      for (Index b = blocks.begin; b < blocks.end; ++b) second_product(p, blocks, b, n, m);
      return share.team->wait(share.columns);
    }
    return oversubscribed;
  }

  // Points the operands of the second product at a plane of the step's saved values.
  void second_operands(const Position& p, Index n, int plane) {
    for (Index j = 0; j < n; ++j) second_rows_[j] = saved_row(p, p.deal.row(j)) + plane * Hp_;
    second_.take(second_rows_, n, layer_.H);
  }

  // The pair's saved values; null where nothing reads them.
  C* saved_row(const Position& p, Index i) const {
    if (layer_.saved)
      return static_cast<C*>(layer_.saved) + p.d * layer_.saved_group +
             (steps_.offset[p.t] + i) * saved_width_;
    return group_[p.d].saved ? group_[p.d].saved + i * saved_width_ : nullptr;
  }

  void first_product(const Position& p, const Range& blocks, Index b, Index n, Index m) {
    constexpr int N = first * tiles;
    const auto weights = weights_.weight_hh(p.d, b);
    const C* bias_h = weights_.bias_h(p.d, b);
    in_blocks_of_rows<rows>(n, [&](auto count, Index j) {
      constexpr int R = decltype(count)::value;
      const C* x = x_gates(blocks, b, m + j);
      // Prefetched while the product runs: c, and the projection of the next rows.
      for (int line = 0; line < R * vectors; ++line)
        __builtin_prefetch(x + (R * vectors + line) * lanes);
      if constexpr (Cell::states > 1)
        for (int r = 0; r < R; ++r)
          for (int tile = 0; tile < tiles; ++tile)
            __builtin_prefetch(c_row(p.d, p.deal.row(j + r)) + b * units + tile * lanes);
      V acc[R][N];
#pragma GCC unroll 24
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 24
        for (int v = 0; v < N; ++v) {
          const int from = v / first * gates + v % first;
          acc[r][v] = Cell::separate[v % first] ? V::load(bias_h + from * lanes) : V(0);
        }
      // The projection, but for a separate gate, whose projection the cell reads.
      const auto projected = [&](V sum, int r, int v) FASTRNN_INLINE_LAMBDA {
        const int from = v / first * gates + v % first;
        return Cell::separate[v % first] ? sum : sum + V::load(x + (r * vectors + from) * lanes);
      };
      const Sums<R, N, C> sums = multiplied(acc, h_, j, layer_.O, weights, projected);
      for (int tile = 0; tile < tiles; ++tile) {
        const Index unit = b * units + tile * lanes;
        if (unit >= layer_.H) break;
        in_groups_of_rows<R>([&](auto group, int r) FASTRNN_INLINE_LAMBDA {
          finish_first<group.value, N>(p, j + r, unit, sums.v[r] + tile * first,
                                       x + (r * vectors + tile * gates) * lanes);
        });
      }
    });
  }

  // done(Int<M>{}, r) for R rows, two at a time; three together, since the third alone, a chain of
  // dependent operations, would take as long as two.
  template <int R, class Done>
  FASTRNN_INLINE static void in_groups_of_rows(Done done) {
    constexpr int kMost = R == 3 ? 3 : 2;
    int r = 0;
    for (; r + kMost <= R; r += kMost) done(Int<kMost>{}, r);
    if constexpr (R % kMost != 0) done(Int<R % kMost>{}, r);
  }

  // The cell, or its half before the second product, on one tile of M rows from j on. a_tile: the
  // sums of the gates, N vectors a row; x_tile: the projection.
  template <int M, int N>
  FASTRNN_NOINLINE void finish_first(const Position& p, Index j, Index unit, const V* a_tile,
                                     const C* x_tile) {
    Rows<C, M> a[first], saved[Cell::saved], previous[2], next[2];
    Index i[M];
#pragma GCC unroll 8
    for (int r = 0; r < M; ++r) {
      i[r] = p.deal.row(j + r);
      for (int g = 0; g < first; ++g) a[g].of[r] = a_tile[r * N + g];
      previous[0].of[r] = layer_.P ? V(0) : load_units<C>(h_rows_[j + r] + unit, lanes);
    }
    if constexpr (K::two_products) {
      Cell::forward_first(layer_.maths, a, previous, saved);
#pragma GCC unroll 8
      for (int r = 0; r < M; ++r) store_saved(saved_row(p, i[r]), unit, saved, r);
    } else {
      Rows<C, M> x[gates];
#pragma GCC unroll 8
      for (int r = 0; r < M; ++r) {
        for (int g = 0; g < gates; ++g) x[g].of[r] = V::load(x_tile + (r * vectors + g) * lanes);
        if constexpr (Cell::states > 1)
          previous[1].of[r] = V::load(c_before(p.d, j + r, i[r]) + unit);
      }
      Cell::forward(layer_.maths, x, a, previous, next, saved);
#pragma GCC unroll 8
      for (int r = 0; r < M; ++r) {
        if (layer_.saved) store_saved(saved_row(p, i[r]), unit, saved, r);
        if constexpr (Cell::states > 1)
          finish_cell(p, i[r], unit, next[1].of[r], c_row(p.d, i[r]) + unit);
        if (layer_.P)
          next[0].of[r].store(saved_row(p, i[r]) + Cell::saved * Hp_ + unit);
        else
          finish_hidden(p, i[r], unit, next[0].of[r]);
      }
    }
  }

  C* c_row(Index d, Index i) const { return group_[d].c + i * Hp_; }
  // c before the step; j: the row among the thread's, i: among the sorted.
  const C* c_before(Index d, Index j, Index i) const {
    return h_rows_[j] == group_[d].reset_h ? group_[d].reset_c : c_row(d, i);
  }

  template <int M>
  FASTRNN_INLINE void store_saved(C* keep, Index unit, const Rows<C, M>* saved, int r) {
    for (int s = 0; s < Cell::saved; ++s) saved[s].of[r].store(keep + s * Hp_ + unit);
  }

  // Stores c of one tile: to the state, to `cell` and, at the row's last step, to c_n.
  FASTRNN_INLINE void finish_cell(const Position& p, Index i, Index unit, V c, C* to) {
    c.store(to);
    if (layer_.cell.data)
      store_units(c, at<C>(layer_.cell, steps_, p.t, i) + p.d * layer_.H + unit, layer_.H - unit);
    if (Walk{steps_, p.reverse}.last(p.t, i))
      store_units(
          c, static_cast<S*>(layer_.c_n) + (p.d * steps_.B + steps_.order[i]) * layer_.H + unit,
          layer_.H - unit);
  }

  // Stores h of one tile: to the state, to the output and, at the row's last step, to h_n.
  FASTRNN_INLINE void finish_hidden(const Position& p, Index i, Index unit, V h) {
    const Index O = layer_.O;
    const V kept = sizeof(E) == sizeof(S) ? h : rounded<S>(h);  // else the store rounds to E
    store_units(kept, group_[p.d].h + ((p.t & 1) * steps_.B + i) * Op_ + unit, lanes);
    store_units(h, at<S>(layer_.output, steps_, p.t, i) + p.d * O + unit, O - unit);
    if (layer_.copy.data)
      store_units(h, at<S>(layer_.copy, steps_, p.t, i) + p.d * O + unit, O - unit);
    if (Walk{steps_, p.reverse}.last(p.t, i))
      store_units(h, static_cast<S*>(layer_.h_n) + (p.d * steps_.B + steps_.order[i]) * O + unit,
                  O - unit);
  }

  // Reset-before GRU: the gates that read r∘h.
  void second_product(const Position& p, const Range& blocks, Index b, Index n, Index m) {
    constexpr int G = gates - first, N = G * tiles;
    const auto weights = weights_.weight_hn(p.d, b);
    in_blocks_of_rows<rows>(n, [&](auto count, Index j) {
      constexpr int R = decltype(count)::value;
      const C* x = x_gates(blocks, b, m + j);
      V acc[R][N];
      clear(acc);
      const auto projected = [&](V sum, int r, int v) FASTRNN_INLINE_LAMBDA {
        return sum + V::load(x + (r * vectors + v / G * gates + first + v % G) * lanes);
      };
      const Sums<R, N, C> sums = multiplied(acc, second_, j, layer_.H, weights, projected);
      for (int tile = 0; tile < tiles; ++tile) {
        const Index unit = b * units + tile * lanes;
        if (unit >= layer_.H) break;
        in_groups_of_rows<R>([&](auto group, int r) FASTRNN_INLINE_LAMBDA {
          finish_second<group.value, N>(p, j + r, unit, sums.v[r] + tile * G);
        });
      }
    });
  }

  template <int M, int N>
  FASTRNN_NOINLINE void finish_second(const Position& p, Index j, Index unit, const V* a_tile) {
    Rows<C, M> a[gates - first], saved[Cell::saved], previous[1], next[1];
    Index i[M];
#pragma GCC unroll 8
    for (int r = 0; r < M; ++r) {
      i[r] = p.deal.row(j + r);
      for (int g = 0; g < gates - first; ++g) a[g].of[r] = a_tile[r * N + g];
      previous[0].of[r] = load_units<C>(h_rows_[j + r] + unit, lanes);
      const C* kept = saved_row(p, i[r]) + unit;
      for (int s = 0; s < Cell::saved; ++s) saved[s].of[r] = V::load(kept + s * Hp_);
    }
    Cell::forward_second(layer_.maths, a, previous, next, saved);
#pragma GCC unroll 8
    for (int r = 0; r < M; ++r) {
      store_saved(saved_row(p, i[r]), unit, saved, r);
      finish_hidden(p, i[r], unit, next[0].of[r]);
    }
  }

  // h = W_hr · hidden units, for block b of the outputs.
  void project_hidden(const Position& p, Index b, Index n) {
    const auto weights = weights_.weight_hr(p.d, b);
    in_blocks_of_rows<K::wide_rows>(n, [&](auto count, Index j) {
      constexpr int R = decltype(count)::value;
      V acc[R][wide];
      clear(acc);
      const Sums<R, wide, C> sums = multiplied(acc, second_, j, layer_.H, weights);
      for (int r = 0; r < R; ++r)
        for (int v = 0; v < wide; ++v) {
          const Index unit = (b * wide + v) * lanes;
          if (unit < layer_.O) finish_hidden(p, p.deal.row(j + r), unit, sums.v[r][v]);
        }
    });
  }

  const Layer& layer_;
  const Steps& steps_;
  const Index Hp_, Op_, blocks_, out_blocks_, saved_width_;
  const bool copies_;  // rows of x are copied: another type, or their units are not contiguous
  const Weights_ weights_;
  Group group_[2] = {};
  char* threads_ = nullptr;
  std::size_t used_ = 0;
  // The thread's own:
  Index most_pairs_ = 0;
  C* x_gates_ = nullptr;
  E* x_copied_ = nullptr;
  const E** x_rows_ = nullptr;
  const E** h_rows_ = nullptr;
  const C** second_rows_ = nullptr;
  FirstRows x_, h_;  // of the block of steps; of a step
  SecondRows second_;
};

}  // namespace fastrnn::FASTRNN_ISA
