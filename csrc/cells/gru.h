// Gated recurrent unit (Cho et al. 2014), torch.nn.GRU. Gates in the order r, z, n.
//
//   r = σ(x_r + h_r)   z = σ(x_z + h_z)      x_· = W_i· x + b_i·,  h_· = W_h· h + b_h·
//   n = φ(x_n + r·h_n)                       reset after the product (torch, cuDNN): Gru
//   n = φ(x_n + W_hn (r∘h) + b_hn)           reset before it (the paper): GruResetBefore
//   h' = (1 − z)·n + z·h
//
// Saved: r, z, n and, reset after: h_n, reset before: r∘h.
// Gradient, given dh':
//   dz = dh'·(h − n)·σ'(z)   dn = dh'·(1 − z)·φ'(n)   to the step before: dh'·z
//   reset after:   dh_n = dn·r,   dr = dn·h_n·σ'(r)
//   reset before:  d(r∘h) = W_hnᵀ dn,   dr = d(r∘h)·h·σ'(r),   to the step before also d(r∘h)·r
#pragma once

#include "activation.h"

namespace fastrnn {

struct Gru {
  static constexpr const char* name = "GRU";
  static constexpr int gates = 3, states = 1, saved = 4;
  // Kept gradients: x_n, r, z, h_n. The input side reads the first three, the hidden side the last.
  static constexpr int gradients = 4;
  static constexpr int input_gradient[] = {1, 2, 0}, hidden_gradient[] = {1, 2, 3};
  static constexpr bool separate[] = {false, false, true};
  static constexpr int first_gates = 3;
  static constexpr bool carries = true;
  static constexpr bool projects = false;
  static bool accepts(const CellOptions& o) { return o.reset_after; }

  template <class V>
  static FASTRNN_CELL void forward(const CellOptions& o, const V* x, const V* a, const V* previous,
                                   V* next, V* saved) {
    saved[0] = gate(o.gate_activation, a[0]);
    saved[1] = gate(o.gate_activation, a[1]);
    saved[2] = activate(o.activation, fma(saved[0], a[2], x[2]));
    saved[3] = a[2];
    next[0] = fma(saved[1], previous[0] - saved[2], saved[2]);
  }

  template <class V>
  static FASTRNN_CELL void backward(const CellOptions& o, const V* saved, const V* previous,
                                    const V*, const V* d_next, V* d_previous, V* d_a) {
    const V d_n = d_next[0] * (V(1) - saved[1]) * activate_slope(o.activation, saved[2]);
    d_a[0] = d_n;
    d_a[1] = d_n * saved[3] * gate_slope(o.gate_activation, saved[0]);
    d_a[2] = d_next[0] * (previous[0] - saved[2]) * gate_slope(o.gate_activation, saved[1]);
    d_a[3] = d_n * saved[0];
    d_previous[0] = d_next[0] * saved[1];
  }
};

// Two products a step: r and z from h, then n from r∘h.
struct GruResetBefore {
  static constexpr const char* name = "GRU";
  static constexpr int gates = 3, states = 1, saved = 4;
  static constexpr int gradients = 3;
  static constexpr int input_gradient[] = {0, 1, 2}, hidden_gradient[] = {0, 1, 2};
  static constexpr bool separate[] = {false, false, false};
  static constexpr int first_gates = 2;  // r and z; n is of the second product
  static constexpr bool carries = true;
  static constexpr bool projects = false;
  static constexpr int operand = 3;  // the saved value that the second product reads
  static bool accepts(const CellOptions& o) { return !o.reset_after; }

  template <class V>
  static FASTRNN_CELL void forward_first(const CellOptions& o, const V* a, const V* previous,
                                         V* saved) {
    saved[0] = gate(o.gate_activation, a[0]);
    saved[1] = gate(o.gate_activation, a[1]);
    saved[2] = V(0);  // n, from the second product
    saved[3] = saved[0] * previous[0];
  }

  template <class V>
  static FASTRNN_CELL void forward_second(const CellOptions& o, const V* a, const V* previous,
                                          V* next, V* saved) {
    saved[2] = activate(o.activation, a[0]);
    next[0] = fma(saved[1], previous[0] - saved[2], saved[2]);
  }

  // The gradients of z and n, and dh'·z in d_previous.
  template <class V>
  static FASTRNN_CELL void backward_second(const CellOptions& o, const V* saved, const V* previous,
                                           const V* d_next, V* d_previous, V* d_a) {
    d_a[1] = d_next[0] * (previous[0] - saved[2]) * gate_slope(o.gate_activation, saved[1]);
    d_a[2] = d_next[0] * (V(1) - saved[1]) * activate_slope(o.activation, saved[2]);
    d_previous[0] = d_next[0] * saved[1];
  }

  // Given d(r∘h): the gradient of r; adds d(r∘h)·r to d_previous.
  template <class V>
  static FASTRNN_CELL void backward_first(const CellOptions& o, const V* saved, const V* previous,
                                          const V* d_operand, V* d_previous, V* d_a) {
    d_a[0] = d_operand[0] * previous[0] * gate_slope(o.gate_activation, saved[0]);
    d_previous[0] = fma(d_operand[0], saved[0], d_previous[0]);
  }
};

}  // namespace fastrnn
