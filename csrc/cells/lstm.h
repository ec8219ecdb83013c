// Long short-term memory (Hochreiter & Schmidhuber 1997; forget gate: Gers et al. 2000),
// torch.nn.LSTM. Gates in the order i, f, g, o.
//
//   a = W_ih x + b_ih + W_hh h + b_hh          for each of i, f, g, o
//   i = σ(a_i)  f = σ(a_f)  g = φ(a_g)  o = σ(a_o)
//   c' = f·c + i·g
//   h' = o·φ(c')
//
// Saved: i, f, g, o. The caller keeps c; φ(c') is computed again.
// Gradient, given dh' and dc' (from the step after):
//   dc = dc' + dh'·o·φ'(c')
//   da_i = dc·g·σ'(i)  da_f = dc·c·σ'(f)  da_g = dc·i·φ'(g)  da_o = dh'·φ(c')·σ'(o)
//   to the step before: dc·f
#pragma once

#include "activation.h"

namespace fastrnn {

struct Lstm {
  static constexpr const char* name = "LSTM";
  static constexpr int gates = 4, states = 2, saved = 4;
  static constexpr int gradients = 4;
  static constexpr int input_gradient[] = {0, 1, 2, 3}, hidden_gradient[] = {0, 1, 2, 3};
  static constexpr bool separate[] = {false, false, false, false};
  static constexpr int first_gates = 4;
  static constexpr bool carries = false;
  static constexpr bool projects = true;
  static bool accepts(const CellOptions&) { return true; }

  template <class V>
  static FASTRNN_CELL V forward_state(const CellOptions& o, const V* a, V c, V* saved) {
    saved[0] = gate(o.gate_activation, a[0]);
    saved[1] = gate(o.gate_activation, a[1]);
    saved[2] = activate(o.activation, a[2]);
    return fma(saved[1], c, saved[0] * saved[2]);
  }
  template <class V>
  static FASTRNN_CELL V forward_output(const CellOptions& o, V a_output, V c_next, V* saved) {
    saved[3] = gate(o.gate_activation, a_output);
    return saved[3] * activate(o.activation, c_next);
  }

  // d_c plus the gradient through h'.
  template <class V>
  static FASTRNN_CELL V backward_output(const CellOptions& o, const V* saved, V c_next, V d_h,
                                        V d_c, V* d_a) {
    const V f_c = activate(o.activation, c_next);
    d_a[3] = d_h * f_c * gate_slope(o.gate_activation, saved[3]);
    return fma(d_h * saved[3], activate_slope(o.activation, f_c), d_c);
  }
  // The gradient of the c before.
  template <class V>
  static FASTRNN_CELL V backward_state(const CellOptions& o, const V* saved, V c, V d_c, V* d_a) {
    d_a[0] = d_c * saved[2] * gate_slope(o.gate_activation, saved[0]);
    d_a[1] = d_c * c * gate_slope(o.gate_activation, saved[1]);
    d_a[2] = d_c * saved[0] * activate_slope(o.activation, saved[2]);
    return d_c * saved[1];
  }

  template <class V>
  static FASTRNN_CELL void forward(const CellOptions& o, const V*, const V* a, const V* previous,
                                   V* next, V* saved) {
    next[1] = forward_state(o, a, previous[1], saved);
    next[0] = forward_output(o, a[3], next[1], saved);
  }

  template <class V>
  static FASTRNN_CELL void backward(const CellOptions& o, const V* saved, const V* previous,
                                    const V* next, const V* d_next, V* d_previous, V* d_a) {
    const V d_c = backward_output(o, saved, next[1], d_next[0], d_next[1], d_a);
    d_previous[0] = V(0);
    d_previous[1] = backward_state(o, saved, previous[1], d_c, d_a);
  }
};

}  // namespace fastrnn
