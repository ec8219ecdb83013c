// The value type of the cells (csrc/cells/) on a GPU: one float or double, with the functions that
// csrc/cells/activation.h needs. Comparisons with NaN are false, so a NaN in the first argument is
// propagated.
#pragma once

#include <cmath>

#include "inline.h"
#include "storage.h"

namespace fastrnn::cuda {

template <class T>
struct Value {
  T v;

  Value() = default;
  FASTRNN_CELL explicit Value(float x) : v(static_cast<T>(x)) {}
  FASTRNN_CELL explicit Value(double x) : v(static_cast<T>(x)) {}
  FASTRNN_CELL explicit Value(int x) : v(static_cast<T>(x)) {}
};

template <class T>
FASTRNN_CELL Value<T> operator+(Value<T> a, Value<T> b) {
  return Value<T>(a.v + b.v);
}
template <class T>
FASTRNN_CELL Value<T> operator-(Value<T> a, Value<T> b) {
  return Value<T>(a.v - b.v);
}
template <class T>
FASTRNN_CELL Value<T> operator*(Value<T> a, Value<T> b) {
  return Value<T>(a.v * b.v);
}
// For floats on a GPU it uses the reciprocal, within 2 ULP for divisors up to 2^126; zero beyond,
// where a sigmoid would be subnormal.
FASTRNN_CELL float quotient(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fdividef(a, b);
#else
  return a / b;
#endif
}
FASTRNN_CELL double quotient(double a, double b) { return a / b; }
template <class T>
FASTRNN_CELL Value<T> operator/(Value<T> a, Value<T> b) {
  return Value<T>(quotient(a.v, b.v));
}
template <class T>
FASTRNN_CELL Value<T> fma(Value<T> a, Value<T> b, Value<T> c) {
  return Value<T>(std::fma(a.v, b.v, c.v));
}

template <class T>
FASTRNN_CELL Value<T> maximum(Value<T> a, Value<T> b) {
  return b.v > a.v ? b : a;
}
template <class T>
FASTRNN_CELL Value<T> minimum(Value<T> a, Value<T> b) {
  return b.v < a.v ? b : a;
}
template <class T>
FASTRNN_CELL Value<T> positive(Value<T> x) {
  return Value<T>(x.v <= T(0) ? 0 : 1);
}
template <class T>
FASTRNN_CELL Value<T> between(Value<T> x, Value<T> low, Value<T> high) {
  return Value<T>(x.v > low.v && x.v < high.v ? 1 : 0);
}
template <class T>
FASTRNN_CELL Value<T> absolute(Value<T> x) {
  return Value<T>(std::fabs(x.v));
}
template <class T>
FASTRNN_CELL Value<T> copy_sign(Value<T> x, Value<T> sign) {
  return Value<T>(std::copysign(x.v, sign.v));
}

// e^x − 1 for x ≥ 0; saturates before it overflows.
template <class T>
FASTRNN_CELL Value<T> exp_minus_one(Value<T> x) {
  return Value<T>(std::expm1(minimum(x, Value<T>(sizeof(T) == 4 ? 80 : 700)).v));
}
// e^-x; infinite if it overflows, so that 1 / (1 + e^-x) is zero.
template <class T>
FASTRNN_CELL Value<T> exp_minus(Value<T> x) {
  return Value<T>(std::exp(-x.v));
}

}  // namespace fastrnn::cuda
