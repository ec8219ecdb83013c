// Elman's recurrent cell (Elman 1990), torch.nn.RNN.
//
//   h' = f(a),   a = W_ih x + b_ih + W_hh h + b_hh
//
// Saved: h' (the activated value).
// Gradient, given dh':  da = dh'·f'(a).
#pragma once

#include "activation.h"

namespace fastrnn {

struct Elman {
  static constexpr const char* name = "RNN";
  static constexpr int gates = 1, states = 1, saved = 1;
  static constexpr int gradients = 1;
  static constexpr int input_gradient[] = {0}, hidden_gradient[] = {0};
  static constexpr bool separate[] = {false};
  static constexpr int first_gates = 1;
  static constexpr bool carries = false;
  static constexpr bool projects = false;
  static bool accepts(const CellOptions&) { return true; }

  template <class V>
  static FASTRNN_CELL void forward(const CellOptions& o, const V*, const V* a, const V*, V* next,
                                   V* saved) {
    next[0] = saved[0] = activate(o.activation, a[0]);
  }

  template <class V>
  static FASTRNN_CELL void backward(const CellOptions& o, const V* saved, const V*, const V*,
                                    const V* d_next, V* d_previous, V* d_a) {
    d_a[0] = d_next[0] * activate_slope(o.activation, saved[0]);
    d_previous[0] = V(0);
  }
};

}  // namespace fastrnn
