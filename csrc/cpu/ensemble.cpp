// Runs an ensemble (ensemble.h). Either the threads share the problems out and each runs one alone,
// or a team works on one problem after the other, whichever is faster by the estimate of team.h.
// Each problem gives the bits that it gives by itself.
#include "ensemble.h"

#include <algorithm>
#include <atomic>
#include <cmath>

#include "host.h"
#include "team.h"
#include "threads.h"

namespace fastrnn {
namespace {

// How many threads share the problems out; 1: a team works on each in turn.
int sharing_threads(const Problem& p, std::int64_t count, Pass pass) {
  const auto threads = static_cast<int>(std::min<std::int64_t>(p.threads, count));
  if (threads <= 1) return 1;
  const Stack s = plan_pass(p, pass, false);
  const double alone = static_cast<double>(p.options.directions) * layer_time(s, 1, 1);
  const double team = layer_time(s, s.plan.row_threads, s.plan.column_threads) *
                      static_cast<double>(p.options.directions) / s.plan.direction_threads;
  const double rounds = std::ceil(static_cast<double>(count) / threads);
  const double layers = static_cast<double>(p.options.layers);
  const bool apart = rounds * layers * alone + kRegion < static_cast<double>(count) * layers * team;
  return apart ? threads : 1;
}

// The largest workspace of a problem; `alone`: each runs on one thread.
std::size_t most_workspace(const Problem* problems, std::int64_t count, Pass pass, bool alone) {
  std::size_t most = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    Problem p = problems[i];
    if (alone) p.threads = 1;
    most = std::max(most, cpu_backend().workspace_size(p, pass));
  }
  return (most + 63) / 64 * 64;
}

struct Ensemble {
  const Problem* problems;
  std::int64_t count;
  Pass pass;
  bool alone;                         // each problem on one thread
  std::size_t bytes;                  // of a thread's workspace
  std::atomic<std::int64_t> next{0};  // the first problem that no thread has taken

  void run(int thread) {
    for (std::int64_t i = next++; i < count; i = next++) {
      Problem p = problems[i];
      if (alone) p.threads = 1;
      p.workspace =
          static_cast<char*>(problems[0].workspace) + bytes * static_cast<std::size_t>(thread);
      (pass == Pass::forward ? cpu_backend().forward : cpu_backend().backward)(p);
    }
  }
};

}  // namespace

std::size_t ensemble_workspace_size(const Problem* problems, std::int64_t count, Pass pass) {
  const int threads = sharing_threads(problems[0], count, pass);
  return most_workspace(problems, count, pass, threads > 1) * static_cast<std::size_t>(threads);
}

void run_ensemble(const Problem* problems, std::int64_t count, Pass pass) {
  const int threads = sharing_threads(problems[0], count, pass);
  Ensemble ensemble{problems, count, pass, threads > 1, 0};
  ensemble.bytes = most_workspace(problems, count, pass, threads > 1);
  run_threads(
      threads,
      [](void* argument, int thread, int) { static_cast<Ensemble*>(argument)->run(thread); },
      &ensemble);
}

}  // namespace fastrnn
