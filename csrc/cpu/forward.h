// One layer forward.
//
// Maths         csrc/cells/. For each direction, the steps run in blocks: first the projection
//               of the whole block, x·W_ihᵀ + b, then step by step h·W_hhᵀ on top of it and the
//               cell, all gates of a tile of hidden units in registers at once, two rows side by
//               side. Without a backward pass to come the gates never reach memory.
// Two products  reset-before GRU: r and z first, then n from r∘h. Projection (proj_size):
//               the hidden units first, then W_hr. Both run as a second pass over the step.
// Layouts       x_gates   [block of units][row of the block of steps][tile][gate][lane]
//               h         [2][B][padded(O)], the kernel's operands, written at t mod 2, read
//                         from the other
//               c         [B][Hp]
//               saved     a row of planes·Hp for each pair: the cell's saved values, then, with
//                         projection, the hidden units before it
// Threads       Plan. A thread owns directions, rows and blocks of units; only a team that
//               shares rows meets at a barrier, once for each product of a step. Where one
//               waits long for another there, the first goes on alone for a while.
// Cost          per step and row G·H·(I + O) products, 4·G·H·O bytes of packed W_hh from the
//               cache for each block of rows.
#pragma once

#include "layer.h"
#include "pack.h"

namespace fastrnn::FASTRNN_ISA {

// What one thread owns of a layer.
struct Share {
  bool idle;
  Index first_direction, last_direction;
  int row, rows;        // which of how many deals of rows
  int column, columns;  // which of how many runs of units
  bool may_shrink;      // the first thread can go on by itself
  int resting;          // threads of the team that rest while this one goes on by itself
  Barrier* team;        // of the threads that share rows
};

FASTRNN_INLINE Share share_of(const Layer& layer, const Plan& plan, int thread) {
  Share s{};
  s.idle = thread >= plan.direction_threads * plan.row_threads * plan.column_threads;
  if (s.idle) return s;
  const int direction = thread % plan.direction_threads;
  const int place = thread / plan.direction_threads;
  s.first_direction = plan.direction_threads > 1 ? direction : 0;
  s.last_direction = plan.direction_threads > 1 ? direction + 1 : layer.directions;
  s.row = place / plan.column_threads;
  s.rows = plan.row_threads;
  s.column = place % plan.column_threads;
  s.columns = plan.column_threads;
  s.may_shrink = plan.direction_threads * plan.row_threads == 1 && plan.column_threads > 1;
  s.team = layer.barriers + 1 + direction * plan.row_threads + s.row;
  return s;
}

// Runs a thread's directions. run(d, share, done) goes on where `done` steps of a direction are
// done and gives how many are in the end: all, or where the team is to become one thread, or a team
// again. enter(plan, thread) takes up the thread's part in a plan.
template <class Run, class Enter>
FASTRNN_INLINE void run_directions(const Layer& layer, const Plan& plan, int thread, Run run,
                                   Enter enter) {
  Share share = share_of(layer, plan, thread);
  if (share.idle) return;
  enter(plan, thread);
  const Index T = layer.steps->T, end = share.last_direction * T;
  std::uint32_t recess = 0;
  for (Index at = share.first_direction * T; at < end;) {
    const Index d = at / T, done = run(d, share, at - d * T);
    at = d * T + done;
    if (done == T) continue;
    if (share.resting > 0) {
      share.team->call(at);
      share = share_of(layer, plan, thread);
      enter(plan, thread);
    } else if (thread > 0) {
      at = share.team->rest(recess++);
    } else {
      const int others = share.columns - 1;
      share = share_of(layer, layer.single, thread);
      share.resting = others;
      enter(layer.single, thread);
    }
  }
  if (share.resting > 0) share.team->call(end);
}

// The rows of a share. They are dealt in hands, so that each thread gets long and short ones alike;
// rows of equal length are cut in runs.
struct Deal {
  Index hand, thread, threads;

  FASTRNN_INLINE Deal(const Steps& steps, const Share& share, Index rows_per_block)
      : hand(rows_per_block), thread(share.row), threads(share.rows) {
    const bool equal = steps.T == 0 || steps.active[steps.T - 1] == steps.B;
    if (equal || threads == 1) hand = ceil_div(steps.B > 0 ? steps.B : 1, threads);
  }
  // The sorted row of the share's row j.
  FASTRNN_INLINE Index row(Index j) const {
    return threads == 1 ? j : ((j / hand) * threads + thread) * hand + j % hand;
  }
  // How many of the sorted rows below `active` are the share's.
  FASTRNN_INLINE Index count(Index active) const {
    if (threads == 1) return active;
    const Index full = active / hand, rest = active % hand;
    const Index hands = full > thread ? (full - thread + threads - 1) / threads : 0;
    return hands * hand + (full % threads == thread ? rest : 0);
  }
};

template <class S>
FASTRNN_INLINE S* at(const Sequence& a, const Steps& steps, Index t, Index i) {
  return static_cast<S*>(a.data) + steps.position[t] * a.step + steps.order[i] * a.row;
}

// One row of a state, zeros where there is none and up to its padded size.
template <class S, class T>
void load_state(T* to, const State& state, Index d, Index row, Index count) {
  const Index width = padded(count);
  for (Index u = state.data ? count : 0; u < width; ++u) to[u] = T{};
  if (state.data)
    gather(to, static_cast<const S*>(state.data) + d * state.group + row * state.row, state.unit,
           count);
}

// Values saved for a pair.
template <class Cell>
FASTRNN_INLINE Index saved_width(const Layer& layer) {
  const int planes = Cell::saved + (layer.P ? 1 : 0);
  return planes * padded(layer.H);
}

// The sizes that a cell and a storage type fix at compile time.
template <class Cell_, class S_>
struct Shape {
  using Cell = Cell_;
  using S = S_;
  using C = typename ComputeOf<S>::type;
  using E = typename FactorOf<S>::type;  // of forward's products of input and h
  using V = Vec<C>;
  static constexpr int lanes = V::lanes;
  static constexpr int gates = Cell::gates;
  static constexpr int tiles = tiles_per_block(gates);
  static constexpr int vectors = gates * tiles;
  static constexpr int rows = rows_per_block(vectors);
  static constexpr int units = tiles * lanes;  // hidden units of a block
  static constexpr int first = Cell::first_gates;
  static constexpr bool two_products = first != gates;
  static constexpr int wide = 4;  // vectors of a block of columns
  static constexpr int wide_rows = rows_per_block(wide);
};

// The weights of a layer in the order in which forward reads them, and their packing.
template <class Cell, class S>
class Packing : Shape<Cell, S> {
  using K = Shape<Cell, S>;
  using K::lanes, K::gates, K::tiles, K::vectors, K::units, K::first, K::wide;
  using typename K::C, typename K::E;

 public:
  struct Group {
    E *weight_ih, *weight_hh;
    C* second;  // of a second product of a step: W_hn, or W_hr
    C *bias_x, *bias_h;
  };

  // Lays the weights out from `base`; from nothing, only measures them.
  Packing(const Layer& layer, void* base)
      : layer_(layer),
        heads_(layer.maths.heads),
        blocks_(ceil_div(layer.H, units)),
        head_blocks_(ceil_div(layer.H / heads_, units)),
        out_blocks_(ceil_div(layer.O, wide * lanes)),
        block_ih_(whole_steps<E>(layer.I) * vectors * lanes),
        block_hh_(whole_steps<E>(layer.O / heads_) * first * tiles * lanes),
        block_second_(layer.H / heads_ * (gates - first) * tiles * lanes),
        packs_x_(layer.packed || !layer.x_in_place),
        packs_h_(layer.packed || !layer.h_in_place) {
    Arena arena(base);
    for (Index d = 0; d < layer.directions; ++d) {
      Group& g = group_[d];
      if (packs_x_) g.weight_ih = arena.take<E>(blocks_ * block_ih_);
      if (packs_h_) {
        g.weight_hh = arena.take<E>(heads_ * head_blocks_ * block_hh_);
        g.second = layer.P           ? arena.take<C>(out_blocks_ * layer.H * wide * lanes)
                   : K::two_products ? arena.take<C>(heads_ * head_blocks_ * block_second_)
                                     : nullptr;
      }
      g.bias_x = arena.take<C>(blocks_ * vectors * lanes);
      g.bias_h = arena.take<C>(blocks_ * vectors * lanes);
    }
    used_ = arena.used();
  }

  std::size_t used() const { return used_; }
  const Group& group(Index d) const { return group_[d]; }
  // Block b of a direction's W_ih, of W_hh, of those of its gates that are a second product, and
  // of W_hr.
  // The parameters of a layer that came packed may be null.
  BlockOfWeights<E> weight_ih(Index d, Index b) const {
    if (packs_x_) return {group_[d].weight_ih + b * block_ih_, {}};
    return {nullptr, {layer_.parameters[d].weight_ih, layer_.H, 0, gates, b * units}};
  }
  BlockOfWeights<E> weight_hh(Index d, Index b) const {
    if (packs_h_) return {group_[d].weight_hh + b * block_hh_, {}};
    return {nullptr, hidden_in_place(d, b, 0, first)};
  }
  BlockOfWeights<C> second(Index d, Index b) const {
    if (packs_h_) return {group_[d].second + b * block_second_, {}};
    return {nullptr, hidden_in_place(d, b, first, gates - first)};
  }
  BlockOfWeights<C> weight_hr(Index d, Index b) const {
    if (packs_h_) return {group_[d].second + b * layer_.H * wide * lanes, {}};
    return {nullptr, {layer_.parameters[d].weight_hr, layer_.O, 0, 1, b * wide * lanes}};
  }
  // Blocks of W_hh: those of one head and of all.
  Index head_blocks() const { return head_blocks_; }
  Index hidden_blocks() const { return heads_ * head_blocks_; }

  void run(int thread, int threads) const {
    for (Index d = 0; d < layer_.directions; ++d) {
      const Range blocks = split(blocks_, thread, threads);
      for (Index b = blocks.begin; b < blocks.end; ++b) pack_input(d, b);
      if (!packs_h_) continue;
      const Range hidden = split(hidden_blocks(), thread, threads);
      for (Index b = hidden.begin; b < hidden.end; ++b) pack_hidden(d, b);
      const Range outs = split(layer_.P ? out_blocks_ : 0, thread, threads);
      for (Index b = outs.begin; b < outs.end; ++b) pack_projection(d, b);
    }
  }

 private:
  Weight head_of_block(Index d, Index block) const {
    return head_of(layer_.parameters[d].weight_hh, block / head_blocks_, sizeof(S));
  }
  BlockInPlace hidden_in_place(Index d, Index b, int begin, int count) const {
    return {head_of_block(d, b), layer_.H / heads_, begin, count, b % head_blocks_ * units};
  }

  void pack_hidden(Index d, Index block) const {
    const Index b = block % head_blocks_, units_of_head = layer_.H / heads_;
    const Weight w = head_of_block(d, block);
    pack_gates<E, S>(group_[d].weight_hh + block * block_hh_, w, units_of_head, layer_.O / heads_,
                     0, first, tiles, b * units);
    if constexpr (K::two_products)
      pack_gates<C, S>(group_[d].second + block * block_second_, w, units_of_head, units_of_head,
                       first, gates - first, tiles, b * units);
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

  // W_hr [P, H] as outputs P over k = H: its rows are the units, so it packs as one gate.
  void pack_projection(Index d, Index b) const {
    pack_gates<C, S>(group_[d].second + b * layer_.H * wide * lanes, layer_.parameters[d].weight_hr,
                     layer_.O, layer_.H, 0, 1, wide, b * wide * lanes);
  }

  const Layer& layer_;
  const Index heads_, blocks_, head_blocks_, out_blocks_;
  const Index block_ih_, block_hh_, block_second_;  // elements of one block
  const bool packs_x_, packs_h_;
  Group group_[2] = {};
  std::size_t used_ = 0;
};

template <class Cell, class S>
class Forward : protected Shape<Cell, S> {
 protected:
  using K = Shape<Cell, S>;
  using K::lanes, K::gates, K::tiles, K::vectors, K::rows, K::units, K::first, K::wide;
  using typename K::C, typename K::E;
  using typename K::V;

 public:
  // Lays the scratch out from `base`; from nothing, only measures it.
  Forward(const Layer& layer, void* base)
      : layer_(layer),
        steps_(*layer.steps),
        Hp_(padded(layer.H)),
        Op_(padded(layer.O)),
        blocks_(ceil_div(layer.H, units)),
        out_blocks_(ceil_div(layer.O, wide * lanes)),
        saved_width_(saved_width<Cell>(layer)),
        copies_(sizeof(S) != sizeof(E) || layer.input.unit != 1),
        packing_(layer, layer.packed ? layer.packed : base) {
    Arena arena(base);
    const Index B = steps_.B;
    if (!layer.packed) arena.take<char>(static_cast<Index>(packing_.used()));
    for (Index d = 0; d < layer.directions; ++d) {
      Group& g = group_[d];
      static_cast<typename Packing<Cell, S>::Group&>(g) = packing_.group(d);
      g.initial = arena.take<E>(B * Op_);
      g.h = arena.take<E>(2 * B * Op_);
      g.reset_h = arena.take<E>(Op_);
      g.reset_c = Cell::states > 1 ? arena.take<C>(Hp_) : nullptr;
      g.c = Cell::states > 1 ? arena.take<C>(B * Hp_) : nullptr;
      const bool keeps = (layer.P || K::two_products) && !layer.gates;
      g.saved = keeps ? arena.take<C>(B * saved_width_) : nullptr;
    }
    const Index many = per_thread(layer.plan).total * layer.plan.threads;
    const Index alone = per_thread(layer.single).total;
    threads_ = arena.take<char>(many > alone ? many : alone);
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
  struct Group : Packing<Cell, S>::Group {
    E* initial;  // [B][Op] h0
    E* h;
    C* c;
    E* reset_h;  // [Op] the state after a reset
    C* reset_c;  // [Hp]
    C* saved;  // [B][saved_width]: one step's, where none are kept but a second product needs them
  };

  // Bytes of each thread's own scratch.
  struct PerThread {
    Index cap, x_gates, x_rows, h_rows, pointers, total;
  };

  PerThread per_thread(const Plan& plan) const {
    PerThread p{};
    const Index rows_mine =
        ceil_div(steps_.B, plan.row_threads) + (plan.row_threads > 1 ? rows : 0);
    const Index blocks_mine = ceil_div(blocks_, plan.column_threads);
    constexpr Index kBytes = 256 * 1024;  // projected gates of a block of steps stay in the cache
    const Index row_bytes = blocks_mine * vectors * lanes * static_cast<Index>(sizeof(C));
    p.cap = kBytes / (row_bytes > 0 ? row_bytes : 1);
    if (p.cap > 256) p.cap = 256;
    if (p.cap < 4 * rows) p.cap = 4 * rows;
    if (p.cap < rows_mine) p.cap = rows_mine;
    p.x_gates = p.cap * row_bytes;
    p.x_rows = copies_ ? round_up(p.cap * layer_.I * static_cast<Index>(sizeof(E))) : 0;
    p.pointers = round_up(p.cap * static_cast<Index>(sizeof(void*)));
    p.h_rows = round_up(rows_mine * static_cast<Index>(sizeof(void*)));
    p.total = round_up(p.x_gates) + p.x_rows + p.pointers + 2 * p.h_rows;
    return p;
  }
  static Index round_up(Index bytes) { return (bytes + 63) / 64 * 64; }

  void take_thread(const Plan& plan, int thread) {
    const PerThread p = per_thread(plan);
    char* base = threads_ + thread * p.total;
    cap_ = p.cap;
    x_gates_ = reinterpret_cast<C*>(base);
    x_copied_ = reinterpret_cast<E*>(base + round_up(p.x_gates));
    x_rows_ = reinterpret_cast<const E**>(base + round_up(p.x_gates) + p.x_rows);
    h_rows_ = reinterpret_cast<const E**>(base + round_up(p.x_gates) + p.x_rows + p.pointers);
    second_rows_ = reinterpret_cast<const C**>(reinterpret_cast<char*>(h_rows_) + p.h_rows);
  }

  // ---- before the first step ------------------------------------------------------------------

  void prepare(int thread, int threads) {
    if (thread == 0 && steps_.fresh)
      for (Index d = 0; d < layer_.directions; ++d) {
        load_state<S>(group_[d].reset_h, layer_.reset_h, d, 0, layer_.O);
        if constexpr (Cell::states > 1)
          load_state<S>(group_[d].reset_c, layer_.reset_c, d, 0, layer_.H);
      }
    if (!layer_.packed) packing_.run(thread, threads);
    for (Index d = 0; d < layer_.directions; ++d) {
      const Range mine = split(steps_.B, thread, threads);
      for (Index i = mine.begin; i < mine.end; ++i) initial_state(d, i);
    }
    if (steps_.padding) {
      const Range mine = split(steps_.B, thread, threads);
      for (Index i = mine.begin; i < mine.end; ++i) clear_padding(i);
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
    if (steps_.length[i] == 0) {
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
  // The steps that are projected together, and their pairs.
  struct Block {
    Index d;
    Range steps;
    Index pairs;
    const Deal& deal;
  };

  // The steps from s on. Gives where it stopped: after the last, or where the team is to become one
  // thread or a team again.
  Index recur(Index d, const Share& share, Index s) {
    const Deal deal(steps_, share, rows);
    const Walk walk{steps_, reverse(d)};
    const Range blocks = split(blocks_, share.column, share.columns);
    while (s < steps_.T) {
      if (share.resting > 0 && share.team->gathers(share.resting)) return s;
      Index end = s, pairs = 0;
      for (; end < steps_.T; ++end) {
        const Index t = walk.step(end), n = deal.count(steps_.active[t]);
        if (end > s && pairs + n > cap_) break;
        for (Index j = 0; j < n; ++j, ++pairs) x_rows_[pairs] = input_row(t, deal.row(j), pairs);
      }
      project(Block{d, Range{s, end}, pairs, deal}, share, blocks);
      for (Index m = 0; s < end; ++s) {
        const Index t = walk.step(s), n = deal.count(steps_.active[t]);
        const bool crowded = step(Position{d, t, deal, reverse(d)}, share, blocks, n, m);
        m += n;
        if (crowded && share.may_shrink) return s + 1;
      }
    }
    return s;
  }

  // The only direction of a part of a layer may be the one that runs backwards in time.
  bool reverse(Index d) const { return d == 1 || layer_.reverse; }

  const E* input_row(Index t, Index i, Index pair) {
    const S* x = at<const S>(layer_.input, steps_, t, i);
    if constexpr (sizeof(S) == sizeof(E)) {
      if (!copies_) return x;
    }
    E* row = x_copied_ + pair * layer_.I;
    gather(row, x, layer_.input.unit, layer_.I);
    return row;
  }

  C* x_gates(const Range& blocks, Index b, Index m) const {
    return x_gates_ + ((b - blocks.begin) * cap_ + m) * vectors * lanes;
  }

  void project(const Block& block, const Share&, const Range& blocks) {
    const Index d = block.d, pairs = block.pairs;
    const Group& g = group_[d];
    for (Index b = blocks.begin; b < blocks.end; ++b) {
      const BlockOfWeights<E> weights = packing_.weight_ih(d, b);
      const C* bias = g.bias_x + b * vectors * lanes;
      in_blocks_of_rows<rows>(pairs, [&](auto count, Index m) {
        constexpr int R = decltype(count)::value;
        V acc[R][vectors];
#pragma GCC unroll 24
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 24
          for (int v = 0; v < vectors; ++v) acc[r][v] = V::load(bias + v * lanes);
        C* to = x_gates(blocks, b, m);
        if (!weights.packed) {
          const auto sums = multiplied(acc, x_rows_ + m, layer_.I, weights);
          __builtin_memcpy(to, sums.v, sizeof(sums.v));
          return;
        }
        accumulate<R, vectors>(acc, x_rows_ + m, layer_.I, weights.packed);
#pragma GCC unroll 24
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 24
          for (int v = 0; v < vectors; ++v) acc[r][v].store(to + (r * vectors + v) * lanes);
      });
    }
  }

  // Gives whether the team waits for each other too long.
  bool step(const Position& p, const Share& share, const Range& blocks, Index n, Index m) {
    const Group& g = group_[p.d];
    const Walk walk{steps_, p.reverse};
    for (Index j = 0; j < n; ++j) {
      const Index i = p.deal.row(j);
      h_rows_[j] = walk.starts_fresh(p.t, i) ? g.reset_h
                   : walk.first(p.t, i)      ? g.initial + i * Op_
                                             : g.h + ((~p.t & 1) * steps_.B + i) * Op_;
    }
    for (Index b = blocks.begin; b < blocks.end; ++b) first_product(p, blocks, b, n, m);
    const bool crowded = share.team->wait(share.columns);
    if constexpr (Cell::projects) {
      if (!layer_.P) return crowded;
      second_operands(p, n, Cell::saved);
      const Range outs = split(out_blocks_, share.column, share.columns);
      for (Index b = outs.begin; b < outs.end; ++b) project_hidden(p, b, n);
      return share.team->wait(share.columns);
    } else if constexpr (K::two_products) {
      second_operands(p, n, Cell::operand);
      for (Index b = blocks.begin; b < blocks.end; ++b) second_product(p, blocks, b, n, m);
      return share.team->wait(share.columns);
    }
    return crowded;
  }

  void second_operands(const Position& p, Index n, int plane) {
    for (Index j = 0; j < n; ++j) second_rows_[j] = saved_row(p, p.deal.row(j)) + plane * Hp_;
  }

  // The pair's saved values, or null where nothing reads them.
  C* saved_row(const Position& p, Index i) const {
    if (layer_.gates)
      return static_cast<C*>(layer_.gates) + p.d * layer_.gates_group +
             (steps_.offset[p.t] + i) * saved_width_;
    return group_[p.d].saved ? group_[p.d].saved + i * saved_width_ : nullptr;
  }

  void first_product(const Position& p, const Range& blocks, Index b, Index n, Index m) {
    const Group& g = group_[p.d];
    constexpr int N = first * tiles;
    const BlockOfWeights<E> weights = packing_.weight_hh(p.d, b);
    const C* bias_h = g.bias_h + b * vectors * lanes;
    in_blocks_of_rows<rows>(n, [&](auto count, Index j) {
      constexpr int R = decltype(count)::value;
      const C* x = x_gates(blocks, b, m + j);
      // To come while the product runs: what the cell reads, and what the next rows begin with.
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
          acc[r][v] = Cell::separate[v % first] ? V::load(bias_h + from * lanes)
                                                : V::load(x + (r * vectors + from) * lanes);
        }
      const Sums<R, N, C> sums = multiplied(acc, h_rows_ + j, layer_.O, weights);
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

  // acc + rows · W for one block of weights.
  template <int R, int N, class F>
  FASTRNN_INLINE static Sums<R, N, C> multiplied(V (&acc)[R][N], const F* const* operands, Index K,
                                                 const BlockOfWeights<F>& w) {
    if (w.packed) accumulate<R, N>(acc, operands, K, w.packed);
    Sums<R, N, C> sums(acc);
    if (!w.packed) add_in_place<F, S>(sums.v[0], R, N, operands, K, w.in_place);
    return sums;
  }

  // done(Int<M>{}, r) for R rows, as many of them at once as a cell takes.
  template <int R, class Done>
  FASTRNN_INLINE static void in_groups_of_rows(Done done) {
    constexpr int kMost = 2;
    int r = 0;
    for (; r + kMost <= R; r += kMost) done(Int<kMost>{}, r);
    if constexpr (R % kMost != 0) done(Int<R % kMost>{}, r);
  }

  // The cell, or its first half, on one tile of M rows from j on. a: their gates' sums, N vectors a
  // row; x_tile: the projection.
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
        if (layer_.gates) store_saved(saved_row(p, i[r]), unit, saved, r);
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
  // c before the step of the thread's row j, row i of all.
  const C* c_before(Index d, Index j, Index i) const {
    return h_rows_[j] == group_[d].reset_h ? group_[d].reset_c : c_row(d, i);
  }

  FASTRNN_INLINE void store_saved(C* keep, Index unit, const V* saved) {
    for (int s = 0; s < Cell::saved; ++s) saved[s].store(keep + s * Hp_ + unit);
  }
  template <int M>
  FASTRNN_INLINE void store_saved(C* keep, Index unit, const Rows<C, M>* saved, int r) {
    for (int s = 0; s < Cell::saved; ++s) saved[s].of[r].store(keep + s * Hp_ + unit);
  }

  FASTRNN_INLINE void finish_cell(const Position& p, Index i, Index unit, V c, C* to) {
    c.store(to);
    if (layer_.cell.data)
      store_units(c, at<C>(layer_.cell, steps_, p.t, i) + p.d * layer_.H + unit, layer_.H - unit);
    if (Walk{steps_, p.reverse}.last(p.t, i))
      store_units(
          c, static_cast<S*>(layer_.c_n) + (p.d * steps_.B + steps_.order[i]) * layer_.H + unit,
          layer_.H - unit);
  }

  // h of one tile to the state, to the output and, at the row's last step, to h_n.
  FASTRNN_INLINE void finish_hidden(const Position& p, Index i, Index unit, V h) {
    const Index O = layer_.O;
    const V kept = sizeof(E) == sizeof(S) ? h : rounded<S>(h);  // storing rounds to E
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
    const BlockOfWeights<C> weights = packing_.second(p.d, b);
    in_blocks_of_rows<rows>(n, [&](auto count, Index j) {
      constexpr int R = decltype(count)::value;
      const C* x = x_gates(blocks, b, m + j);
      V acc[R][N];
#pragma GCC unroll 24
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 24
        for (int v = 0; v < N; ++v)
          acc[r][v] = V::load(x + (r * vectors + v / G * gates + first + v % G) * lanes);
      const Sums<R, N, C> sums = multiplied(acc, second_rows_ + j, layer_.H, weights);
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

  // h = W_hr · hidden units.
  void project_hidden(const Position& p, Index b, Index n) {
    hidden_tiles(p, b, n, [&](Index j, Index unit, V h) FASTRNN_INLINE_LAMBDA {
      finish_hidden(p, p.deal.row(j), unit, h);
    });
  }

  // done(j, unit, h) for the tiles of block b of W_hr · hidden units.
  template <class Done>
  FASTRNN_INLINE void hidden_tiles(const Position& p, Index b, Index n, Done done) {
    const BlockOfWeights<C> weights = packing_.weight_hr(p.d, b);
    in_blocks_of_rows<K::wide_rows>(n, [&](auto count, Index j) {
      constexpr int R = decltype(count)::value;
      V acc[R][wide];
      clear(acc);
      const Sums<R, wide, C> sums = multiplied(acc, second_rows_ + j, layer_.H, weights);
      for (int r = 0; r < R; ++r)
        for (int v = 0; v < wide; ++v) {
          const Index unit = (b * wide + v) * lanes;
          if (unit < layer_.O) done(j + r, unit, sums.v[r][v]);
        }
    });
  }

  const Layer& layer_;
  const Steps& steps_;
  const Index Hp_, Op_, blocks_, out_blocks_, saved_width_;
  const bool copies_;  // rows of input that the kernel cannot read where they lie
  const Packing<Cell, S> packing_;
  Group group_[2] = {};
  char* threads_ = nullptr;
  std::size_t used_ = 0;
  // The thread's own.
  Index cap_ = 0;
  C* x_gates_ = nullptr;
  E* x_copied_ = nullptr;
  const E** x_rows_ = nullptr;
  const E** h_rows_ = nullptr;
  const C** second_rows_ = nullptr;
};

}  // namespace fastrnn::FASTRNN_ISA
