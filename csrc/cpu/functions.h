// The elementary functions of programs on vectors, beside those of a cell (cells/activation.h).
//
// Within 4 ULP of the exact value where results are normal numbers; infinities, NaN and signs of
// zero as the standard library gives them, subnormal arguments and results as zeros. In double,
// sin, cos and erf are the standard library's, lane by lane, as are sin and cos of large arguments
// in float. A lane's bits depend on no other lane.
#pragma once

#include "../cells/activation.h"
#include "lanes.h"

namespace fastrnn::FASTRNN_ISA {

template <class T>
FASTRNN_INLINE Vec<T> select(typename Vec<T>::Bits mask, Vec<T> a, Vec<T> b) {
  return Vec<T>(mask ? a.v : b.v);
}

// Σ coefficients[i]·x^i.
template <class T, int N>
FASTRNN_INLINE Vec<T> polynomial(Vec<T> x, const double (&coefficients)[N]) {
  Vec<T> sum(coefficients[N - 1]);
#pragma GCC unroll 16
  for (int i = N - 2; i >= 0; --i) sum = fma(sum, x, Vec<T>(coefficients[i]));
  return sum;
}

template <class T, class Function>
FASTRNN_NOINLINE Vec<T> lane_by_lane(Vec<T> x, Function function) {
  T lane[Vec<T>::lanes];
  x.store(lane);
  for (int i = 0; i < Vec<T>::lanes; ++i)
    lane[i] = static_cast<T>(function(static_cast<double>(lane[i])));
  return Vec<T>::load(lane);
}

template <class T>
FASTRNN_INLINE Vec<T> negated(Vec<T> x) {
  return Vec<T>((typename Vec<T>::Native)((typename Vec<T>::Bits)x.v ^ sign_bit<T>()));
}

// ---- exponentials -------------------------------------------------------------------------------

// 2^k of the largest results overflows: those are computed half as large, then doubled.
template <class T>
FASTRNN_INLINE Vec<T> exp(Vec<T> x) {
  using V = Vec<T>;
  using Bits = typename V::Bits;
  constexpr bool single = sizeof(T) == 4;
  const V low(single ? -88.0 : -709.0), high(single ? 89.0 : 710.0);
  const Exponent<T> e = split_exponent(minimum(maximum(x, low), high));
  const Bits large = (Bits)(x.v > V(1).v);
  const typename V::Integer one = typename V::Integer{1} << (single ? 23 : 52);
  const V scale((typename V::Native)((Bits)e.scale.v - (large & one)));
  return (e.remainder + V(1)) * scale * select(large, V(2), V(1));  // no part is subnormal alone
}

template <class T>
FASTRNN_INLINE Vec<T> expm1(Vec<T> x) {
  using V = Vec<T>;
  const V limit(40.0);
  const Exponent<T> e = split_exponent(minimum(maximum(x, negated(limit)), limit));
  const V value = fma(e.scale, e.remainder, e.scale - V(1));
  const V all = select((typename V::Bits)(x.v > limit.v), exp(x), value);
  return select((typename V::Bits)(x.v == V(0).v), x, all);  // −0 too
}

// ---- logarithms ---------------------------------------------------------------------------------

// x = 2^k·m with m in [√½, √2).
template <class T>
struct Logarithm {
  Vec<T> k, m;
  explicit FASTRNN_INLINE Logarithm(Vec<T> x) {
    using Bits = typename Vec<T>::Bits;
    constexpr int mantissa = sizeof(T) == 4 ? 23 : 52;
    const Bits bits = (Bits)x.v;
    const Bits power = (bits - (Bits)Vec<T>(0.70710678118654752440).v) >> mantissa;
    m = Vec<T>((typename Vec<T>::Native)(bits - (power << mantissa)));
    k = Vec<T>(__builtin_convertvector(power, typename Vec<T>::Native));
  }
};

// k·log 2 + log(1 + f) + c for f in [√½ − 1, √2 − 1) and a small c. With s = f / (2 + f),
// log(1 + f) = 2·artanh s, whose series is summed beside f − f²/2, the part that is exact.
template <class T>
FASTRNN_INLINE Vec<T> finish_logarithm(Vec<T> k, Vec<T> f, Vec<T> c) {
  using V = Vec<T>;
  constexpr bool single = sizeof(T) == 4;
  const V s = f / (V(2) + f), z = s * s, half_square = V(0.5) * f * f;
  V series;
  if constexpr (single)
    series = polynomial(z, {2.0 / 3, 2.0 / 5, 2.0 / 7, 2.0 / 9});
  else
    series = polynomial(z, {2.0 / 3, 2.0 / 5, 2.0 / 7, 2.0 / 9, 2.0 / 11, 2.0 / 13, 2.0 / 15,
                            2.0 / 17, 2.0 / 19, 2.0 / 21, 2.0 / 23});
  const V high(single ? 0.693359375 : 0.693147180369123816490);
  const V low(single ? -2.12194440e-4 : 1.90821492927058770002e-10);
  const V small = fma(s, fma(z, series, half_square), fma(k, low, c));
  return fma(k, high, f - (half_square - small));
}

// The logarithm's value where the argument is outside its domain, or infinite.
template <class T>
FASTRNN_INLINE Vec<T> at_ends(Vec<T> x, Vec<T> value) {
  using V = Vec<T>;
  using Bits = typename V::Bits;
  const V inf(__builtin_inf()), nan(__builtin_nan(""));
  value = select((Bits)(x.v == V(0).v), negated(inf), value);
  value = select((Bits)(x.v < V(0).v), nan, value);
  return select((Bits)(x.v < inf.v), value, x);  // infinity and NaN
}

template <class T>
FASTRNN_INLINE Vec<T> log(Vec<T> x) {
  const Logarithm<T> l(x);
  return at_ends(x, finish_logarithm(l.k, l.m - Vec<T>(1), Vec<T>(0)));
}

// The logarithm of u = 1 + x, with the rounding error of u; of x itself where u is in [√½, √2).
template <class T>
FASTRNN_INLINE Vec<T> log1p(Vec<T> x) {
  using V = Vec<T>;
  using Bits = typename V::Bits;
  const V u = V(1) + x;
  const Logarithm<T> l(u);
  const Bits near = (Bits)(l.k.v == V(0).v);
  const V lost = select((Bits)(x.v > V(1).v), V(1) - (u - x), x - (u - V(1))) / u;
  const V value = finish_logarithm(l.k, select(near, x, l.m - V(1)), select(near, V(0), lost));
  return select((Bits)(x.v == V(0).v), x, at_ends(u, value));
}

template <class T>
FASTRNN_INLINE Vec<T> softplus1(Vec<T> x) {
  return maximum(x, Vec<T>(0)) + log1p(exp(negated(absolute(x))));
}

// ---- sine and cosine ----------------------------------------------------------------------------

// x = quarters·π/2 + r, |r| ≤ π/4, and sine and cosine of r. Three parts of π/2 are so short that
// their products with the quarters are exact.
struct Turn {
  Vec<float>::Bits quarters;
  Vec<float> sin, cos;
  explicit FASTRNN_INLINE Turn(Vec<float> x) {
    using V = Vec<float>;
    const V magic(12582912.0), shifted = fma(x, V(0.63661977236758134), magic);
    const V k = shifted - magic;
    V r = fma(k, V(-1.5703125), x);
    r = fma(k, V(-0.0004839897155761719), r);
    r = fma(k, V(1.6298145055770874e-07), r);
    r = fma(k, V(-6.0771007e-11), r);
    quarters = (V::Bits)shifted.v;  // only the last bits are used
    const V z = r * r;
    sin = fma(r * z, polynomial(z, {-1.0 / 6, 1.0 / 120, -1.0 / 5040, 1.0 / 362880}), r);
    cos = fma(z * z, polynomial(z, {1.0 / 24, -1.0 / 720, 1.0 / 40320, -1.0 / 3628800}),
              fma(z, V(-0.5), V(1)));
  }
};

// The sine of x and, with Shift 1, of x + π/2.
template <int Shift>
FASTRNN_INLINE Vec<float> sine(Vec<float> x, double (*exact)(double)) {
  using V = Vec<float>;
  using Bits = V::Bits;
  const Turn turn(x);
  const Bits quarters = turn.quarters + Shift;
  const V value = select((Bits)((quarters & 1) != 0), turn.cos, turn.sin);
  const V turned((V::Native)((Bits)value.v ^ ((quarters & 2) << 30)));
  const Bits near = (Bits)(absolute(x).v < V(12000.0).v);
  if (!any<float>(~near)) return turned;
  return select(near, turned, lane_by_lane(x, exact));
}

inline double library_sin(double x) { return __builtin_sin(x); }
inline double library_cos(double x) { return __builtin_cos(x); }
inline double library_erf(double x) { return __builtin_erf(x); }

FASTRNN_INLINE Vec<float> sin(Vec<float> x) {
  // −0 stays −0.
  return select((Vec<float>::Bits)(x.v == Vec<float>(0).v), x, sine<0>(x, library_sin));
}
FASTRNN_INLINE Vec<float> cos(Vec<float> x) { return sine<1>(x, library_cos); }
FASTRNN_INLINE Vec<double> sin(Vec<double> x) { return lane_by_lane(x, library_sin); }
FASTRNN_INLINE Vec<double> cos(Vec<double> x) { return lane_by_lane(x, library_cos); }

// ---- the error function -------------------------------------------------------------------------

// erf x / x as a polynomial of x² up to 1, from there 1 − e^−x²·p(1 / (1 + x/2)); both polynomials
// are least-squares fits to 3e-11 and 5e-10.
FASTRNN_INLINE Vec<float> erf(Vec<float> x) {
  using V = Vec<float>;
  const V a = absolute(x), square = x * x;
  const V near =
      x * polynomial(square, {1.12837917, -0.376126384, 0.112837818, -0.0268653921, 0.00522092323,
                              -0.000848250789, 0.000112546419, -9.63499484e-06});
  const V t = V(1) / fma(a, V(0.5), V(1));
  const V p = polynomial(t, {-0.000156049163, 0.284939682, 0.259521866, 0.348352647, -0.104680303,
                             0.564484544, -0.471948771, 0.119540952});
  const V far = copy_sign(V(1) - exp(negated(square)) * p, x);
  const V value = select((V::Bits)(a.v < V(1).v), near, far);
  return select((V::Bits)(a.v > V(4).v), copy_sign(V(1), x), value);
}
FASTRNN_INLINE Vec<double> erf(Vec<double> x) { return lane_by_lane(x, library_erf); }

// ---- roots, signs, comparisons ------------------------------------------------------------------

FASTRNN_INLINE float root(float x) { return __builtin_sqrtf(x); }
FASTRNN_INLINE double root(double x) { return __builtin_sqrt(x); }

template <class T>
FASTRNN_INLINE Vec<T> sqrt(Vec<T> x) {
#if defined(__AVX512F__) && FASTRNN_VECTOR_BYTES == 64
  if constexpr (sizeof(T) == 4)
    return Vec<T>(_mm512_maskz_sqrt_ps(0xffff, x.v));
  else
    return Vec<T>(_mm512_maskz_sqrt_pd(0xff, x.v));
#else
  Vec<T> y;
  for (int i = 0; i < Vec<T>::lanes; ++i) y.v[i] = root(x.v[i]);
  return y;
#endif
}

// 1 where the comparison holds, else 0.
template <class T>
FASTRNN_INLINE Vec<T> truth(typename Vec<T>::Bits mask) {
  using V = Vec<T>;
  return V((typename V::Native)(mask & (typename V::Bits)V(1).v));
}

template <class T>
FASTRNN_INLINE Vec<T> sign(Vec<T> x) {
  using V = Vec<T>;
  using Bits = typename V::Bits;
  return truth<T>((Bits)(x.v > V(0).v)) - truth<T>((Bits)(x.v < V(0).v));
}

// The larger and the smaller; NaN where either is NaN.
template <class T>
FASTRNN_INLINE Vec<T> larger(Vec<T> a, Vec<T> b) {
  using Bits = typename Vec<T>::Bits;
  return select((Bits)(b.v > a.v) | (Bits)(b.v != b.v), b, a);
}
template <class T>
FASTRNN_INLINE Vec<T> smaller(Vec<T> a, Vec<T> b) {
  using Bits = typename Vec<T>::Bits;
  return select((Bits)(b.v < a.v) | (Bits)(b.v != b.v), b, a);
}

}  // namespace fastrnn::FASTRNN_ISA
