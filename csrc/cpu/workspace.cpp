// Lays out the workspace of a pass (workspace.h).
#include "workspace.h"

#include <algorithm>

#include "host.h"

namespace fastrnn {
namespace {

char present;  // a placeholder for an array that will be given

std::size_t layer_scratch(const Stack& s) {
  const Problem& p = s.p;
  std::size_t most = 0;
  // All layers after the first have the same size.
  for (std::int64_t l = 0; l < std::min<std::int64_t>(p.options.layers, 2); ++l) {
    Layer layer = describe(s, l);
    if (l || p.d_input) layer.d_below = &present;
    layer.d_output = p.d_output;
    layer.d_hidden = p.d_hidden;
    Steps part = s.steps;
    if (s.in_parts()) {
      layer = one_direction(s, layer, 0);
      layer.part = true;
      part.T = part_length(s);
      part.pairs = part.T * p.B;
      layer.steps = &part;
      layer.consume_saved = true;
      layer.saved = &present;
    }
    most = std::max(most, s.pass == Pass::forward ? s.kernels.forward_scratch(layer)
                                                  : s.kernels.backward_scratch(layer));
  }
  return most;
}

void lay_out_parts(const Stack& s, HostArena& arena, Workspace& w) {
  const Problem& p = s.p;
  const std::int64_t steps = part_length(s), pairs = steps * p.B;
  const auto elements = [](std::int64_t count, std::size_t bytes) {
    return static_cast<std::size_t>(count) * bytes;
  };
  std::size_t packed = 0, again = 0;
  for (std::int64_t l = 0; l < std::min<std::int64_t>(p.options.layers, 2); ++l) {
    Layer layer = one_direction(s, describe(s, l), 0);
    Steps part = s.steps;
    part.T = steps;
    part.pairs = pairs;
    layer.steps = &part;
    packed = std::max(packed, s.kernels.packed_size(layer));
    layer.packed = layer.saved = &present;
    again = std::max(again, s.kernels.forward_scratch(layer));
  }
  w.part_steps = arena.take(part_size(p, steps));
  w.packed = arena.take(packed);
  w.again = arena.take(again);
  w.saved = arena.take(elements(pairs * s.cell.planes * padded(p.H), s.compute));
  w.hidden = arena.take(elements(p.B * s.O, s.storage));
  w.h_n = arena.take(elements(p.B * s.O, s.storage));
  w.c_n = arena.take(elements(p.B * p.H, s.storage));
  w.carry_h = arena.take(elements(p.B * padded(s.O), s.compute));
  w.carry_c = arena.take(elements(p.B * padded(p.H), s.compute));
  if (p.options.directions > 1 && p.d_input)
    w.d_input = arena.take(elements(s.saved_pairs * p.I, s.compute));
}

}  // namespace

// About a sixteenth of the pairs, since backward keeps the saved values of one part; but enough
// pairs to repay packing the weights.
std::int64_t part_length(const Stack& s) {
  const std::int64_t pairs = std::clamp<std::int64_t>(s.pairs / 16, 256, 4096);
  const std::int64_t steps = pairs / std::max<std::int64_t>(s.p.B, 1);
  return std::clamp<std::int64_t>(steps, 1, std::max<std::int64_t>(s.p.T, 1));
}

Workspace lay_out(const Stack& s, void* base) {
  const Problem& p = s.p;
  HostArena arena{static_cast<char*>(base)};
  Workspace w{};
  w.steps = arena.take(steps_size(p));
  w.barriers = static_cast<Barrier*>(
      arena.take(sizeof(Barrier) * static_cast<std::size_t>(1 + s.plan.threads)));
  const std::int64_t width = p.options.directions * s.O;
  const bool forward = s.pass == Pass::forward;
  const std::int64_t borders = p.options.layers - 1;
  if (!forward || !p.all_layers)
    for (std::int64_t i = 0; i < std::min<std::int64_t>(borders, 2); ++i)
      w.between[i] = arena.take(static_cast<std::size_t>(s.saved_pairs * width) *
                                (forward ? s.storage : s.compute));
  w.layer = arena.take(layer_scratch(s));
  if (s.in_parts()) lay_out_parts(s, arena, w);
  w.bytes = arena.used;
  return w;
}

}  // namespace fastrnn
