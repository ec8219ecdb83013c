// The recurrence forward: all steps of a sequence in one launch, W_hh loaded once.
//
// Maths        for each step:  a = x_gates + h·W_hhᵀ, then the cell (csrc/cells/)
// Read         x_gates   float [N][gates·H] with strides: x·W_ihᵀ and the biases, without the
//                        hidden bias of a gate that the cell keeps separate (the GRU's b_hn), which
//                        is in hidden_bias
//              weight_hh storage [groups][gates·H][H]
//              h0, c0    storage, absent: zeros
// Written      hidden    storage, every h;  cell (float, every c) and saved (float, the cell's
//              values) if requested;  h_n, c_n. Inactive pairs are not written.
// Saved        the values that Cell::forward writes to `saved`, in planes, as described for `gates`
//              in problem.h.
// Owner        of a (row, unit): one thread, for the whole sequence. It keeps h and c in shared
//              memory that no other thread uses, h rounded to storage, c as float.
// Steps        an inactive row carries its state through the step; a row that starts an episode
//              uses zeros for h and c. So lengths, packed rows and resets in both directions are
//              data.
// Exchange     message s is the h that step s multiplies (product.h has the ways of exchange);
//              message 0 is h0.
// Cost         product.h's product, one message, and `gates` loads of x_gates per item, which are
//              issued before the wait; those of the next step are prefetched into L2.
#pragma once

#include "cells/elman.h"
#include "cells/gru.h"
#include "cells/lstm.h"
#include "persistent/exchange.h"

namespace fastrnn::persistent {

template <class S>  // the storage type
struct Forward {
  Team team;
  StepTable steps;
  CellOptions options;
  int reverse_from = 1 << 30;  // groups from this one on run backwards in time
  bool aligned = false;        // Matrix::aligned
  const S* weight_hh = nullptr;
  const float* hidden_bias = nullptr;  // [groups][gates·H] or null: zeros
  PlanesOf<const float> x_gates;
  StateOf<const S> h0, c0;
  SequenceOf<S> hidden;
  SequenceOf<float> cell;
  PlanesOf<float> saved;
  StateOf<S> h_n, c_n;
};

// The values that a thread reads for its items of a pass before it waits.
template <class C>
struct StepInputs {
  float x[C::items][C::M];
  bool active[C::items], fresh[C::items];
};

template <class C, class Machine, class S>
FASTRNN_ON_MACHINE void read_inputs(Machine& machine, const Forward<S>& p, const Position& me,
                                    int t, int pass, StepInputs<C>& in) {
  const bool reverse = me.group >= p.reverse_from;
  const int next = reverse ? t - 1 : t + 1;
  FASTRNN_UNROLL
  for (int i = 0; i < C::items; ++i) {
    const Item x = item_of<C>(i, pass, me);
    const int row = me.first_row + x.row;
    const bool valid = x.exists && x.row < me.rows && x.unit < p.team.units;
    in.active[i] = valid && p.steps.is_active(t, row);
    in.fresh[i] = valid && p.steps.starts_fresh(t, row, reverse);
    FASTRNN_UNROLL
    for (int m = 0; m < C::M; ++m) in.x[i][m] = 0.0f;
    if (!in.active[i]) continue;
    const std::int64_t n = p.steps.pair(t, row);
    FASTRNN_UNROLL
    for (int m = 0; m < C::M; ++m) in.x[i][m] = *p.x_gates.at(me.group, n, m, x.unit);
    if ((me.lane & 12) == 0 && p.steps.is_active(next, row)) {
      const std::int64_t after = p.steps.pair(next, row);
      FASTRNN_UNROLL
      for (int m = 0; m < C::M; ++m) machine.prefetch(p.x_gates.at(me.group, after, m, x.unit));
    }
  }
}

// The cell on one item: updates its state, and writes its outputs to memory.
template <class C, class S>
FASTRNN_ON_MACHINE float run_cell(const Forward<S>& p, const Position& me, int t, const Item& x,
                                  bool fresh, const float (&input)[C::M], const float (&sum)[C::M],
                                  float& h, float* c) {
  using Cell = typename C::Cell;
  using Operand = typename C::Operand;
  Value in[C::M], a[C::M], previous[Cell::states], next[Cell::states], saved[Cell::saved];
  each<C::M>([&](auto m_constant) {
    constexpr int m = decltype(m_constant)::value;
    constexpr bool separate = Cell::separate[m];
    in[m] = Value(input[m]);
    float other = input[m];
    if constexpr (separate) {
      const std::int64_t at =
          (static_cast<std::int64_t>(me.group) * C::M + m) * p.team.units + x.unit;
      other = p.hidden_bias ? p.hidden_bias[at] : 0.0f;
    }
    a[m] = Value(sum[m] + other);
  });
  previous[0] = Value(fresh ? 0.0f : h);
  if constexpr (Cell::states > 1) previous[1] = Value(fresh ? 0.0f : *c);
  Cell::forward(p.options, in, a, previous, next, saved);

  const int row = me.first_row + x.row;
  const S stored = Operand::store(next[0].v);
  h = Operand::load(stored);
  *p.hidden.at(p.steps, me.group, t, row, x.unit) = stored;
  if constexpr (Cell::states > 1) {
    *c = next[1].v;
    if (p.cell.data) *p.cell.at(p.steps, me.group, t, row, x.unit) = next[1].v;
  }
  if (p.saved.data) {
    const std::int64_t n = p.steps.pair(t, row);
    FASTRNN_UNROLL
    for (int k = 0; k < Cell::saved; ++k) *p.saved.at(me.group, n, k, x.unit) = saved[k].v;
  }
  return h;
}

template <class C, class Machine, class S>
FASTRNN_ON_MACHINE void send_h0(Machine& machine, const Forward<S>& p, const Position& me,
                                const Exchange& exchange, const CarriedStates& states) {
  for (int pass = 0; pass < p.team.passes; ++pass) {
    float h[C::items][1];
    FASTRNN_UNROLL
    for (int i = 0; i < C::items; ++i) {
      const Item x = item_of<C>(i, pass, me);
      const bool valid = x.exists && x.row < me.rows && x.unit < p.team.units;
      const int row = me.first_row + x.row;
      h[i][0] =
          valid && p.h0.data ? C::Operand::load(*p.h0.at(p.steps, me.group, row, x.unit)) : 0.0f;
      states.at(0, pass, i, me.thread) = h[i][0];
      if (C::Cell::states > 1)
        states.at(1, pass, i, me.thread) =
            valid && p.c0.data ? C::Operand::load(*p.c0.at(p.steps, me.group, row, x.unit)) : 0.0f;
    }
    send<C, 1>(machine, p.team, me, exchange.ring, exchange.messages, exchange.barriers, 0, pass,
               h);
  }
}

template <class C, class S>
FASTRNN_ON_MACHINE void write_last_states(const Forward<S>& p, const Position& me,
                                          const CarriedStates& states) {
  for (int pass = 0; pass < p.team.passes; ++pass)
    for (int i = 0; i < C::items; ++i) {
      const Item x = item_of<C>(i, pass, me);
      if (!x.exists || x.row >= me.rows || x.unit >= p.team.units) continue;
      const int row = me.first_row + x.row;
      if (p.h_n.data)
        *p.h_n.at(p.steps, me.group, row, x.unit) =
            C::Operand::store(states.at(0, pass, i, me.thread));
      if (C::Cell::states > 1 && p.c_n.data)
        *p.c_n.at(p.steps, me.group, row, x.unit) =
            C::Operand::store(states.at(1, pass, i, me.thread));
    }
}

template <class C, class Machine, class S>
FASTRNN_ON_MACHINE void forward(Machine& machine, const Forward<S>& p) {
  using Cell = typename C::Cell;
  const Position me = position_of<C>(machine, p.team);
  const SharedLayout at = shared_layout(runtime_config<C>(), p.team, Cell::states);
  unsigned char* const shared = machine.shared();
  const CarriedStates states{reinterpret_cast<float*>(shared + at.states), p.team.passes, C::items};
  const bool reverse = me.group >= p.reverse_from;
  const int T = p.steps.T;

  Weights<C> weights;
  const std::int64_t matrix = static_cast<std::int64_t>(C::M) * p.team.units * p.team.units;
  const ForwardWeights<typename C::Operand> source{
      {p.weight_hh + me.group * matrix, p.team.units, p.aligned}};
  load_weights<C>(machine, source, me, reinterpret_cast<Words*>(shared + at.weights), weights);

  const Exchange exchange = open_exchange<C>(machine, p.team, me, at, T);
  send_h0<C>(machine, p, me, exchange, states);
  unsigned turn = 0;
  for (int s = 0; s < T; ++s) {
    const int t = reverse ? T - 1 - s : s;
    for (int pass = 0; pass < p.team.passes; ++pass, ++turn) {
      StepInputs<C> in;
      bool drop[C::batch];
      read_inputs<C>(machine, p, me, t, pass, in);
      rows_dropped<C>(p.steps, me, t, reverse, pass, drop);
      if (pass == 0) await_message<C>(machine, p.team, me, exchange, s, T);
      Accumulators<C> sums;
      sum_message<C>(machine, p.team, me, weights, exchange, s, pass, drop, sums);
      float totals[C::items][C::M], h[C::items][1];
      total<C>(machine, me, turn, reinterpret_cast<Sums*>(shared + at.sums), sums, totals);
      FASTRNN_UNROLL
      for (int i = 0; i < C::items; ++i) {
        float& state = states.at(0, pass, i, me.thread);
        h[i][0] = state;
        if (!in.active[i]) continue;
        float* const c = Cell::states > 1 ? &states.at(1, pass, i, me.thread) : nullptr;
        h[i][0] = run_cell<C>(p, me, t, item_of<C>(i, pass, me), in.fresh[i], in.x[i], totals[i],
                              state, c);
      }
      if (s + 1 < T)
        send<C, 1>(machine, p.team, me, exchange.ring, exchange.messages, exchange.barriers, s + 1,
                   pass, h);
    }
  }
  write_last_states<C>(p, me, states);
  if constexpr (C::via == Via::cluster) machine.cluster_sync();
}

}  // namespace fastrnn::persistent
