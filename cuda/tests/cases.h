// Random stacks and functions to run them on a device of the engine, shared by the tests of the
// CUDA kernels' source on the CPU (kernels_test.cpp) and of their PTX on the virtual device
// (virtual/virtual_test.cpp).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "../../csrc/tests/case.h"
#include "../../csrc/tests/check.h"
#include "backend.h"
#include "storage.h"

namespace fastrnn::cases {

enum Kind { kPadded, kLengths, kPacked, kReset, kLengthsAndReset, kKinds };

using Random = std::mt19937;

inline std::int64_t between(Random& random, std::int64_t low, std::int64_t high) {
  return std::uniform_int_distribution<std::int64_t>(low, high)(random);
}
inline bool chance(Random& random, double p) { return std::bernoulli_distribution(p)(random); }

inline void choose_rows(Case& c, Kind kind, Random& random) {
  if (kind == kPacked) {
    c.B = std::max<std::int64_t>(c.B, 1);
    std::int64_t left = c.B;
    for (std::int64_t t = 0; t < c.T; ++t) {
      c.batch_sizes.push_back(left);
      left = between(random, 1, left);
    }
  }
  if (kind == kLengths || kind == kLengthsAndReset)
    for (std::int64_t b = 0; b < c.B; ++b) c.lengths.push_back(between(random, 0, c.T));
  if (kind == kReset || kind == kLengthsAndReset)
    for (std::int64_t n = 0; n < c.T * c.B; ++n) c.reset.push_back(chance(random, 0.3));
  // Non-empty arrays indicate presence, but for an empty batch they are empty too.
  if (c.B == 0) c.lengths.clear(), c.reset.clear();
}

// A random number of heads, of which the sizes are multiples; occasionally one head per unit.
inline void choose_heads(Case& c, Random& random) {
  std::int64_t& heads = c.options.maths.heads;
  heads = chance(random, 0.2) && !c.P() ? c.H : between(random, 2, 5);
  c.H = (c.H + heads - 1) / heads * heads;
  if (!c.P()) return;
  c.options.proj_size = (c.P() + heads - 1) / heads * heads;
  if (c.P() >= c.H) c.H = c.P() + heads;
}

inline Case random_case(Random& random, bool smooth, bool many_rows) {
  Case c;
  static constexpr const char* cells[] = {"RNN", "LSTM", "GRU"};
  c.options.cell = cells[between(random, 0, 2)];
  c.options.layers = between(random, 1, 3);
  c.options.directions = between(random, 1, 2);
  c.options.maths.reset_after = c.options.cell != "GRU" || chance(random, 0.5);
  static constexpr Activation smooth_ones[] = {Activation::tanh, Activation::sigmoid,
                                               Activation::identity};
  c.options.maths.activation =
      smooth ? smooth_ones[between(random, 0, 2)] : static_cast<Activation>(between(random, 0, 3));
  if (c.options.cell == "RNN" && c.options.maths.activation == Activation::identity)
    c.options.maths.activation = Activation::tanh;  // grows without bound
  if (!smooth && chance(random, 0.4)) c.options.maths.gate_activation = GateActivation::hardsigmoid;
  c.T = between(random, 1, 7);
  c.B = many_rows ? between(random, 64, 70) : between(random, 0, 11);
  c.I = between(random, many_rows ? 1 : 0, 21);
  c.H = between(random, 1, 37);
  if (c.options.cell == "LSTM" && c.H > 1 && chance(random, 0.4))
    c.options.proj_size = between(random, 1, c.H - 1);
  if (chance(random, 0.3)) choose_heads(c, random);
  choose_rows(c, static_cast<Kind>(between(random, 0, kKinds - 1)), random);
  c.training = chance(random, 0.8);
  c.every_layer = chance(random, 0.5);
  c.consume = chance(random, 0.5);
  c.biases = chance(random, 0.8), c.states = chance(random, 0.8);
  c.turned = chance(random, 0.3), c.batch_first = chance(random, 0.3);
  c.d_output = chance(random, 0.9), c.d_states = chance(random, 0.4);
  c.d_finals = chance(random, 0.8), c.d_input = chance(random, 0.9);
  c.d_weights = chance(random, 0.9);
  return c;
}

// ---- its arrays ---------------------------------------------------------------------------------

template <class S>
struct Arrays {
  using C = typename ComputeOf<S>::type;
  std::vector<S> input, h0, c0, d_output, d_hidden, d_h_n, d_c_n;
  std::vector<C> d_cell;
  std::vector<std::vector<S>> weights;
  // Written:
  std::vector<S> hidden, h_n, c_n, d_input, d_h0, d_c0;
  std::vector<C> cell, saved;
  std::vector<std::vector<S>> d_weights;
};

template <class S>
std::vector<S> some(Random& random, std::int64_t count, double scale) {
  std::uniform_real_distribution<double> uniform(-scale, scale);
  std::vector<S> values(size_of(count));
  for (S& x : values) narrow(static_cast<typename ComputeOf<S>::type>(uniform(random)), &x);
  return values;
}

// [rows, columns, P…] of the five parameters of each layer and direction.
inline std::vector<std::pair<std::int64_t, std::int64_t>> shapes(const Case& c) {
  std::vector<std::pair<std::int64_t, std::int64_t>> all;
  const std::int64_t rows = c.G() * c.H;
  for (std::int64_t g = 0; g < c.groups(); ++g) {
    all.emplace_back(rows, c.inputs(g));
    all.emplace_back(rows, c.O() / c.heads());
    all.emplace_back(c.biases ? rows : 0, 1);
    all.emplace_back(c.biases ? rows : 0, 1);
    all.emplace_back(c.P(), c.P() ? c.H : 0);
  }
  return all;
}

template <class S>
Arrays<S> random_arrays(const Case& c, Random& random) {
  Arrays<S> a;
  const std::int64_t groups = c.groups(), N = c.pairs();
  a.input = some<S>(random, N * c.I, 1);
  a.h0 = some<S>(random, groups * c.B * c.O(), 1);
  a.c0 = some<S>(random, groups * c.B * c.H, 1);
  a.d_output = some<S>(random, N * c.D() * c.O(), 1);
  a.d_hidden = some<S>(random, c.L() * N * c.D() * c.O(), 1);
  a.d_cell = some<typename ComputeOf<S>::type>(random, c.L() * N * c.D() * c.H, 1);
  a.d_h_n = some<S>(random, groups * c.B * c.O(), 1);
  a.d_c_n = some<S>(random, groups * c.B * c.H, 1);
  for (const auto& [rows, columns] : shapes(c))
    a.weights.push_back(some<S>(random, rows * columns, 1 / std::sqrt(static_cast<double>(c.H))));
  // The padding of the input must not affect any result.
  for (std::int64_t b = 0; b < static_cast<std::int64_t>(c.lengths.size()); ++b)
    for (std::int64_t t = c.lengths[size_of(b)]; t < c.T; ++t)
      for (std::int64_t u = 0; u < c.I; ++u) {
        const std::int64_t n = c.batch_first ? b * c.T + t : t * c.B + b;
        std::memset(&a.input[size_of(n * c.I + u)], 0xff, sizeof(S));
      }
  return a;
}

// ---- running a case -----------------------------------------------------------------------------

template <class S>
Weight matrix(std::vector<S>& w, std::int64_t rows, std::int64_t columns, bool turned) {
  if (w.empty() && rows == 0) return {};
  static S nothing[1];
  void* data = w.empty() ? nothing : w.data();
  return turned ? Weight{data, 1, rows} : Weight{data, columns, 1};
}

template <class S>
std::vector<Parameters> parameters_of(const Case& c, std::vector<std::vector<S>>& w, bool turned) {
  const auto sizes = shapes(c);
  std::vector<Parameters> all;
  for (std::int64_t g = 0; g < c.groups(); ++g) {
    const auto weight = [&](std::int64_t k) {
      const auto& [rows, columns] = sizes[size_of(g * 5 + k)];
      return matrix(w[size_of(g * 5 + k)], rows, columns, turned && columns != 1);
    };
    const auto bias = [&](std::int64_t k) {
      auto& values = w[size_of(g * 5 + k)];
      return Weight{values.empty() ? nullptr : values.data(), 0, 1};
    };
    Parameters p;
    p.weight_ih = weight(0);
    p.weight_hh = matrix(w[size_of(g * 5 + 1)], c.G() * c.H / c.heads(), c.O() / c.heads(), turned);
    p.weight_hh.head = c.G() * c.H / c.heads() * (c.O() / c.heads());
    p.bias_ih = bias(2);
    p.bias_hh = bias(3);
    p.weight_hr = weight(4);
    all.push_back(p);
  }
  return all;
}

template <class T>
void blank(std::vector<T>& values, std::int64_t count) {
  values.resize(size_of(count));
  if (count) std::memset(static_cast<void*>(values.data()), 0xff, size_of(count) * sizeof(T));
}

template <class S>
DType dtype_of();
template <>
inline DType dtype_of<float>() {
  return DType::f32;
}
template <>
inline DType dtype_of<double>() {
  return DType::f64;
}
template <>
inline DType dtype_of<Bf16>() {
  return DType::bf16;
}
template <>
inline DType dtype_of<F16>() {
  return DType::f16;
}

// A pointer that is not null, even for an empty array.
template <class T>
void* place(std::vector<T>& values) {
  static T nothing[1];
  return values.empty() ? nothing : values.data();
}

template <class S>
Problem problem_of(const Case& c, Arrays<S>& a) {
  Problem p;
  p.options = c.options;
  p.dtype = dtype_of<S>();
  p.T = c.T, p.B = c.B, p.I = c.I, p.H = c.H;
  p.persistent = c.persistent, p.allow_tf32 = c.tf32;
  if (c.packed()) p.batch_sizes = c.batch_sizes.data();
  if (!c.lengths.empty()) p.lengths = c.lengths.data();
  if (!c.reset.empty()) p.reset = reinterpret_cast<const bool*>(c.reset.data());
  p.reset_step = c.B, p.reset_row = 1;
  const bool turned = c.batch_first && !c.packed();
  p.input = {place(a.input), turned ? c.I : c.B * c.I, turned ? c.T * c.I : c.I, 1};
  if (c.states) {
    p.h0 = {place(a.h0), c.B * c.O(), c.O(), 1};
    if (c.has_c()) p.c0 = {place(a.c0), c.B * c.H, c.H, 1};
  }
  p.all_layers = c.every_layer || c.training;
  p.hidden = place(a.hidden), p.h_n = place(a.h_n);
  if (c.has_c()) p.c_n = place(a.c_n);
  if (c.has_c() && p.all_layers) p.cell = place(a.cell);
  if (c.training) p.saved = place(a.saved);
  return p;
}

// A device that keeps no packed weights and runs no ensembles, as CUDA's does not.
constexpr Backend backend_of(std::size_t (*workspace_size)(const Problem&, Pass),
                             void (*forward)(const Problem&), void (*backward)(const Problem&)) {
  return {workspace_size, nullptr, nullptr, nullptr, forward, backward, nullptr, nullptr};
}

template <class S>
void run(const Backend& backend, const Case& c, Arrays<S>& a) {
  const std::int64_t groups = c.groups(), N = c.pairs();
  blank(a.hidden, c.kept_layers() * N * c.D() * c.O());
  blank(a.h_n, groups * c.B * c.O());
  blank(a.c_n, c.has_c() ? groups * c.B * c.H : 0);
  const bool all = c.every_layer || c.training;
  blank(a.cell, c.has_c() && all ? c.L() * N * c.D() * c.H : 0);
  blank(a.saved, c.training ? groups * N * cell_traits(c.options).saved_planes * padded(c.H) : 0);
  std::vector<Parameters> parameters = parameters_of(c, a.weights, c.turned), d_parameters;
  Problem p = problem_of(c, a);
  p.parameters = parameters.data();
  Workspace w;
  p.workspace = w.take(backend.workspace_size(p, Pass::forward));
  backend.forward(p);
  check::that("the end of forward's workspace", w.is_whole());
  if (!c.training) return;

  blank(a.d_input, c.d_input ? N * c.I : 0);
  blank(a.d_h0, c.states ? groups * c.B * c.O() : 0);
  blank(a.d_c0, c.states && c.has_c() ? groups * c.B * c.H : 0);
  a.d_weights = a.weights;
  for (auto& d : a.d_weights) blank(d, static_cast<std::int64_t>(d.size()));
  d_parameters = parameters_of(c, a.d_weights, false);
  p.consume_saved = c.consume;
  const std::int64_t width = c.D() * c.O();
  if (c.d_output) p.d_output = {place(a.d_output), c.B * width, width, 1};
  if (c.d_states) {
    p.d_hidden = {place(a.d_hidden), c.B * width, width, 1};
    p.d_hidden_layer = N * width;
    if (c.has_c()) p.d_cell = {place(a.d_cell), c.B * c.D() * c.H, c.D() * c.H, 1};
    p.d_cell_layer = N * c.D() * c.H;
  }
  if (c.d_finals) {
    p.d_h_n = {place(a.d_h_n), c.B * c.O(), c.O(), 1};
    if (c.has_c()) p.d_c_n = {place(a.d_c_n), c.B * c.H, c.H, 1};
  }
  if (c.d_input) p.d_input = place(a.d_input);
  if (c.states) p.d_h0 = place(a.d_h0);
  if (c.states && c.has_c()) p.d_c0 = place(a.d_c0);
  if (c.d_weights) p.d_parameters = d_parameters.data();
  p.workspace = nullptr;  // forward's workspace is too small for backward
  p.workspace = w.take(backend.workspace_size(p, Pass::backward));
  backend.backward(p);
  check::that("the end of backward's workspace", w.is_whole());
}

// Element (head, row, column) of weight_hh of several heads, and its place in the same matrix with
// one head, which is zero outside the heads' blocks.
struct HeadBlock {
  std::int64_t heads, G, H, O;

  std::int64_t rows() const { return G * H / heads; }
  std::int64_t columns() const { return O / heads; }
  std::int64_t in_head(std::int64_t head, std::int64_t m, std::int64_t k, bool turned) const {
    return head * rows() * columns() + (turned ? k * rows() + m : m * columns() + k);
  }
  std::int64_t in_whole(std::int64_t head, std::int64_t m, std::int64_t k, bool turned) const {
    const std::int64_t units = H / heads, row = m / units * H + head * units + m % units;
    const std::int64_t column = head * columns() + k;
    return turned ? column * G * H + row : row * O + column;
  }
  // body(place in the heads' blocks, place in the whole matrix) for every element.
  template <class Body>
  void each(bool turned, Body body) const {
    for (std::int64_t head = 0; head < heads; ++head)
      for (std::int64_t m = 0; m < rows(); ++m)
        for (std::int64_t k = 0; k < columns(); ++k)
          body(size_of(in_head(head, m, k, turned)), size_of(in_whole(head, m, k, turned)));
  }
};

// What the kernels are compared with: the CPU engine, which has no heads, and computes a stack of
// several with one block-diagonal matrix.
template <class S>
void run_reference(const Case& c, Arrays<S>& a) {
  if (c.heads() == 1) return run(cpu_backend(), c, a);
  const HeadBlock blocks{c.heads(), c.G(), c.H, c.O()};
  const std::size_t whole_size = size_of(c.G() * c.H * c.O());
  const std::vector<std::vector<S>> weights = a.weights;
  for (std::int64_t g = 0; g < c.groups(); ++g) {
    std::vector<S>& w = a.weights[size_of(g * 5 + 1)];
    std::vector<S> whole(whole_size);
    blocks.each(c.turned, [&](std::size_t from, std::size_t to) { whole[to] = w[from]; });
    w = whole;
  }
  Case one = c;
  one.options.maths.heads = 1;
  run(cpu_backend(), one, a);
  a.weights = weights;
  for (std::int64_t g = 0; g < c.groups() && c.training; ++g) {
    std::vector<S>& d = a.d_weights[size_of(g * 5 + 1)];
    std::vector<S> of_heads(weights[size_of(g * 5 + 1)].size());
    blocks.each(false, [&](std::size_t to, std::size_t from) { of_heads[to] = d[from]; });
    d = of_heads;
  }
}

// ---- the checks ---------------------------------------------------------------------------------

template <class T>
void compare(const std::string& what, const std::vector<T>& got, const std::vector<T>& expected,
             double tolerance) {
  double most = 0.1;
  for (const T& x : expected)
    if (std::isfinite(static_cast<double>(widen(x))))
      most = std::max(most, std::fabs(static_cast<double>(widen(x))));
  for (std::size_t i = 0; i < expected.size(); ++i, ++checks) {
    const double value = widen(got[i]), wanted = widen(expected[i]);
    if (std::isnan(wanted) && std::isnan(value)) continue;
    if (std::fabs(value - wanted) <= tolerance * most) continue;
    check::close((what + " [" + std::to_string(i) + "]").c_str(), value, wanted, 0);
    return;
  }
}

template <class S>
void compare_all(const Case& c, const Arrays<S>& got, const Arrays<S>& expected, double tolerance) {
  compare("hidden", got.hidden, expected.hidden, tolerance);
  compare("h_n", got.h_n, expected.h_n, tolerance);
  compare("c_n", got.c_n, expected.c_n, tolerance);
  compare("cell", got.cell, expected.cell, tolerance);
  if (!c.training) return;
  compare("d_input", got.d_input, expected.d_input, 4 * tolerance);
  compare("d_h0", got.d_h0, expected.d_h0, 4 * tolerance);
  compare("d_c0", got.d_c0, expected.d_c0, 4 * tolerance);
  for (std::size_t k = 0; k < expected.d_weights.size() && c.d_weights; ++k)
    compare("d_weights[" + std::to_string(k) + "]", got.d_weights[k], expected.d_weights[k],
            4 * tolerance);
}

template <class T>
void same_bits(const char* what, const std::vector<T>& a, const std::vector<T>& b) {
  ++checks;
  check::that(what, a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

template <class S>
void same_bits_of_all(const Case& c, const Arrays<S>& a, const Arrays<S>& b) {
  same_bits("hidden in another order", a.hidden, b.hidden);
  same_bits("h_n in another order", a.h_n, b.h_n);
  same_bits("c_n in another order", a.c_n, b.c_n);
  same_bits("cell in another order", a.cell, b.cell);
  // Where backward may use their place, it does so or not as their memory is aligned.
  if (!c.consume) same_bits("saved values in another order", a.saved, b.saved);
  same_bits("d_input in another order", a.d_input, b.d_input);
  same_bits("d_h0 in another order", a.d_h0, b.d_h0);
  same_bits("d_c0 in another order", a.d_c0, b.d_c0);
  for (std::size_t k = 0; k < a.d_weights.size(); ++k)
    same_bits("d_weights in another order", a.d_weights[k], b.d_weights[k]);
}

}  // namespace fastrnn::cases
