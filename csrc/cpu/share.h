// What each thread of a team owns of a layer: directions, rows, and blocks of hidden units.
//
// A thread owns one direction or runs one after the other. Threads of one direction divide the rows
// (Deal); those that share rows divide the blocks of units, with a barrier for each product of a
// step. Where such a team waits long (its cores are oversubscribed), it enters a solo phase: the
// first thread computes all units alone, the others rest, until the cores are free again. A value's
// bits do not depend on the thread that computes it.
#pragma once

#include "layer.h"
#include "pack.h"

namespace fastrnn::FASTRNN_ISA {

struct Share {
  bool idle;
  Index first_direction, last_direction;
  int row, rows;        // this part of the rows, of how many
  int column, columns;  // this part of the units, of how many
  bool may_shrink;      // the team may enter a solo phase
  int resting;          // threads that rest during the solo phase of this thread
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

// Runs the thread's directions. run(d, share, done) resumes direction d after `done` steps and
// returns the number of completed steps: all of them, or fewer where a solo phase begins or ends.
// enter(plan, thread) is called before the thread takes its place in a plan.
template <class Run, class Enter>
FASTRNN_INLINE void run_directions(const Layer& layer, const Plan& plan, int thread, Run run,
                                   Enter enter) {
  Share share = share_of(layer, plan, thread);
  if (share.idle) return;
  enter(plan, thread);
  const Index T = layer.steps->T, end = share.last_direction * T;
  std::uint32_t solo_phases = 0;
  for (Index at = share.first_direction * T; at < end;) {
    const Index d = at / T, done = run(d, share, at - d * T);
    at = d * T + done;
    if (done == T) continue;
    if (share.resting > 0) {  // the solo phase ends
      share.team->resume(at);
      share = share_of(layer, plan, thread);
      enter(plan, thread);
    } else if (thread > 0) {
      at = share.team->rest(solo_phases++);
    } else {
      const int others = share.columns - 1;
      share = share_of(layer, layer.single, thread);
      share.resting = others;
      enter(layer.single, thread);
    }
  }
  if (share.resting > 0) share.team->resume(end);
}

// The rows of a share. Sorted rows are dealt in runs of `run` rows, round robin, so that each
// thread gets long and short rows; rows of equal length are divided into one run a thread.
struct Deal {
  Index run, thread, threads;

  FASTRNN_INLINE Deal(const Steps& steps, const Share& share, Index rows_per_block)
      : run(rows_per_block), thread(share.row), threads(share.rows) {
    const bool equal = steps.T == 0 || steps.active[steps.T - 1] == steps.B;
    if (equal || threads == 1) run = ceil_div(steps.B > 0 ? steps.B : 1, threads);
  }
  // The sorted row of the share's row j.
  FASTRNN_INLINE Index row(Index j) const {
    return threads == 1 ? j : ((j / run) * threads + thread) * run + j % run;
  }
  // How many of the sorted rows below `active` are the share's.
  FASTRNN_INLINE Index count(Index active) const {
    if (threads == 1) return active;
    const Index full = active / run, rest = active % run;
    const Index runs = full > thread ? (full - thread + threads - 1) / threads : 0;
    return runs * run + (full % threads == thread ? rest : 0);
  }
};

}  // namespace fastrnn::FASTRNN_ISA
