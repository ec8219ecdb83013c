// The CPU's backend: runs a stack layer by layer, each layer one parallel region.
#include "../backend.h"

#include <algorithm>
#include <cstring>

#include "ensemble.h"
#include "host.h"
#include "recompute.h"
#include "team.h"
#include "threads.h"
#include "workspace.h"

namespace fastrnn {
namespace {

// Enough for both plans: the choice is made when the pass begins.
std::size_t workspace_size(const Problem& p, Pass pass) {
  const std::size_t usual = lay_out(plan_pass(p, pass, false), nullptr).bytes;
  return p.threads > 1 ? std::max(usual, lay_out(plan_pass(p, pass, true), nullptr).bytes) : usual;
}

std::size_t packed_size(const Problem& p) {
  const Stack s(p, Pass::forward);
  return static_cast<std::size_t>(packed_before(s, p.options.layers));
}

// Runs one of the kernels over the packed weights of every layer.
void each_packed(const Problem& p, void* packed,
                 void (*LayerKernels::*run)(const Layer&, int, int)) {
  const Stack s(p, Pass::forward);
  const std::int64_t weights = s.cell.traits.gates * p.H * (p.I + s.O);
  for (std::int64_t l = 0; l < p.options.layers; ++l) {
    Layer layer = describe_weights(s, l);
    layer.packed = shifted(packed, packed_before(s, l), 1);
    layer.plan.threads = weights < kRegionWeights ? 1 : p.threads;
    run_layer(layer, s.kernels.*run);
  }
}

void pack(const Problem& p, void* to) { each_packed(p, to, &LayerKernels::pack); }

void unpack(const Problem& p) {
  each_packed(p, const_cast<void*>(p.packed), &LayerKernels::unpack);  // which only reads it
}

void forward(const Problem& p) {
  Stack s = plan_pass(p, Pass::forward, cores_are_oversubscribed());
  const Workspace w = lay_out(s, p.workspace);
  s.steps = build_steps(p, w.steps);
  const Barriers barriers(w.barriers, 1 + s.plan.threads);
  const std::int64_t L = p.options.layers, width = p.options.directions * s.O;
  Sequence previous = normal(s, p.input);
  for (std::int64_t l = 0; l < L; ++l) {
    Layer layer = describe(s, l);
    layer.barriers = w.barriers;
    layer.scratch = w.layer;
    layer.input = previous;
    if (!p.all_layers && l < L - 1) layer.output = contiguous(s, w.between[l % 2], width);
    run_layer(layer, s.kernels.forward);
    previous = layer.output;
  }
}

// Clears the padding of d_input, which the parts of the steps do not write.
void clear_input_gradient(const Stack& s) {
  const Problem& p = s.p;
  if (p.d_input && s.steps.padding)
    std::memset(p.d_input, 0, static_cast<std::size_t>(p.T * p.B * p.I) * s.storage);
}

void backward(const Problem& p) {
  Stack s = plan_pass(p, Pass::backward, cores_are_oversubscribed());
  const Workspace w = lay_out(s, p.workspace);
  s.steps = build_steps(p, w.steps);
  const Barriers barriers(w.barriers, 1 + s.plan.threads);
  const std::int64_t L = p.options.layers;
  if (s.in_parts()) clear_input_gradient(s);
  for (std::int64_t l = L - 1; l >= 0; --l) {
    Layer layer = describe_backward(s, l);
    layer.barriers = w.barriers;
    layer.scratch = w.layer;
    if (l < L - 1) layer.d_above = w.between[l % 2];
    if (l > 0) layer.d_below = w.between[(l - 1) % 2];
    if (s.in_parts())
      run_in_parts(s, w, layer);
    else
      run_layer(layer, s.kernels.backward);
  }
}

}  // namespace

const Backend& cpu_backend() {
  static constexpr Backend backend{
      workspace_size,          packed_size, pack, unpack, forward, backward,
      ensemble_workspace_size, run_ensemble};
  return backend;
}

}  // namespace fastrnn
