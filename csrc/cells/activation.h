// The functions inside a cell, with their derivatives written in terms of their value.
//
// V is a value of the device: a SIMD vector on the CPU, a float on the GPU. It provides, found by
// argument-dependent lookup: + - * /, fma(a, b, c) = a·b + c, exp_minus_one(x), exp_minus(x) =
// e^-x, maximum(a, b), minimum(a, b), positive(x) = (x <= 0 ? 0 : 1), between(x, lo, hi) = 1 or 0,
// absolute(x), copy_sign(x, sign).
//
// Accuracy: sigmoid and tanh within 4 ULP of the exact value. tanh is computed from e^x − 1, so
// that small arguments keep all their digits (2σ(2x) − 1 would lose them).
#pragma once

#include "../inline.h"
#include "../problem.h"

namespace fastrnn {

template <class V>
FASTRNN_CELL V sigmoid(V x) {
  return V(1) / (V(1) + exp_minus(x));
}

template <class V>
FASTRNN_CELL V tanh(V x) {
  const V e = exp_minus_one(V(2) * absolute(x));  // tanh |x| = (e^2|x| − 1) / (e^2|x| + 1)
  return copy_sign(e / (e + V(2)), x);
}

template <class V>
FASTRNN_CELL V hardsigmoid(V x) {  // clip(x/6 + 1/2, 0, 1)
  return minimum(maximum(fma(x, V(1.0 / 6.0), V(0.5)), V(0)), V(1));
}

template <class V>
FASTRNN_CELL V activate(Activation f, V x) {
  switch (f) {
    case Activation::tanh:
      return tanh(x);
    case Activation::relu:
      return maximum(x, V(0));
    case Activation::sigmoid:
      return sigmoid(x);
    case Activation::identity:
      break;
  }
  return x;
}

// d f(x) / dx, given y = f(x).
template <class V>
FASTRNN_CELL V activate_slope(Activation f, V y) {
  switch (f) {
    case Activation::tanh:
      return V(1) - y * y;
    case Activation::relu:
      return positive(y);
    case Activation::sigmoid:
      return y * (V(1) - y);
    case Activation::identity:
      break;
  }
  return V(1);
}

template <class V>
FASTRNN_CELL V gate(GateActivation f, V x) {
  return f == GateActivation::sigmoid ? sigmoid(x) : hardsigmoid(x);
}

template <class V>
FASTRNN_CELL V gate_slope(GateActivation f, V y) {
  return f == GateActivation::sigmoid ? y * (V(1) - y) : V(1.0 / 6.0) * between(y, V(0), V(1));
}

}  // namespace fastrnn
