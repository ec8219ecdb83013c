// The recurrence backward: all steps of a sequence in one launch, W_hh loaded once.
//
// Maths        from the last step to the first:  dh = d_output + the contribution of step t+1;
//              the cell's backward gives d_gates and the part that bypasses the product (a GRU's
//              dh·z, an LSTM's dc·f);  dh of step t-1 = d_gates·W_hh + that part
// Read         weight_hh storage [groups][gates·H][H]; forward's results: hidden, cell, saved; h0,
//              c0; gradients (absent: zeros): d_output (storage) and d_above (float), which are
//              added; d_cell (float); d_h_n, d_c_n
// Written      d_gates   storage, the cell's gradients in planes, for every active pair
//              d_h0, d_c0  storage, if requested
//              The gradients of weights, biases and input are products of d_gates with hidden and x
//              over all steps, and are computed elsewhere.
// Owner        of a (row, unit): one thread, for the whole sequence. It keeps the part of dh that
//              bypasses the product, and dc, as float in shared memory that no other thread uses.
// Steps        an inactive row keeps its gradients at the step. Where a row starts an episode, the
//              gradient of the previous state is zero: the row sends zeros for d_gates.
// Exchange     message s contains the d_gates of loop step s, rounded to the operand type, with one
//              field for each gate; loop step s + 1 multiplies it. d_h0 follows the last message.
// Cost         the message is `gates` times as large as forward's, because it contains d_gates
//              instead of h. The weights in registers and the products are as many as forward's. A
//              split of K over a cluster's blocks, with partial sums added through distributed
//              shared memory, would read 1 / cluster of the message.
#pragma once

#include "cells/elman.h"
#include "cells/gru.h"
#include "cells/lstm.h"
#include "persistent/exchange.h"

namespace fastrnn::persistent {

template <class S>  // the storage type
struct Backward {
  Team team;
  StepTable steps;
  CellOptions options;
  int reverse_from = 1 << 30;  // groups from this one on run backwards in time
  const S* weight_hh = nullptr;
  SequenceOf<const S> hidden;
  SequenceOf<const float> cell;
  PlanesOf<const float> saved;
  StateOf<const S> h0, c0;
  SequenceOf<const S> d_output;
  SequenceOf<const float> d_above;
  SequenceOf<const float> d_cell;
  StateOf<const S> d_h_n, d_c_n;
  PlanesOf<S> d_gates;
  StateOf<S> d_h0, d_c0;
};

// The values that a thread reads for one item before it waits.
template <class Cell>
struct StepValues {
  bool active, fresh;
  float saved[Cell::saved], previous[Cell::states], next[Cell::states], d_next[Cell::states];
};

// The state before step t of an active row: that of the previous step, or the initial state.
template <class C, class S>
FASTRNN_ON_MACHINE void read_previous(const Backward<S>& p, const Position& me, int t, int row,
                                      int unit, StepValues<typename C::Cell>& v) {
  using Cell = typename C::Cell;
  const int before = me.group >= p.reverse_from ? t + 1 : t - 1;
  const bool first = !p.steps.is_active(before, row);
  v.previous[0] = 0.0f;
  if constexpr (Cell::carries) {  // otherwise the cell's backward does not read h
    if (!v.fresh && !first) {
      v.previous[0] = C::Operand::load(*p.hidden.at(p.steps, me.group, before, row, unit));
    } else if (!v.fresh && p.h0.data) {
      v.previous[0] = C::Operand::load(*p.h0.at(p.steps, me.group, row, unit));
    }
  }
  if constexpr (Cell::states > 1) {
    v.previous[1] = 0.0f;
    if (!v.fresh && !first) {
      v.previous[1] = *p.cell.at(p.steps, me.group, before, row, unit);
    } else if (!v.fresh && p.c0.data) {
      v.previous[1] = C::Operand::load(*p.c0.at(p.steps, me.group, row, unit));
    }
  }
}

template <class C, class S>
FASTRNN_ON_MACHINE void read_values(const Backward<S>& p, const Position& me, int t, const Item& x,
                                    StepValues<typename C::Cell>& v) {
  using Cell = typename C::Cell;
  const int row = me.first_row + x.row, group = me.group;
  const bool valid = x.exists && x.row < me.rows && x.unit < p.team.units;
  v.active = valid && p.steps.is_active(t, row);
  if (!v.active) return;
  v.fresh = p.steps.starts_fresh(t, row, group >= p.reverse_from);
  const std::int64_t n = p.steps.pair(t, row);
  FASTRNN_UNROLL
  for (int k = 0; k < Cell::saved; ++k) v.saved[k] = *p.saved.at(group, n, k, x.unit);
  read_previous<C>(p, me, t, row, x.unit, v);
  v.next[0] = 0.0f;  // no cell's backward reads h'
  v.d_next[0] = 0.0f;
  if (p.d_output.data)
    v.d_next[0] += C::Operand::load(*p.d_output.at(p.steps, group, t, row, x.unit));
  if (p.d_above.data) v.d_next[0] += *p.d_above.at(p.steps, group, t, row, x.unit);
  if constexpr (Cell::states > 1) {
    v.next[1] = *p.cell.at(p.steps, group, t, row, x.unit);
    v.d_next[1] = p.d_cell.data ? *p.d_cell.at(p.steps, group, t, row, x.unit) : 0.0f;
  }
}

// The cell's backward on one item. `d_h` and `d_c` hold the part of dh that bypasses the product,
// and dc: from step t+1 on entry, for step t-1 on return. `out` is the operand of the product.
template <class C, int fields, class S>
FASTRNN_ON_MACHINE void run_cell_backward(const Backward<S>& p, const Position& me, int t,
                                          const Item& x, const StepValues<typename C::Cell>& v,
                                          float from_product, float* d_h, float* d_c,
                                          float (&out)[fields]) {
  using Cell = typename C::Cell;
  Value saved[Cell::saved], previous[Cell::states], next[Cell::states], d_next[Cell::states];
  Value d_previous[Cell::states], d_a[Cell::gradients];
  FASTRNN_UNROLL
  for (int k = 0; k < Cell::saved; ++k) saved[k] = Value(v.saved[k]);
  FASTRNN_UNROLL
  for (int k = 0; k < Cell::states; ++k) {
    previous[k] = Value(v.previous[k]);
    next[k] = Value(v.next[k]);
  }
  d_next[0] = Value(v.d_next[0] + *d_h + from_product);
  if constexpr (Cell::states > 1) d_next[1] = Value(v.d_next[1] + *d_c);
  Cell::backward(p.options, saved, previous, next, d_next, d_previous, d_a);

  *d_h = v.fresh ? 0.0f : d_previous[0].v;
  if constexpr (Cell::states > 1) *d_c = v.fresh ? 0.0f : d_previous[1].v;
  const std::int64_t n = p.steps.pair(t, me.first_row + x.row);
  FASTRNN_UNROLL
  for (int k = 0; k < Cell::gradients; ++k)
    *p.d_gates.at(me.group, n, k, x.unit) = C::Operand::store(d_a[k].v);
  each<fields>([&](auto f_constant) {
    constexpr int f = decltype(f_constant)::value, plane = Cell::hidden_gradient[f];
    out[f] = v.fresh ? 0.0f : d_a[plane].v;
  });
}

template <class C, class S>
FASTRNN_ON_MACHINE void read_last_gradients(const Backward<S>& p, const Position& me,
                                            const CarriedStates& states) {
  for (int pass = 0; pass < p.team.passes; ++pass)
    for (int i = 0; i < C::items; ++i) {
      const Item x = item_of<C>(i, pass, me);
      const bool valid = x.exists && x.row < me.rows && x.unit < p.team.units;
      const int row = me.first_row + x.row;
      states.at(0, pass, i, me.thread) =
          valid && p.d_h_n.data ? C::Operand::load(*p.d_h_n.at(p.steps, me.group, row, x.unit))
                                : 0.0f;
      if (C::Cell::states > 1)
        states.at(1, pass, i, me.thread) =
            valid && p.d_c_n.data ? C::Operand::load(*p.d_c_n.at(p.steps, me.group, row, x.unit))
                                  : 0.0f;
    }
}

template <class C, class S>
FASTRNN_ON_MACHINE void write_first_gradients(const Backward<S>& p, const Position& me, int pass,
                                              const CarriedStates& states,
                                              const float (&totals)[C::items][1]) {
  FASTRNN_UNROLL
  for (int i = 0; i < C::items; ++i) {
    const Item x = item_of<C>(i, pass, me);
    if (!x.exists || x.row >= me.rows || x.unit >= p.team.units) continue;
    const int row = me.first_row + x.row;
    if (p.d_h0.data)
      *p.d_h0.at(p.steps, me.group, row, x.unit) =
          C::Operand::store(states.at(0, pass, i, me.thread) + totals[i][0]);
    if (C::Cell::states > 1 && p.d_c0.data)
      *p.d_c0.at(p.steps, me.group, row, x.unit) =
          C::Operand::store(states.at(1, pass, i, me.thread));
  }
}

// Loop step s of a pass: `totals` holds the product of step t+1; sends d_gates.
template <class C, class Machine, class S>
FASTRNN_ON_MACHINE void step_backward(Machine& machine, const Backward<S>& p, const Position& me,
                                      const Exchange& exchange, const CarriedStates& states, int s,
                                      int pass, int t,
                                      const StepValues<typename C::Cell> (&values)[C::items],
                                      const float (&totals)[C::items][1]) {
  constexpr int kFields = C::Cell::gates;
  float out[C::items][kFields];
  FASTRNN_UNROLL
  for (int i = 0; i < C::items; ++i) {
    FASTRNN_UNROLL
    for (int f = 0; f < kFields; ++f) out[i][f] = 0.0f;
    float& d_h = states.at(0, pass, i, me.thread);
    if (values[i].active) {
      float* const d_c = C::Cell::states > 1 ? &states.at(1, pass, i, me.thread) : nullptr;
      run_cell_backward<C, kFields>(p, me, t, item_of<C>(i, pass, me), values[i], totals[i][0],
                                    &d_h, d_c, out[i]);
    } else {
      d_h += totals[i][0];
    }
  }
  send<C, kFields>(machine, p.team, me, exchange.ring, exchange.messages, exchange.barriers, s,
                   pass, out);
}

template <class C, class Machine, class S>
FASTRNN_ON_MACHINE void backward(Machine& machine, const Backward<S>& p) {
  using Cell = typename C::Cell;
  static_assert(C::M == 1);
  const Position me = position_of<C>(machine, p.team);
  const SharedLayout at = shared_layout(runtime_config<C>(), p.team, Cell::states);
  unsigned char* const shared = machine.shared();
  const CarriedStates states{reinterpret_cast<float*>(shared + at.states), p.team.passes, C::items};
  const bool reverse = me.group >= p.reverse_from;
  const int T = p.steps.T;

  Weights<C> weights;
  const std::int64_t matrix = static_cast<std::int64_t>(Cell::gates) * p.team.units * p.team.units;
  const BackwardWeights<typename C::Operand> source{
      {p.weight_hh + me.group * matrix, p.team.units, false},
      Cell::gates,
      words_per_field<C>(p.team)};
  load_weights<C>(machine, source, me, reinterpret_cast<Words*>(shared + at.weights), weights);

  const Exchange exchange = open_exchange<C>(machine, p.team, me, at, T);
  read_last_gradients<C>(p, me, states);
  unsigned turn = 0;
  for (int s = 0; s <= T; ++s) {  // loop step T computes only d_h0
    const int t = reverse ? s : T - 1 - s;
    for (int pass = 0; pass < p.team.passes; ++pass) {
      const Position here = made_anew(machine, me);
      StepValues<Cell> values[C::items];
      FASTRNN_UNROLL
      for (int i = 0; i < C::items; ++i) {
        values[i].active = false;
        if (s < T) read_values<C>(p, here, t, item_of<C>(i, pass, here), values[i]);
      }
      float totals[C::items][1] = {};
      if (s > 0) {
        if (pass == 0) await_message<C>(machine, p.team, me, exchange, s - 1, T);
        const bool drop[C::batch] = {};
        Accumulators<C> sums;
        sum_message<C>(machine, p.team, me, weights, exchange, s - 1, pass, drop, sums);
        total<C>(machine, me, turn++, reinterpret_cast<Sums*>(shared + at.sums), sums, totals);
      }
      if (s < T)
        step_backward<C>(machine, p, made_anew(machine, me), exchange, states, s, pass, t, values,
                         totals);
      else
        write_first_gradients<C>(p, me, pass, states, totals);
    }
  }
  if constexpr (C::via == Via::cluster) machine.cluster_sync();
}

}  // namespace fastrnn::persistent
