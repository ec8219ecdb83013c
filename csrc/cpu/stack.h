// The layers of one call, as the kernels see them: what all of them have in common (Stack), and
// the description of each (Layer of layer.h), with every array at the layer's own offset.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../backend.h"
#include "../steps.h"
#include "layer.h"

namespace fastrnn {

struct CellEntry {
  int index;  // in AllCells
  CellTraits traits;
  int planes;  // planes of Hp saved for a pair; traits.saved_planes is 0 with Options::recompute
};

// Throws std::invalid_argument where no such cell exists.
CellEntry cell_entry(const Options& options);

struct Stack {
  const Problem& p;
  Pass pass;
  CellEntry cell;
  const LayerKernels& kernels;
  std::int64_t O;
  std::int64_t pairs = 0;        // (step, row) pairs that hold data
  std::int64_t saved_pairs = 0;  // pairs of the arrays: T·B when padded
  std::size_t storage, compute;  // bytes of an element
  Steps steps;
  Plan plan, single;  // with all the threads, and where only one can be had

  // Sets the sizes alone: enough to pack the weights.
  Stack(const Problem& problem, Pass which);

  // Backward runs a layer in parts of its steps and computes their saved values again.
  bool in_parts() const { return pass == Pass::backward && p.options.recompute; }
  // Input size of a layer.
  std::int64_t inputs(std::int64_t layer) const { return layer ? p.options.directions * O : p.I; }
};

// The stack of a pass with its pairs counted and its team planned. `steps` has its sizes alone: the
// caller builds the table in its workspace.
Stack plan_pass(const Problem& p, Pass pass, bool oversubscribed);

// `elements` elements after p; null stays null.
inline void* shifted(void* p, std::int64_t elements, std::size_t bytes) {
  return p ? static_cast<char*>(p) + elements * static_cast<std::int64_t>(bytes) : nullptr;
}

// A sequence array of the caller: packed data has a step's stride too (steps.h).
Sequence normal(const Stack& s, Sequence a);
// A contiguous sequence array of `width` units.
Sequence contiguous(const Stack& s, void* data, std::int64_t width);

// What the packing of layer l depends on: sizes and parameters, no data.
Layer describe_weights(const Stack& s, std::int64_t l);
// Bytes of the packed weights of the layers before layer l.
std::int64_t packed_before(const Stack& s, std::int64_t l);

// Layer l with the arrays of both passes, except those that pass between layers.
Layer describe(const Stack& s, std::int64_t l);
// Layer l of a backward pass, with its gradients, except those that pass between layers.
Layer describe_backward(const Stack& s, std::int64_t l);
// One direction of a described layer, as a layer of its own.
Layer one_direction(const Stack& s, Layer layer, std::int64_t d);

}  // namespace fastrnn
