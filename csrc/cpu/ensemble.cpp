// Runs an ensemble (ensemble.h). Either each thread runs whole problems alone, or a team works on
// one problem after the other, whichever is faster by the estimate of team.h. Each problem gives
// the bits that it gives by itself.
#include "ensemble.h"

#include <algorithm>
#include <atomic>
#include <cmath>

#include "host.h"
#include "team.h"

namespace fastrnn {
namespace {

// How many threads divide the problems among themselves; 1: a team works on each in turn.
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

}  // namespace

std::size_t ensemble_workspace_size(const Problem* problems, std::int64_t count, Pass pass) {
  const int threads = sharing_threads(problems[0], count, pass);
  return most_workspace(problems, count, pass, threads > 1) * static_cast<std::size_t>(threads);
}

void run_ensemble(const Problem* problems, std::int64_t count, Pass pass) {
  const int threads = sharing_threads(problems[0], count, pass);
  const bool alone = threads > 1;  // each problem on one thread
  const std::size_t bytes = most_workspace(problems, count, pass, alone);
  std::atomic<std::int64_t> next{0};  // the first problem that no thread has taken
  run_threads(threads, [&](int thread, int) {
    for (std::int64_t i = next++; i < count; i = next++) {
      Problem p = problems[i];
      if (alone) p.threads = 1;
      p.workspace = shifted(problems[0].workspace, thread, bytes);
      (pass == Pass::forward ? cpu_backend().forward : cpu_backend().backward)(p);
    }
  });
}

}  // namespace fastrnn
