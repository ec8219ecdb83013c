// Sizes the team of a layer by estimate, from the costs of host.h, and runs it.
#include "team.h"

#include <algorithm>
#include <cmath>

#include "host.h"
#include "isa.h"

namespace fastrnn {
namespace {

// The product of `rows` rows by `weights` weights, one block of rows after the other. The first
// block reads the weights from the shared cache, or from the core's own where everything that the
// core reads between two such products (`between` weights) fits there. Later blocks hit the core's
// own cache.
double product_time(const Stack& s, double rows, double weights, double between) {
  const int depth = s.pass == Pass::forward ? s.kernels.depth : 1;
  const double rate = 2 * kClock * s.kernels.lanes * depth;  // products a nanosecond
  const double size = s.p.options.int8 ? 1 : static_cast<double>(s.compute) / depth;  // a weight's
  const double blocks = std::ceil(rows / s.kernels.rows_per_block);
  const double block = weights * rows / blocks / rate;
  const double first = weights * size / (between * size <= kInnerBytes ? kInner : kOuter);
  return std::max(block, first) + (blocks - 1) * std::max(block, weights * size / kInner);
}

}  // namespace

double layer_time(const Stack& s, int rows, int columns) {
  const Problem& p = s.p;
  const double T = static_cast<double>(p.T), G = s.cell.traits.gates;
  const double H = static_cast<double>(p.H), O = static_cast<double>(s.O);
  const double mine = std::ceil(static_cast<double>(p.B) / rows), threads = rows * columns;
  const double of_input = G * H * static_cast<double>(p.I) / columns,
               of_state = G * H * O / columns;
  const double all = of_input + of_state;  // a thread's weights in a whole call
  const double project =
      product_time(s, std::ceil(static_cast<double>(s.pairs) / rows), of_input, all);
  const double cells = static_cast<double>(s.pairs) * H * kCell / threads;
  double step = product_time(s, mine, of_state, T > 1 ? of_state : all);
  if (columns > 1) step += kBarrier;
  return project + cells + T * step + (threads > 1 ? kRegion : 0);
}

namespace {

// With Options::recompute backward runs the directions one after the other.
int directions_together(const Stack& s) {
  return s.in_parts() ? 1 : static_cast<int>(s.p.options.directions);
}

// Of all directions of a layer.
double plan_time(const Stack& s, const Plan& plan) {
  return layer_time(s, plan.row_threads, plan.column_threads) *
             (directions_together(s) / plan.direction_threads) +
         (plan.direction_threads > 1 && plan.row_threads * plan.column_threads == 1 ? kRegion : 0);
}

}  // namespace

Plan make_plan(const Stack& s, bool oversubscribed) {
  const Problem& p = s.p;
  Plan best;
  const int directions = directions_together(s);
  const auto blocks =
      static_cast<int>((p.H + s.kernels.units_per_block - 1) / s.kernels.units_per_block);
  double least = kGain * directions * layer_time(s, 1, 1);
  for (int apart = 1; apart <= std::min(directions, p.threads); ++apart)
    for (int rows = 1; rows <= std::min<std::int64_t>(p.threads / apart, p.B); ++rows) {
      const int columns = oversubscribed ? 1 : std::min(p.threads / apart / rows, blocks);
      const Plan plan{apart * rows * columns, apart, rows, columns};
      const double time = plan_time(s, plan) / (columns > 1 ? kGainOfUnits : 1);
      if (time >= least) continue;
      least = time;
      best = plan;
    }
  return best;
}

double estimated_time(const Problem& p) {
  const Plan plan = plan_pass(p, Pass::forward, false).plan;
  double time = 0;
  for (std::int64_t l = 0; l < p.options.layers; ++l) {
    Problem layer = p;
    layer.I = Stack(p, Pass::forward).inputs(l);
    time += plan_time(plan_pass(layer, Pass::forward, false), plan);
  }
  return time;
}

void run_layer(const Layer& layer, void (*run)(const Layer&, int, int)) {
  for (int i = 0; layer.barriers && i <= layer.plan.threads; ++i) layer.barriers[i].forget();
  run_threads(layer.plan.threads, [&](int thread, int threads) { run(layer, thread, threads); });
}

}  // namespace fastrnn
