// The recurrence in plain loops and double precision, with the cells of csrc/cells/: the reference
// for the persistent kernels on a CPU (kernels_test.cpp, ../../tests/virtual/virtual_test.cpp).
#pragma once

#include <cmath>
#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "../../../csrc/tests/check.h"
#include "cells/elman.h"
#include "cells/gru.h"
#include "cells/lstm.h"
#include "persistent/backward.h"
#include "persistent/forward.h"

namespace fastrnn::persistent {

// The value type of the cells here.
struct Number {
  double v;
  Number() = default;
  explicit Number(double x) : v(x) {}
};
inline Number operator+(Number a, Number b) { return Number(a.v + b.v); }
inline Number operator-(Number a, Number b) { return Number(a.v - b.v); }
inline Number operator*(Number a, Number b) { return Number(a.v * b.v); }
inline Number operator/(Number a, Number b) { return Number(a.v / b.v); }
inline Number fma(Number a, Number b, Number c) { return a * b + c; }
inline Number exp_minus_one(Number x) { return Number(std::expm1(x.v > 700 ? 700 : x.v)); }
inline Number exp_minus(Number x) { return Number(std::exp(-x.v)); }
inline Number maximum(Number a, Number b) { return a.v < b.v ? b : a; }
inline Number minimum(Number a, Number b) { return a.v > b.v ? b : a; }
inline Number positive(Number x) { return Number(x.v <= 0 ? 0 : 1); }
inline Number between(Number x, Number l, Number h) {
  return Number(x.v > l.v && x.v < h.v ? 1 : 0);
}
inline Number absolute(Number x) { return Number(std::fabs(x.v)); }
inline Number copy_sign(Number x, Number s) { return Number(std::copysign(x.v, s.v)); }

// One problem: sizes, active rows, and every array that a pass reads or writes.
template <class Cell, class Operand>
struct Trial {
  using S = Storage<Operand>;
  int T = 1, B = 1, H = 1, groups = 1, reverse_from = 1 << 30;
  CellOptions options;
  std::vector<std::int64_t> active, offset;  // both empty: a full batch
  std::vector<std::uint8_t> fresh;           // empty: none
  bool states = true;                        // h0, c0 and the gradients of h_n, c_n are given

  std::vector<S> weight_hh, h0, c0, hidden, h_n, c_n;
  std::vector<float> hidden_bias, x_gates, cell, saved;
  std::vector<S> d_output, d_h_n, d_c_n, d_gates, d_h0, d_c0;

  std::int64_t pairs() const {
    if (active.empty()) return std::int64_t(T) * B;
    return offset.back() + active.back();
  }
  std::string text() const {
    return std::string(Cell::name) + " T" + std::to_string(T) + " B" + std::to_string(B) + " H" +
           std::to_string(H) + " groups " + std::to_string(groups) +
           (reverse_from < groups ? " reverse" : "") + (active.empty() ? "" : " lengths") +
           (fresh.empty() ? "" : " resets") + (states ? "" : " no states");
  }
};

template <class Cell, class Operand>
void fill(Trial<Cell, Operand>& p, unsigned seed) {
  std::mt19937 random(seed);
  std::uniform_real_distribution<float> uniform(-1.0f, 1.0f);
  const auto floats = [&](std::int64_t n, float scale) {
    std::vector<float> v(static_cast<std::size_t>(n));
    for (float& x : v) x = scale * uniform(random);
    return v;
  };
  const auto stored = [&](std::int64_t n, float scale) {
    std::vector<Storage<Operand>> v(static_cast<std::size_t>(n));
    for (auto& x : v) x = Operand::store(scale * uniform(random));
    return v;
  };
  const std::int64_t N = p.pairs(), units = std::int64_t(p.groups) * p.B * p.H;
  p.weight_hh = stored(std::int64_t(p.groups) * Cell::gates * p.H * p.H,
                       1.0f / std::sqrt(static_cast<float>(p.H)));
  p.hidden_bias = floats(std::int64_t(p.groups) * Cell::gates * p.H, 0.5f);
  p.x_gates = floats(p.groups * N * Cell::gates * p.H, 1.0f);
  p.h0 = stored(units, 1.0f), p.c0 = stored(units, 1.0f);
  p.d_output = stored(p.groups * N * p.H, 1.0f);
  p.d_h_n = stored(units, 1.0f), p.d_c_n = stored(units, 1.0f);
  const auto nan = static_cast<float>(NAN);
  const auto pairs = static_cast<std::size_t>(p.groups * N * p.H);
  const auto all = static_cast<std::size_t>(units);
  p.hidden.assign(pairs, Operand::store(nan));
  p.cell.assign(pairs, nan);
  p.saved.assign(pairs * Cell::saved, nan);
  p.d_gates.assign(pairs * Cell::gradients, Operand::store(nan));
  for (auto* v : {&p.h_n, &p.c_n, &p.d_h0, &p.d_c0}) v->assign(all, Operand::store(nan));
}

// The arguments of the kernels. Sequences are [groups][N][H], where N is the packed rows if given,
// else T·B; `at` maps a vector to its address (on the device: that of its copy).
template <class Cell, class Operand, class At>
Forward<Storage<Operand>> forward_arrays(const Trial<Cell, Operand>& p, const StepTable& steps,
                                         bool training, At at) {
  using S = Storage<Operand>;
  const std::int64_t N = p.pairs(), H = p.H, B = p.B;
  const std::int64_t step = p.active.empty() ? B * H : H;
  Forward<S> a;
  a.steps = steps;
  a.options = p.options;
  a.reverse_from = p.reverse_from;
  a.aligned = H % (4 * Operand::per_word) == 0;
  a.weight_hh = at(p.weight_hh);
  a.hidden_bias = at(p.hidden_bias);
  a.x_gates = {at(p.x_gates), N * Cell::gates * H, Cell::gates * H, H};
  if (p.states) a.h0 = {at(p.h0), B * H, H}, a.c0 = {at(p.c0), B * H, H};
  a.hidden = {const_cast<S*>(at(p.hidden)), N * H, step, H};
  if (training) {
    a.cell = {const_cast<float*>(at(p.cell)), N * H, step, H};
    a.saved = {const_cast<float*>(at(p.saved)), N * Cell::saved * H, Cell::saved * H, H};
  }
  a.h_n = {const_cast<S*>(at(p.h_n)), B * H, H};
  a.c_n = {const_cast<S*>(at(p.c_n)), B * H, H};
  return a;
}

template <class Cell, class Operand, class At>
Backward<Storage<Operand>> backward_arrays(const Trial<Cell, Operand>& p, const StepTable& steps,
                                           At at) {
  using S = Storage<Operand>;
  const std::int64_t N = p.pairs(), H = p.H, B = p.B;
  const std::int64_t step = p.active.empty() ? B * H : H;
  Backward<S> a;
  a.steps = steps;
  a.options = p.options;
  a.reverse_from = p.reverse_from;
  a.weight_hh = at(p.weight_hh);
  a.hidden = {at(p.hidden), N * H, step, H};
  a.cell = {at(p.cell), N * H, step, H};
  a.saved = {at(p.saved), N * Cell::saved * H, Cell::saved * H, H};
  a.d_output = {at(p.d_output), N * H, step, H};
  if (p.states) {
    a.h0 = {at(p.h0), B * H, H}, a.c0 = {at(p.c0), B * H, H};
    a.d_h_n = {at(p.d_h_n), B * H, H}, a.d_c_n = {at(p.d_c_n), B * H, H};
  }
  a.d_gates = {const_cast<S*>(at(p.d_gates)), N * Cell::gradients * H, Cell::gradients * H, H};
  a.d_h0 = {const_cast<S*>(at(p.d_h0)), B * H, H};
  a.d_c0 = {const_cast<S*>(at(p.d_c0)), B * H, H};
  return a;
}

// The expected results, [groups][N][H] and [groups][B][H], as in the kernels.
struct Expected {
  std::vector<double> hidden, h_n, c_n, d_gates, d_h0, d_c0;
};

template <class Cell, class Operand>
class Reference {
 public:
  explicit Reference(const Trial<Cell, Operand>& p) : p_(p), N_(p.pairs()) {
    steps_.T = p.T, steps_.B = p.B;
    if (!p.active.empty()) steps_.active = p.active.data(), steps_.offset = p.offset.data();
    if (!p.fresh.empty()) steps_.fresh = p.fresh.data();
    const auto pairs = static_cast<std::size_t>(p.groups * N_ * p.H);
    const auto all = static_cast<std::size_t>(std::int64_t(p.groups) * p.B * p.H);
    out_.hidden.assign(pairs, NAN);
    out_.d_gates.assign(pairs * Cell::gradients, NAN);
    for (auto* v : {&out_.h_n, &out_.c_n, &out_.d_h0, &out_.d_c0}) v->assign(all, 0.0);
    next_.assign(pairs * Cell::states, 0.0);
    previous_ = next_;
    saved_.assign(pairs * Cell::saved, 0.0);
  }

  // Row by row, because rows are independent.
  Expected run() {
    for (int g = 0; g < p_.groups; ++g)
      for (int i = 0; i < p_.B; ++i) {
        forward(g, i);
        backward(g, i);
      }
    return out_;
  }

 private:
  static constexpr int G = Cell::gates;
  using Row = std::vector<double>;

  double weight(int g, int gate, int unit, int k) const {
    const std::int64_t row = (std::int64_t(g) * G + gate) * p_.H + unit;
    return Operand::load(p_.weight_hh[static_cast<std::size_t>(row * p_.H + k)]);
  }
  std::size_t state_at(int g, int i, int u) const {
    return static_cast<std::size_t>((std::int64_t(g) * p_.B + i) * p_.H + u);
  }
  std::size_t pair_at(int g, std::int64_t n, int u) const {
    return static_cast<std::size_t>((g * N_ + n) * p_.H + u);
  }

  void forward(int g, int i) {
    const int H = p_.H;
    const bool reverse = g >= p_.reverse_from;
    Row h(static_cast<std::size_t>(H), 0.0), c = h;
    for (int u = 0; u < H && p_.states; ++u) {
      h[static_cast<std::size_t>(u)] = Operand::load(p_.h0[state_at(g, i, u)]);
      c[static_cast<std::size_t>(u)] = Operand::load(p_.c0[state_at(g, i, u)]);
    }
    for (int s = 0; s < p_.T; ++s) {
      const int t = reverse ? p_.T - 1 - s : s;
      if (!steps_.is_active(t, i)) continue;
      if (steps_.starts_fresh(t, i, reverse)) h.assign(h.size(), 0.0), c.assign(c.size(), 0.0);
      step(g, steps_.pair(t, i), h, c);
    }
    for (int u = 0; u < H; ++u) {
      out_.h_n[state_at(g, i, u)] = h[static_cast<std::size_t>(u)];
      out_.c_n[state_at(g, i, u)] = c[static_cast<std::size_t>(u)];
    }
  }

  void step(int g, std::int64_t n, Row& h, Row& c) {
    const Row before = h;
    for (int u = 0; u < p_.H; ++u) {
      Number x[G], a[G], previous[2], next[2], saved[Cell::saved];
      for (int m = 0; m < G; ++m) {
        double sum = 0;
        for (int k = 0; k < p_.H; ++k) sum += weight(g, m, u, k) * before[std::size_t(k)];
        const double in = p_.x_gates[static_cast<std::size_t>(((g * N_ + n) * G + m) * p_.H + u)];
        const double bias =
            p_.hidden_bias[static_cast<std::size_t>((std::int64_t(g) * G + m) * p_.H + u)];
        x[m] = Number(in);
        a[m] = Number(sum + (Cell::separate[m] ? bias : in));
      }
      const auto at = static_cast<std::size_t>(u);
      previous[0] = Number(before[at]), previous[1] = Number(c[at]);
      Cell::forward(p_.options, x, a, previous, next, saved);
      const std::size_t pair = pair_at(g, n, u);
      for (int k = 0; k < Cell::states; ++k) {
        previous_[pair * Cell::states + static_cast<std::size_t>(k)] = previous[k].v;
        next_[pair * Cell::states + static_cast<std::size_t>(k)] = next[k].v;
      }
      for (int k = 0; k < Cell::saved; ++k)
        saved_[pair * Cell::saved + static_cast<std::size_t>(k)] = saved[k].v;
      h[at] = out_.hidden[pair] = rounded<Operand>(static_cast<float>(next[0].v));
      if (Cell::states > 1) c[at] = next[1].v;
    }
  }

  void backward(int g, int i) {
    const int H = p_.H;
    const bool reverse = g >= p_.reverse_from;
    Row d_h(static_cast<std::size_t>(H), 0.0), d_c = d_h;
    for (int u = 0; u < H && p_.states; ++u) {
      d_h[static_cast<std::size_t>(u)] = Operand::load(p_.d_h_n[state_at(g, i, u)]);
      d_c[static_cast<std::size_t>(u)] = Operand::load(p_.d_c_n[state_at(g, i, u)]);
    }
    for (int s = p_.T - 1; s >= 0; --s) {
      const int t = reverse ? p_.T - 1 - s : s;
      if (!steps_.is_active(t, i)) continue;
      step_back(g, steps_.pair(t, i), d_h, d_c);
      if (steps_.starts_fresh(t, i, reverse)) d_h.assign(d_h.size(), 0.0), d_c = d_h;
    }
    for (int u = 0; u < H; ++u) {
      out_.d_h0[state_at(g, i, u)] = d_h[static_cast<std::size_t>(u)];
      out_.d_c0[state_at(g, i, u)] = d_c[static_cast<std::size_t>(u)];
    }
  }

  void step_back(int g, std::int64_t n, Row& d_h, Row& d_c) {
    const int H = p_.H;
    Row hidden(static_cast<std::size_t>(G * H), 0.0);
    for (int u = 0; u < H; ++u) {
      const std::size_t pair = pair_at(g, n, u), at = static_cast<std::size_t>(u);
      Number saved[Cell::saved], previous[2], next[2], d_next[2], d_previous[2];
      Number d_a[Cell::gradients];
      for (int k = 0; k < Cell::saved; ++k)
        saved[k] = Number(saved_[pair * Cell::saved + static_cast<std::size_t>(k)]);
      for (int k = 0; k < Cell::states; ++k) {
        previous[k] = Number(previous_[pair * Cell::states + static_cast<std::size_t>(k)]);
        next[k] = Number(next_[pair * Cell::states + static_cast<std::size_t>(k)]);
      }
      d_next[0] = Number(d_h[at] + Operand::load(p_.d_output[pair]));
      d_next[1] = Number(d_c[at]);
      Cell::backward(p_.options, saved, previous, next, d_next, d_previous, d_a);
      for (int k = 0; k < Cell::gradients; ++k)
        out_.d_gates[static_cast<std::size_t>(((g * N_ + n) * Cell::gradients + k) * H + u)] =
            d_a[k].v;
      for (int m = 0; m < G; ++m)
        hidden[static_cast<std::size_t>(m * H + u)] = d_a[Cell::hidden_gradient[m]].v;
      d_h[at] = d_previous[0].v;
      if (Cell::states > 1) d_c[at] = d_previous[1].v;
    }
    for (int m = 0; m < G; ++m)
      for (int u = 0; u < H; ++u)
        for (int k = 0; k < H; ++k)
          d_h[static_cast<std::size_t>(k)] +=
              hidden[static_cast<std::size_t>(m * H + u)] * weight(g, m, u, k);
  }

  const Trial<Cell, Operand>& p_;
  std::int64_t N_;
  StepTable steps_;
  Expected out_;
  std::vector<double> next_, previous_, saved_;
};

// Random lengths (sorted, zeros allowed) and resets.
template <class Cell, class Operand>
void choose_rows(Trial<Cell, Operand>& p, bool lengths, bool resets, unsigned seed) {
  std::mt19937 random(seed);
  if (lengths) {
    std::vector<int> length(static_cast<std::size_t>(p.B));
    for (int& l : length) l = static_cast<int>(random() % unsigned(p.T + 1));
    length[0] = p.T;
    std::int64_t before = 0;
    for (int t = 0; t < p.T; ++t) {
      std::int64_t n = 0;
      for (const int l : length) n += l > t;
      p.active.push_back(n);
      p.offset.push_back(before);
      before += n;
    }
  }
  if (resets) {
    p.fresh.resize(static_cast<std::size_t>(p.pairs()));
    for (auto& f : p.fresh) f = random() % 4 == 0;
  }
}

// The largest difference divided by the largest expected value; NaN if an active value is missing.
template <class T, class Load>
double difference(const std::vector<T>& got, const std::vector<double>& expected, Load load) {
  double most = 0, largest = 1e-3;
  for (std::size_t i = 0; i < got.size(); ++i) {
    if (std::isnan(expected[i])) continue;
    const double d = std::fabs(static_cast<double>(load(got[i])) - expected[i]);
    if (!(d <= most)) most = d;
    largest = std::fmax(largest, std::fabs(expected[i]));
  }
  return most / largest;
}

template <class Cell, class Operand>
StepTable table_of(const Trial<Cell, Operand>& p) {
  StepTable steps;
  steps.T = p.T, steps.B = p.B;
  if (!p.active.empty())
    steps.active = p.active.data(), steps.offset = steps.position = p.offset.data();
  if (!p.fresh.empty()) steps.fresh = p.fresh.data();
  return steps;
}

// The kernels' arrays, at the addresses of the trial's vectors.
inline constexpr auto in_place = [](const auto& v) { return v.data(); };

// The tolerance of a pass, relative to the largest value.
template <class Operand>
struct Precision;
template <>
struct Precision<BFloat16> {
  static constexpr double forward = 1e-2, backward = 3e-2;
};
template <>
struct Precision<Float16> {
  static constexpr double forward = 1.5e-3, backward = 4e-3;
};
template <>
struct Precision<Tf32> {
  static constexpr double forward = 2e-3, backward = 4e-3;
};
template <>
struct Precision<Float32> {
  static constexpr double forward = 3e-6, backward = 6e-6;
};

// Fails if results differ from the expected ones by more than that; returns the number of checks.
template <class Cell, class Operand>
long compare(const Trial<Cell, Operand>& p, const Expected& e, bool backward = true) {
  long checks = 0;
  const auto load = [](Storage<Operand> s) { return Operand::load(s); };
  const auto close = [&](const char* what, const auto& got, const auto& expected, double most) {
    ++checks;
    const double d = difference(got, expected, load);
    if (!(d <= most)) check::close(what, d, 0, 0);
  };
  const double forth = Precision<Operand>::forward, back = Precision<Operand>::backward;
  close("hidden", p.hidden, e.hidden, forth);
  close("h_n", p.h_n, e.h_n, forth);
  if (Cell::states > 1) close("c_n", p.c_n, e.c_n, forth);
  if (!backward) return checks;
  close("d_gates", p.d_gates, e.d_gates, back);
  close("d_h0", p.d_h0, e.d_h0, back);
  if (Cell::states > 1) close("d_c0", p.d_c0, e.d_c0, back);
  return checks;
}

}  // namespace fastrnn::persistent
