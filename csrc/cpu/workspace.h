// The workspace of a pass: its contents and its size.
#pragma once

#include "stack.h"

namespace fastrnn {

struct Workspace {
  void* steps;        // the table of steps.h
  Barrier* barriers;  // [1 + threads]
  void* between[2];   // passed from layer to layer: outputs forward, gradients backward
  void* layer;        // the kernels' scratch

  // Where backward runs a layer in parts (recompute.h):
  void* part_steps;
  void* packed;              // the weights of one direction of a layer
  void* again;               // forward's scratch
  void* saved;               // the saved values of a part
  void *hidden, *h_n, *c_n;  // unused results of the second forward: [B, O], [B, O], [B, H]
  void *carry_h, *carry_c;   // gradients of the states between two parts: [B, Op], [B, Hp]
  void* d_input;             // of the first direction of the first layer, compute type
  std::size_t bytes;
};

// Lays out the workspace from `base`; a null base only counts the bytes.
Workspace lay_out(const Stack& s, void* base);

// Steps of a part.
std::int64_t part_length(const Stack& s);

}  // namespace fastrnn
