// Messages for both passes of the recurrence: opening the exchange, waiting for a message, and
// summing it. The three ways of exchange differ only here and in product.h.
#pragma once

#include "persistent/product.h"
#include "persistent/steps.h"

namespace fastrnn::persistent {

// The medium of messages: the ring, or two buffers and their barriers.
struct Exchange {
  Ring ring;
  u32* messages;
  Barrier* barriers;
};

// The rows of the pass, by tile, whose h is not multiplied at step t because an episode starts.
template <class C>
FASTRNN_HOST_DEVICE void rows_dropped(const StepTable& steps, const Position& me, int t,
                                      bool reverse, int pass, bool (&drop)[C::batch]) {
  FASTRNN_UNROLL
  for (int n = 0; n < C::batch; ++n) {
    const int row = (pass * C::batch + n) * kRows + group_of(me.lane);
    drop[n] = row < me.rows && steps.starts_fresh(t, me.first_row + row, reverse);
  }
}

// Clears the two message buffers, initialises their barriers, and synchronises the team.
template <class C, class Machine>
FASTRNN_ON_MACHINE void empty_messages(Machine& machine, const Team& team, const Position& me,
                                       const Exchange& exchange, int messages) {
  for (int i = me.thread; i < 2 * team.rows_per_team * team.stride; i += kThreads)
    exchange.messages[i] = 0;
  if constexpr (C::via == Via::cluster) {
    if (me.thread == 0)
      for (int m = 0; m < 2; ++m) {
        machine.barrier_init(exchange.barriers + m);
        if (m < messages)
          machine.barrier_expect(exchange.barriers + m, me.rows * team.row_words * 4);
      }
    machine.cluster_sync();
  } else {
    machine.sync();
  }
}

template <class C, class Machine>
FASTRNN_ON_MACHINE Exchange open_exchange(Machine& machine, const Team& team, const Position& me,
                                          const SharedLayout& at, int messages) {
  unsigned char* const shared = machine.shared();
  const Exchange exchange{ring_of<C>(team, me), reinterpret_cast<u32*>(shared + at.messages),
                          reinterpret_cast<Barrier*>(shared + at.barriers)};
  if constexpr (C::via != Via::ring) empty_messages<C>(machine, team, me, exchange, messages);
  return exchange;
}

// Waits until this thread can read message m of `messages`.
template <class C, class Machine>
FASTRNN_ON_MACHINE void await_message(Machine& machine, const Team& team, const Position& me,
                                      const Exchange& exchange, int m, int messages) {
  if constexpr (C::via == Via::cluster) {
    Barrier* const barrier = exchange.barriers + (m & 1);
    machine.barrier_wait(barrier, phase_parity(m));
    if (me.thread == 0 && m + 2 < messages)
      machine.barrier_expect(barrier, me.rows * team.row_words * 4);
  } else if constexpr (C::via == Via::block) {
    machine.sync();
  }
}

// Computes the sums of message m for a pass.
template <class C, class Machine>
FASTRNN_ON_MACHINE void sum_message(Machine& machine, const Team& team, const Position& me,
                                    const Weights<C>& weights, const Exchange& exchange, int m,
                                    int pass, const bool (&drop)[C::batch], Accumulators<C>& sums) {
  FASTRNN_UNROLL
  for (int n = 0; n < C::batch; ++n) {
    FASTRNN_UNROLL
    for (int k = 0; k < C::M; ++k) {
      FASTRNN_UNROLL
      for (int j = 0; j < 4; ++j) sums[n][k][j] = 0.0f;
    }
  }
  if constexpr (C::via == Via::ring)
    sum_from_ring<C>(machine, team, me, weights, exchange.ring, m, pass, drop, sums);
  else
    sum_from_shared<C>(machine, team, me, weights,
                       exchange.messages + (m & 1) * team.rows_per_team * team.stride, pass, drop,
                       sums);
}

}  // namespace fastrnn::persistent
