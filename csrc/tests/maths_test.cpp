// The functions inside a cell, the storage types and the micro-kernel on packed weights, on one
// instruction set (FASTRNN_ISA).
#include <cstdint>
#include <limits>
#include <vector>

#define FASTRNN_REGISTERS 16
#if defined(__AVX512F__)
#define FASTRNN_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define FASTRNN_VECTOR_BYTES 32
#else
#define FASTRNN_VECTOR_BYTES 16
#endif
#include "cells/activation.h"
#include "check.h"
#include "cpu/functions.h"
#include "cpu/int8.h"

#if defined(__AVXVNNI__)
#include <cpuid.h>
#endif

namespace {

using namespace fastrnn;
using namespace fastrnn::FASTRNN_ISA;

long checks = 0;

template <class T>
T first_lane(Vec<T> x) {
  T lane[Vec<T>::lanes];
  x.store(lane);
  return lane[0];
}

// The distance of `value` from the exact result in units in its last place.
template <class T>
double ulps(T value, long double exact) {
  const T nearest = static_cast<T>(exact);
  const T next = std::nextafter(nearest, std::numeric_limits<T>::infinity());
  return static_cast<double>(std::fabs((static_cast<long double>(value) - exact) /
                                       (static_cast<long double>(next) - nearest)));
}

template <class T>
void accuracy(const char* type) {
  double worst_tanh = 0, worst_sigmoid = 0;
  for (long double x = 1e-30L; x < 80; x *= 1.00037L)
    for (const int sign : {1, -1}) {
      const T at = static_cast<T>(sign * x);
      const long double exact_x = at;
      worst_tanh = std::fmax(worst_tanh, ulps(first_lane(tanh(Vec<T>(at))), std::tanh(exact_x)));
      worst_sigmoid = std::fmax(
          worst_sigmoid, ulps(first_lane(sigmoid(Vec<T>(at))), 1 / (1 + std::exp(-exact_x))));
      checks += 2;
    }
  std::printf("%s: tanh within %.2f ULP, sigmoid within %.2f ULP\n", type, worst_tanh,
              worst_sigmoid);
  check::that("tanh within 4 ULP", worst_tanh <= 4);
  check::that("sigmoid within 4 ULP", worst_sigmoid <= 4);
}

template <class T>
void limits() {
  const T inf = std::numeric_limits<T>::infinity(), nan = std::numeric_limits<T>::quiet_NaN();
  check::that("tanh(inf) = 1", first_lane(tanh(Vec<T>(inf))) == 1);
  check::that("tanh(-inf) = -1", first_lane(tanh(Vec<T>(-inf))) == -1);
  check::that("tanh(-0) = -0", std::signbit(first_lane(tanh(Vec<T>(T(-0.0))))));
  check::that("sigmoid(inf) = 1", first_lane(sigmoid(Vec<T>(inf))) == 1);
  check::that("sigmoid(-inf) = 0", first_lane(sigmoid(Vec<T>(-inf))) == 0);
  check::that("hardsigmoid(±inf)", first_lane(hardsigmoid(Vec<T>(inf))) == 1 &&
                                       first_lane(hardsigmoid(Vec<T>(-inf))) == 0);
  for (const Activation f :
       {Activation::tanh, Activation::relu, Activation::sigmoid, Activation::identity}) {
    check::that("an activation lets NaN through", std::isnan(first_lane(activate(f, Vec<T>(nan)))));
    ++checks;
  }
  check::that("hardsigmoid lets NaN through", std::isnan(first_lane(hardsigmoid(Vec<T>(nan)))));
  checks += 6;
}

// The functions of programs (cpu/functions.h), over all magnitudes of both signs and densely where
// their formulas change over.
template <class T, class Function, class Exact>
void function_accuracy(const char* name, long double most, Function function, Exact exact) {
  const FlushSubnormals guard;
  double worst = 0;
  const auto at = [&](long double x) {
    const T given = static_cast<T>(x);
    const long double expected = exact(static_cast<long double>(given));
    if (!(std::fabs(expected) >= std::numeric_limits<T>::min()) ||
        std::fabs(expected) > std::numeric_limits<T>::max())
      return;
    worst = std::fmax(worst, ulps(first_lane(function(Vec<T>(given))), expected));
    ++checks;
  };
  for (const long double start : {1e-30L, 1e-3L, 0.3L})
    for (long double x = start; x < most; x *= start == 1e-30L ? 1.0031L : 1.0007L)
      for (const int sign : {1, -1}) at(sign * x);
  std::printf("%s (%d bits): within %.2f ULP\n", name, static_cast<int>(sizeof(T)) * 8, worst);
  check::that(name, worst <= 4);
}

template <class T>
void functions() {
  using L = long double;
  using V = Vec<T>;
  const L large = sizeof(T) == 4 ? 1e30L : 1e300L, turns = sizeof(T) == 4 ? 1e6L : 1e9L;
  function_accuracy<T>("exp", 800, [](V x) { return exp(x); }, [](L x) { return std::exp(x); });
  function_accuracy<T>(
      "expm1", 800, [](V x) { return expm1(x); }, [](L x) { return std::expm1(x); });
  function_accuracy<T>("log", large, [](V x) { return log(x); }, [](L x) { return std::log(x); });
  function_accuracy<T>(
      "log1p", large, [](V x) { return log1p(x); }, [](L x) { return std::log1p(x); });
  function_accuracy<T>("sin", turns, [](V x) { return sin(x); }, [](L x) { return std::sin(x); });
  function_accuracy<T>("cos", turns, [](V x) { return cos(x); }, [](L x) { return std::cos(x); });
  function_accuracy<T>("erf", 30, [](V x) { return erf(x); }, [](L x) { return std::erf(x); });
  function_accuracy<T>(
      "softplus1", 800, [](V x) { return softplus1(x); },
      [](L x) { return std::fmax(x, L(0)) + std::log1p(std::exp(-std::fabs(x))); });
  function_accuracy<T>(
      "sqrt", large, [](V x) { return sqrt(x); }, [](L x) { return std::sqrt(x); });
}

template <class T>
void function_limits() {
  const FlushSubnormals guard;
  const T inf = std::numeric_limits<T>::infinity(), nan = std::numeric_limits<T>::quiet_NaN();
  const auto expect = [](const char* name, Vec<T> value, T expected) {
    const T got = first_lane(value);
    check::that(name, std::isnan(expected)
                          ? std::isnan(got)
                          : got == expected && std::signbit(got) == std::signbit(expected));
    ++checks;
  };
  using V = Vec<T>;
  expect("exp(inf)", exp(V(inf)), inf);
  expect("exp(-inf)", exp(V(-inf)), 0);
  expect("exp(1000)", exp(V(T(1000))), inf);
  expect("exp(-1000)", exp(V(T(-1000))), 0);
  expect("exp(0)", exp(V(T(0))), 1);
  expect("expm1(inf)", expm1(V(inf)), inf);
  expect("expm1(-inf)", expm1(V(-inf)), -1);
  expect("expm1(-0)", expm1(V(T(-0.0))), T(-0.0));
  expect("log(0)", log(V(T(0))), -inf);
  expect("log(inf)", log(V(inf)), inf);
  expect("log(-1)", log(V(T(-1))), nan);
  expect("log(1)", log(V(T(1))), 0);
  expect("log1p(-1)", log1p(V(T(-1))), -inf);
  expect("log1p(-2)", log1p(V(T(-2))), nan);
  expect("log1p(inf)", log1p(V(inf)), inf);
  expect("log1p(-0)", log1p(V(T(-0.0))), T(-0.0));
  expect("sin(-0)", sin(V(T(-0.0))), T(-0.0));
  expect("sin(inf)", sin(V(inf)), nan);
  expect("cos(-inf)", cos(V(-inf)), nan);
  expect("erf(inf)", erf(V(inf)), 1);
  expect("erf(-inf)", erf(V(-inf)), -1);
  expect("erf(-0)", erf(V(T(-0.0))), T(-0.0));
  expect("softplus1(inf)", softplus1(V(inf)), inf);
  expect("softplus1(-inf)", softplus1(V(-inf)), 0);
  expect("sign(-3)", sign(V(T(-3))), -1);
  expect("sign(0)", sign(V(T(0))), 0);
  expect("sign(NaN)", sign(V(nan)), 0);
  expect("larger(NaN, 1)", larger(V(nan), V(T(1))), nan);
  expect("larger(1, NaN)", larger(V(T(1)), V(nan)), nan);
  expect("smaller(NaN, 1)", smaller(V(nan), V(T(1))), nan);
  expect("smaller(1, NaN)", smaller(V(T(1)), V(nan)), nan);
  for (const V value : {exp(V(nan)), expm1(V(nan)), log(V(nan)), log1p(V(nan)), sin(V(nan)),
                        cos(V(nan)), erf(V(nan)), softplus1(V(nan)), sqrt(V(nan))})
    expect("a function lets NaN through", value, nan);
}

// A lane's value depends on no other: large arguments of sine and cosine are computed differently.
void functions_of_lanes() {
  constexpr int lanes = Vec<float>::lanes;
  float mixed[lanes], small[lanes], sines[lanes], cosines[lanes], alone[lanes];
  for (int i = 0; i < lanes; ++i) {
    small[i] = 0.7f * static_cast<float>(i) - 3;
    mixed[i] = i % 2 ? small[i] : 1e7f * static_cast<float>(i + 1);
  }
  sin(Vec<float>::load(mixed)).store(sines);
  cos(Vec<float>::load(mixed)).store(cosines);
  for (int i = 0; i < lanes; ++i, checks += 2) {
    sin(Vec<float>(mixed[i])).store(alone);
    check::that("the sine of a lane", sines[i] == alone[0]);
    cos(Vec<float>(mixed[i])).store(alone);
    check::that("the cosine of a lane", cosines[i] == alone[0]);
  }
}

// The value of a float of `exponent` and `mantissa` bits, by its definition.
double value_of(std::uint16_t bits, int exponent_bits, int mantissa_bits) {
  const int exponent = (bits >> mantissa_bits) & ((1 << exponent_bits) - 1);
  const int mantissa = bits & ((1 << mantissa_bits) - 1);
  const int bias = (1 << (exponent_bits - 1)) - 1;
  const double sign = bits & 0x8000 ? -1 : 1;
  if (exponent == (1 << exponent_bits) - 1)
    return mantissa ? std::numeric_limits<double>::quiet_NaN() : sign * INFINITY;
  if (exponent == 0) return sign * std::ldexp(mantissa, 1 - bias - mantissa_bits);
  return sign * std::ldexp(mantissa + (1 << mantissa_bits), exponent - bias - mantissa_bits);
}

// Every 16-bit value widens to its exact value and narrows back to itself, and the midpoints
// between neighbours round to the even one. Subnormal bf16 values are subnormal floats, which the
// engine treats as zero, so bf16 is tested from its smallest normal value on.
template <class Half>
void storage(const char* name, int exponent_bits, int mantissa_bits, bool subnormals) {
  const FlushSubnormals guard;
  for (std::uint32_t bits = 0; bits < 0x10000; ++bits) {
    const Half half{static_cast<std::uint16_t>(bits)};
    const double exact = value_of(half.bits, exponent_bits, mantissa_bits);
    const bool subnormal = exact != 0 && !((bits & 0x7fff) >> mantissa_bits);
    if (subnormal && !subnormals) continue;
    ++checks;
    Half back{};
    narrow(widen(half), &back);
    if (std::isnan(exact)) {
      check::that(name, std::isnan(widen(half)) &&
                            std::isnan(value_of(back.bits, exponent_bits, mantissa_bits)));
      continue;
    }
    check::that(name, static_cast<double>(widen(half)) == exact && back.bits == half.bits);
    const double next =
        value_of(static_cast<std::uint16_t>(bits + 1), exponent_bits, mantissa_bits);
    if (!std::isfinite(exact) || !std::isfinite(next) || subnormal) continue;
    Half middle{};
    narrow(static_cast<float>((exact + next) / 2), &middle);
    check::that("a tie rounds to even", middle.bits == (bits & 1 ? bits + 1 : bits));
  }
}

// A whole vector converts to the bits of the functions of one value, both ways and for a type's own
// rounding, flushing subnormals as the engine does.
template <class Half>
void conversions(const char* name) {
  const FlushSubnormals guard;
  constexpr int lanes = Vec<float>::lanes;
  const auto same = [&](const float* wide) {
    Half halves[lanes], half{};
    float back[lanes];
    store_units(Vec<float>::load(wide), halves, lanes);
    rounded<Half>(Vec<float>::load(wide)).store(back);
    for (int i = 0; i < lanes; ++i, ++checks) {
      narrow(wide[i], &half);
      check::that(name, halves[i].bits == half.bits && as_bits(back[i]) == as_bits(widen(half)));
    }
  };
  float wide[lanes];
  for (std::uint32_t bits = 0; bits < 0x10000; bits += lanes) {
    Half halves[lanes];
    for (std::uint32_t i = 0; i < lanes; ++i) halves[i].bits = static_cast<std::uint16_t>(bits + i);
    load_units<float>(halves, lanes).store(wide);
    for (int i = 0; i < lanes; ++i, ++checks)
      check::that(name, as_bits(wide[i]) == as_bits(widen(halves[i])));
  }
  // Every sign and exponent, with mantissas about the halfway points and at random.
  std::uint32_t random = 1;
  for (std::uint32_t top = 0; top < 0x10000; ++top) {
    for (std::uint32_t i = 0; i < lanes; ++i) {
      random = random * 1664525u + 1013904223u;
      const std::uint32_t low = i < 4 ? 0x7fffu + i % 3 : i < 7 ? 0x0fffu + i % 3 : random >> 16;
      wide[i] = as_float(top << 16 | low);
    }
    same(wide);
  }
}

// A row of any length converts as its elements do, and nothing beside it is written.
template <class Half>
void rows(const char* name) {
  constexpr int most = 3 * Vec<float>::lanes + 1;
  Half from[2 * most], back[most + 1];
  float to[most + 1];
  for (std::uint16_t i = 0; i < 2 * most; ++i) narrow(0.37f * static_cast<float>(i) - 5, from + i);
  for (int count = 0; count <= most; ++count)
    for (const int unit : {1, 2}) {
      to[count] = -7;
      back[count].bits = 7;
      gather(to, from, unit, count);
      scatter(back, to, count);
      bool good = to[count] == -7 && back[count].bits == 7;
      for (int i = 0; i < count; ++i)
        good = good && to[i] == widen(from[i * unit]) && back[i].bits == from[i * unit].bits;
      check::that(name, good);
      ++checks;
    }
}

// Rows by packed weights, for every remainder of K: the sums of the rounded values, with the same
// bits in any block of rows. Rows end with their array, so that a sanitizer sees any read beyond;
// gaps between strided weights are NaN.
template <class S>
void products(const char* name, double tolerance) {
  using C = typename ComputeOf<S>::type;
  using E = typename FactorOf<S>::type;
  constexpr int R = 2, N = 2, lanes = Vec<C>::lanes;
  constexpr Index units = N * lanes - 1;  // the last output has no row of W
  for (Index K = 1; K < 70; ++K)
    for (const Index unit : {1, 2}) {
      const auto size = [](Index n) { return static_cast<std::size_t>(n); };
      std::vector<S> weights(size(units * K * unit));
      std::vector<E> row[R], packed(size(whole_steps<E>(K) * N * lanes));
      for (S& w : weights) narrow(static_cast<C>(std::nan("")), &w);
      std::vector<double> exact(size(R * units));
      for (int r = 0; r < R; ++r) row[r].resize(size(K));
      for (Index k = 0; k < K; ++k) {
        S x[R];
        for (int r = 0; r < R; ++r) {
          narrow(static_cast<C>(std::sin(3.0 * static_cast<double>(k) + r)), x + r);
          gather(&row[r][size(k)], x + r, 1, 1);
        }
        for (Index u = 0; u < units; ++u) {
          S& w = weights[size((u * K + k) * unit)];
          narrow(static_cast<C>(std::cos(static_cast<double>(u * K + k))), &w);
          for (int r = 0; r < R; ++r)
            exact[size(r * units + u)] +=
                static_cast<double>(widen(x[r])) * static_cast<double>(widen(w));
        }
      }
      pack_gates<E, S>(packed.data(), Weight{weights.data(), K * unit, unit}, units, K, 0, 1, N, 0);
      const E* const rows[] = {row[0].data(), row[1].data()};
      Vec<C> both[R][N], second[1][N];
      clear(both);
      clear(second);
      accumulate(both, rows, K, static_cast<const E*>(packed.data()));
      accumulate(second, rows + 1, K, static_cast<const E*>(packed.data()));
      for (Index u = 0; u <= units; ++u, ++checks) {
        const C first = both[0][u / lanes].v[u % lanes], last = both[1][u / lanes].v[u % lanes];
        const C alone = second[0][u / lanes].v[u % lanes];
        const double expected[] = {u < units ? exact[size(u)] : 0,
                                   u < units ? exact[size(units + u)] : 0};
        check::close(name, static_cast<double>(first), expected[0], tolerance);
        check::close(name, static_cast<double>(last), expected[1], tolerance);
        check::that(name, last == alone);
      }
    }
}

float most_of(const float* x, Index unit, Index count) {
  float most = 0;
  for (Index i = 0; i < count; ++i) most = std::fmax(most, std::fabs(x[i * unit]));
  return most;
}

// R rows by N vectors of outputs, as integers: with scales of one instead of the true ones.
template <int R, int N>
void int8_products() {
  constexpr Index lanes = Vec<float>::lanes, outputs = N * lanes;
  const auto size = [](Index n) { return static_cast<std::size_t>(n); };
  for (Index K = 1; K < 80; ++K)
    for (const Index unit : {1, 2}) {
      std::vector<float> weights(size((outputs - 1) * K * unit), std::nanf(""));
      const auto weight = [&](Index u, Index k) -> float& {
        return weights[size((u * K + k) * unit)];
      };
      for (Index u = 0; u < outputs - 1; ++u)  // some all of one size, all sums as large as can be
        for (Index k = 0; k < K; ++k)
          weight(u, k) = u % 3 == 0 ? -0.3f : std::sin(static_cast<float>(u * K + k));
      Int8Matrix m;
      Arena counted(nullptr);
      m.lay_out(counted, 1, K, N);
      std::vector<Vec<float>> memory(counted.used() / sizeof(Vec<float>) + 8);
      Arena arena(reinterpret_cast<void*>((reinterpret_cast<std::uintptr_t>(memory.data()) + 63) /
                                          64 * 64));
      m.lay_out(arena, 1, K, N);
      std::vector<std::int8_t> q(size((outputs - 1) * K)), again(q.size());
      std::vector<float> scales(size(outputs - 1)), scales_again(scales.size());
      quantize_rows(Weight{weights.data(), K * unit, unit}, outputs - 1, K, q.data(),
                    scales.data());
      change_block(m, 0, Weight{q.data(), K, 1, 0, scales.data()}, outputs - 1, 0, 1, pack_output);
      change_block(m, 0, Weight{again.data(), K, 1, 0, scales_again.data()}, outputs - 1, 0, 1,
                   unpack_output);
      check::that("unpacked", q == again && scales == scales_again);

      std::vector<float> x(size(R * K)), ones(size(R), 1.0f);
      for (Index i = 0; i < R * K; ++i) x[size(i)] = i % 5 ? std::cos(static_cast<float>(i)) : 1.0f;
      std::vector<Dot::Operand> operands(size(R * int8_row(K)));
      for (Index r = 0; r < R; ++r)
        check::close(
            "int8 scale",
            static_cast<double>(quantise_row(&operands[size(r * int8_row(K))], &x[size(r * K)], K)),
            most_of(&x[size(r * K)], 1, K) / 127.0, 1e-7);
      for (Index u = 0; u < outputs; ++u) {
        const double most = u < outputs - 1 ? most_of(&weight(u, 0), unit, K) : 0;
        check::close("int8 scale of weights", static_cast<double>(m.scale[u]), most / 127, 1e-7);
        m.scale[u] = 1;
      }
      Vec<float> sums[R][N];
      clear(sums);
      QuantisedRows rows;
      rows.data = operands.data();
      rows.scale = ones.data();
      rows.stride = int8_row(K);
      add_int8_product(sums, rows, 0, m, 0);
      for (Index r = 0; r < R; ++r)
        for (Index u = 0; u < outputs; ++u, ++checks) {
          long exact = 0;
          for (Index k = 0; k < K && u < outputs - 1; ++k)
            exact += std::lrint(weight(u, k) * (127.0f / most_of(&weight(u, 0), unit, K))) *
                     std::lrint(x[size(r * K + k)] * (127.0f / most_of(&x[size(r * K)], 1, K)));
          check::close("int8 product", static_cast<double>(sums[r][u / lanes].v[u % lanes]),
                       static_cast<double>(exact), 0);
        }
    }
}

// Rows that cannot be quantised: zeros, values that are too small, NaN and infinity.
void int8_limits() {
  constexpr Index K = 20;
  std::vector<Dot::Operand> operands(static_cast<std::size_t>(int8_row(K)));
  const auto scale_with = [&](float value) {
    std::vector<float> x(K, 0.0f);
    x[17] = value;
    return static_cast<double>(quantise_row(operands.data(), x.data(), K));
  };
  check::close("zeros", scale_with(0.0f), 0, 0);
  check::close("too small", scale_with(1e-35f), 0, 0);
  for (const Dot::Operand q : operands) check::that("too small is 0", q == Dot::offset);
  check::that("NaN", std::isnan(scale_with(std::nanf(""))));
  check::that("infinity", std::isnan(scale_with(-std::numeric_limits<float>::infinity())));
  for (const Dot::Operand q : operands) check::that("no number is 0", q == Dot::offset);
  checks += 4;
}

bool runs_here() {
#if defined(__AVX512BF16__)
  return __builtin_cpu_supports("avx512bf16");
#elif defined(__AVX512VNNI__)
  return __builtin_cpu_supports("avx512vnni");
#elif defined(__AVXVNNI__)
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 && (a & (1u << 4)) != 0;
#elif defined(__AVX512F__)
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq");
#elif defined(__AVX2__)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
  return true;
#endif
}

// Not inlined: main must not use the instruction set before it has checked the CPU.
[[gnu::noinline]] int run() {
  accuracy<float>("float");
  accuracy<double>("double");
  limits<float>();
  limits<double>();
  functions<float>();
  functions<double>();
  function_limits<float>();
  function_limits<double>();
  functions_of_lanes();
  storage<F16>("float16", 5, 10, true);
  storage<Bf16>("bfloat16", 8, 7, false);
  conversions<F16>("float16 vectors");
  conversions<Bf16>("bfloat16 vectors");
  rows<F16>("float16 rows");
  rows<Bf16>("bfloat16 rows");
  products<float>("float products", 1e-5);
  products<double>("double products", 1e-14);
  products<F16>("float16 products", 1e-5);
  products<Bf16>("bfloat16 products", 1e-5);
  int8_products<1, 1>();  // with two sums to each output
  int8_products<2, 4>();
  int8_limits();
  return check::result("maths_test", checks);
}

}  // namespace

int main() {
  if (runs_here()) return run();
  std::printf("maths_test: skipped, this CPU does not run the instruction set\n");
  return check::kSkipped;
}
