// The forward pass of a stack by plain loops in double: the reference of the engine's tests in C++.
// The gradients are its central differences (engine_test.cpp).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "case.h"

namespace fastrnn::cases {

using Values = std::vector<double>;

// The parameters of a group in the order of `weights`; kHr is empty without projection.
enum { kIh, kHh, kBiasIh, kBiasHh, kHr, kEach };

// A case with the arrays that forward reads; those that are not given are empty.
struct Inputs : Case {
  Values input, h0, c0, reset_h, reset_c;
  std::vector<Values> weights;  // kEach to a group
};

inline double sigmoid_of(double x) { return 1 / (1 + std::exp(-x)); }

inline double product(const Values& w, std::int64_t row, const double* x, std::int64_t n) {
  double sum = 0;
  for (std::int64_t k = 0; k < n; ++k) sum += w[size_of(row * n + k)] * x[k];
  return sum;
}

// One step of one row: h (O) and c (H) in place.
class PlainStep {
 public:
  PlainStep(const Inputs& c, std::int64_t group)
      : c_(c), maths_(c.options.maths), w_(&c.weights[size_of(group * kEach)]) {}

  void run(const double* x, std::int64_t inputs, double* h, double* state_c) const {
    const std::int64_t H = c_.H, O = c_.O();
    const Values before(h, h + O), before_c(state_c, state_c + H);
    const Values in = input_side(x, inputs);
    Values hidden = c_.options.cell == "RNN"    ? rnn(in, before)
                    : c_.options.cell == "LSTM" ? lstm(in, before, before_c, state_c)
                                                : gru(in, before);
    for (std::int64_t o = 0; o < O; ++o)
      h[o] = c_.options.proj_size ? product(w_[kHr], o, hidden.data(), H) : hidden[size_of(o)];
  }

 private:
  Values input_side(const double* x, std::int64_t inputs) const {
    Values sums;
    const std::int64_t rows = c_.G() * c_.H;
    for (std::int64_t r = 0; r < rows; ++r)
      sums.push_back(product(w_[kIh], r, x, inputs) + w_[kBiasIh][size_of(r)]);
    return sums;
  }
  // Gates first … last − 1.
  Values hidden_side(const Values& operand, std::int64_t first, std::int64_t last) const {
    Values sums;
    for (std::int64_t r = first * c_.H; r < last * c_.H; ++r)
      sums.push_back(product(w_[kHh], r, operand.data(), c_.O()) + w_[kBiasHh][size_of(r)]);
    return sums;
  }

  Values rnn(const Values& in, const Values& h) const {
    Values out = hidden_side(h, 0, 1);
    for (std::size_t u = 0; u < out.size(); ++u) out[u] = std::tanh(in[u] + out[u]);
    return out;
  }
  Values lstm(const Values& in, const Values& h, const Values& before_c, double* c) const {
    const std::size_t H = size_of(c_.H);
    Values a = hidden_side(h, 0, 4), out(H);
    for (std::size_t i = 0; i < a.size(); ++i) a[i] += in[i];
    for (std::size_t u = 0; u < H; ++u) {
      c[u] = sigmoid_of(a[H + u]) * before_c[u] + sigmoid_of(a[u]) * std::tanh(a[2 * H + u]);
      out[u] = sigmoid_of(a[3 * H + u]) * std::tanh(c[u]);
    }
    return out;
  }
  Values gru(const Values& in, const Values& h) const {
    const std::size_t H = size_of(c_.H);
    Values a = hidden_side(h, 0, maths_.reset_after ? 3 : 2), operand(h), out(H);
    for (std::size_t u = 0; u < H; ++u) operand[u] *= sigmoid_of(in[u] + a[u]);
    const Values n = maths_.reset_after ? Values() : hidden_side(operand, 2, 3);
    for (std::size_t u = 0; u < H; ++u) {
      const double r = sigmoid_of(in[u] + a[u]), z = sigmoid_of(in[H + u] + a[H + u]);
      const double sum = maths_.reset_after ? r * a[2 * H + u] : n[u];
      out[u] = (1 - z) * std::tanh(in[2 * H + u] + sum) + z * h[u];
    }
    return out;
  }

  const Inputs& c_;
  const CellOptions& maths_;
  const Values* w_;
};

struct Plain {
  Values output, h_n, c_n;
};

inline Plain plain_forward(const Inputs& c) {
  Plain r;
  Values layer_input = c.input;
  std::int64_t inputs = c.I;
  r.h_n = c.h0;
  r.c_n = c.c0;
  for (std::int64_t l = 0; l < c.L(); ++l) {
    Values out(size_of(c.pairs() * c.D() * c.O()), 0);
    for (std::int64_t d = 0; d < c.D(); ++d)
      for (std::int64_t b = 0; b < c.B; ++b) {
        const std::int64_t g = l * c.D() + d, n = c.length_of(b);
        double* h = &r.h_n[size_of((g * c.B + b) * c.O())];
        double* state_c = &r.c_n[size_of((g * c.B + b) * c.H)];
        for (std::int64_t s = 0; s < n; ++s) {
          const std::int64_t t = d ? n - 1 - s : s, boundary = d ? t + 1 : t;
          if (!c.reset.empty() && boundary < n && c.reset[size_of(boundary * c.B + b)]) {
            for (std::int64_t o = 0; o < c.O(); ++o)
              h[o] = c.reset_h.empty() ? 0 : c.reset_h[size_of(g * c.O() + o)];
            for (std::int64_t u = 0; u < c.H; ++u)
              state_c[u] = c.reset_c.empty() ? 0 : c.reset_c[size_of(g * c.H + u)];
          }
          const std::int64_t place = c.place_of(t, b);
          PlainStep(c, g).run(&layer_input[size_of(place * inputs)], inputs, h, state_c);
          std::copy_n(h, c.O(), &out[size_of((place * c.D() + d) * c.O())]);
        }
      }
    layer_input = out;
    inputs = c.D() * c.O();
  }
  r.output = layer_input;
  return r;
}

}  // namespace fastrnn::cases
