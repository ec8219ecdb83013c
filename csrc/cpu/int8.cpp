// Steps with int8 products (Problem::int8): the layers of a stack one after the other inside one
// parallel region. The kernels are int8.h's.
#include <algorithm>

#include "../backend.h"
#include "host.h"
#include "int8_layer.h"
#include "layer.h"

namespace fastrnn {
namespace {

const Int8Kernels& kernels_of(const Problem& p) {
  const InstructionSet* set = &chosen_set();
  while (!set->int8) set = set->base;
  return set->int8[cell_index(p.options)];
}

// What a layer's kernels need to know of sizes and weights.
Int8Layer describe(const Problem& p, std::int64_t l) {
  Int8Layer layer;
  layer.maths = p.options.maths;
  layer.B = p.B;
  layer.H = p.H;
  layer.P = p.options.proj_size;
  layer.O = layer.P ? layer.P : layer.H;
  layer.I = l ? layer.O : p.I;
  layer.parameters = p.parameters ? p.parameters + l : nullptr;
  return layer;
}

// Bytes of the packed weights of the layers before `l`; those from the second on are of one size.
std::size_t packed_before(const Problem& p, const Int8Kernels& kernels, std::int64_t l) {
  if (l == 0) return 0;
  const std::size_t first = kernels.packed_size(describe(p, 0));
  if (l == 1) return first;
  return first + static_cast<std::size_t>(l - 1) * kernels.packed_size(describe(p, 1));
}

// By the estimate of host.h: all of a step's weights are read once for each block of rows.
int team_size(const Problem& p, const Int8Kernels& kernels) {
  if (p.threads <= 1 || cores_are_oversubscribed()) return 1;
  const std::int64_t L = p.options.layers, P = p.options.proj_size, O = P ? P : p.H;
  const double gates = cell_traits(p.options).gates;
  const double rows = static_cast<double>(p.B), H = static_cast<double>(p.H);
  const double inputs = static_cast<double>(p.I + O + (L - 1) * 2 * O);
  const double weights = H * (gates * inputs + static_cast<double>(L * P));
  const double rate = 2 * kClock * kernels.lanes * kernels.depth;  // products a nanosecond
  const double blocks = std::max(1.0, rows / kernels.rows_per_block);
  const double near = weights <= kInnerBytes ? kInner : kOuter;
  const double work =
      std::max(weights * rows / rate, weights * (1 / near + (blocks - 1) / kInner)) +
      static_cast<double>(L) * rows * H * kCell;
  const auto most = static_cast<int>(std::min<std::int64_t>(
      p.threads, (p.H + kernels.units_per_block - 1) / kernels.units_per_block));
  const double together = kRegion + 2 * static_cast<double>(L) * kBarrier;
  return work / most + together < kGain * work ? most : 1;
}

struct Workspace {
  Barrier* team;
  void* layer;
  std::size_t bytes;
};

Workspace lay_out(const Problem& p, const Int8Kernels& kernels, void* base) {
  HostArena arena{static_cast<char*>(base)};
  Workspace w{};
  w.team = static_cast<Barrier*>(arena.take(sizeof(Barrier)));
  std::size_t most = 0;
  for (std::int64_t l = 0; l < std::min<std::int64_t>(p.options.layers, 2); ++l) {
    Int8Layer layer = describe(p, l);
    layer.threads = p.threads;
    layer.input = p.input;
    if (l == 0) layer.input.unit = 0;  // as large as for any strides
    most = std::max(most, kernels.scratch(layer));
  }
  w.layer = arena.take(most);
  w.bytes = arena.used;
  return w;
}

struct Step {
  const Problem& p;
  const Int8Kernels& kernels;
  Workspace workspace;

  Int8Layer layer(std::int64_t l) const {
    Int8Layer layer = describe(p, l);
    const std::int64_t hidden = p.B * layer.O, cells = p.B * layer.H;
    layer.packed = static_cast<char*>(const_cast<void*>(p.packed)) + packed_before(p, kernels, l);
    layer.h = static_cast<const float*>(p.h0.data) + l * hidden;
    layer.h_n = static_cast<float*>(p.h_n) + l * hidden;
    if (p.c_n) {
      layer.c = static_cast<const float*>(p.c0.data) + l * cells;
      layer.c_n = static_cast<float*>(p.c_n) + l * cells;
    }
    layer.input = l ? Sequence{layer.h_n - hidden, 0, layer.O, 1} : p.input;
    if (l == p.options.layers - 1) layer.output = static_cast<float*>(p.hidden);
    layer.threads = p.threads;
    layer.team = workspace.team;
    layer.wait = l ? Barrier::Wait::step : Barrier::Wait::start;
    layer.scratch = workspace.layer;
    return layer;
  }

  // There is a barrier after the last layer too, so that a thread without a core is noticed.
  void run(int thread, int threads) const {
    for (std::int64_t l = 0; l < p.options.layers; ++l) {
      const Int8Layer now = layer(l);
      kernels.step(now, thread, threads);
      now.team->wait(threads, now.wait);
    }
  }
};

}  // namespace

std::size_t int8_workspace_size(const Problem& p) {
  return lay_out(p, kernels_of(p), nullptr).bytes;
}

std::size_t int8_packed_size(const Problem& p) {
  return packed_before(p, kernels_of(p), p.options.layers);
}

void int8_pack(const Problem& p, void* to) {
  const Int8Kernels& kernels = kernels_of(p);
  const std::int64_t weights = cell_traits(p.options).gates * p.H * (p.I + p.H);
  for (std::int64_t l = 0; l < p.options.layers; ++l) {
    Int8Layer layer = describe(p, l);
    layer.packed = static_cast<char*>(to) + packed_before(p, kernels, l);
    run_threads(weights < kRegionWeights ? 1 : p.threads,
                [&](int thread, int threads) { kernels.pack(layer, thread, threads); });
  }
}

void int8_forward(const Problem& p) {
  const Int8Kernels& kernels = kernels_of(p);
  const Step step{p, kernels, lay_out(p, kernels, p.workspace)};
  const Barriers barriers(step.workspace.team, 1);
  run_threads(team_size(p, kernels), [&](int thread, int threads) { step.run(thread, threads); });
}

}  // namespace fastrnn
