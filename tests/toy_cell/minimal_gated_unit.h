// The minimal gated unit (Zhou, Wu, Zhang & Zhou 2016), with the gate after the product. Gates
// f and n. A cell from outside the tree: the test beside it shows that this header is all it takes.
//
//   f = σ(x_f + h_f)    n = φ(x_n + f·h_n)    h' = (1 − f)·h + f·n
//
// Saved: f, n, h_n.
// Gradient, given dh':
//   dn = dh'·f·φ'(n)   dh_n = dn·f   df = (dh'·(n − h) + dn·h_n)·σ'(f)
//   to the step before: dh'·(1 − f)
#pragma once

#include "cells/activation.h"

namespace fastrnn {

struct ExtraCell {
  static constexpr const char* name = "MGU";
  static constexpr int gates = 2, states = 1, saved = 3;
  // Kept gradients: x_n, f, h_n.
  static constexpr int gradients = 3;
  static constexpr int input_gradient[] = {1, 0}, hidden_gradient[] = {1, 2};
  static constexpr bool separate[] = {false, true};
  static constexpr int first_gates = 2;
  static constexpr bool carries = true;
  static constexpr bool projects = false;
  static bool accepts(const CellOptions&) { return true; }

  template <class V>
  static FASTRNN_CELL void forward(const CellOptions& o, const V* x, const V* a, const V* previous,
                                   V* next, V* saved) {
    saved[0] = gate(o.gate_activation, a[0]);
    saved[1] = activate(o.activation, fma(saved[0], a[1], x[1]));
    saved[2] = a[1];
    next[0] = fma(saved[0], saved[1] - previous[0], previous[0]);
  }

  template <class V>
  static FASTRNN_CELL void backward(const CellOptions& o, const V* saved, const V* previous,
                                    const V*, const V* d_next, V* d_previous, V* d_a) {
    const V d_n = d_next[0] * saved[0] * activate_slope(o.activation, saved[1]);
    const V d_f = fma(d_next[0], saved[1] - previous[0], d_n * saved[2]);
    d_a[0] = d_n;
    d_a[1] = d_f * gate_slope(o.gate_activation, saved[0]);
    d_a[2] = d_n * saved[0];
    d_previous[0] = d_next[0] * (V(1) - saved[0]);
  }
};

}  // namespace fastrnn
