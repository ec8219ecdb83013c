// The forward pass of a stack by plain loops in double, every option included: what the engine's
// tests in C++ compare with. The gradients are its central differences (engine_test.cpp).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "case.h"

namespace fastrnn::cases {

using Values = std::vector<double>;

// The parameters of a group in the order of `weights`; those that a case does without are empty.
enum {
  kIh,
  kHh,
  kBiasIh,
  kBiasHh,
  kHr,
  kCi,
  kCf,
  kCo,
  kNormIh,
  kNormHh,
  kNormC,
  kNormCBias,
  kEach
};

// A case with the arrays that forward reads; those that are not given are empty.
struct Inputs : Case {
  Values input, h0, c0, reset_h, reset_c, dropout_mask;
  std::vector<unsigned char> zoneout_h_mask, zoneout_c_mask;
  std::vector<Values> weights;  // kEach to a group
};

inline double sigmoid_of(double x) { return 1 / (1 + std::exp(-x)); }

inline double product(const Values& w, std::int64_t row, const double* x, std::int64_t n) {
  double sum = 0;
  for (std::int64_t k = 0; k < n; ++k) sum += w[size_of(row * n + k)] * x[k];
  return sum;
}

// (x − mean) / √(variance + 1e-5) over all of them.
inline Values normalized(Values x) {
  double mean = 0, variance = 0;
  for (const double v : x) mean += v / static_cast<double>(x.size());
  for (const double v : x) variance += (v - mean) * (v - mean) / static_cast<double>(x.size());
  for (double& v : x) v = (v - mean) / std::sqrt(variance + 1e-5);
  return x;
}

// One step of one row: h (O) and c (H) in place.
class PlainStep {
 public:
  PlainStep(const Inputs& c, std::int64_t group, std::int64_t row, std::int64_t place)
      : c_(c),
        maths_(c.options.maths),
        w_(&c.weights[size_of(group * kEach)]),
        group_(group),
        row_(row),
        place_(place) {}

  void run(const double* x, std::int64_t inputs, double* h, double* state_c) const {
    const std::int64_t H = c_.H, O = c_.O();
    const Values before(h, h + O), before_c(state_c, state_c + H);
    Values seen(before);
    for (std::int64_t o = 0; o < O && !c_.dropout_mask.empty(); ++o)
      seen[size_of(o)] *= c_.dropout_mask[size_of((group_ * c_.B + row_) * O + o)];
    const Values in = input_side(x, inputs);
    Values hidden = c_.options.cell == "RNN"    ? rnn(in, seen)
                    : c_.options.cell == "LSTM" ? lstm(in, seen, before_c, state_c)
                                                : gru(in, seen, before);
    for (std::int64_t o = 0; o < O; ++o)
      h[o] = c_.options.proj_size ? product(w_[kHr], o, hidden.data(), H) : hidden[size_of(o)];
    zoneout(c_.zoneout_h_mask, maths_.zoneout_h, before, h);
    if (c_.has_c()) zoneout(c_.zoneout_c_mask, maths_.zoneout_c, before_c, state_c);
  }

 private:
  Values affine(Values sums, int gain, int bias, std::int64_t first) const {
    if (maths_.layer_norm) sums = normalized(sums);
    for (std::size_t i = 0; i < sums.size(); ++i) {
      const std::size_t r = size_of(first) + i;
      if (maths_.layer_norm) sums[i] *= w_[gain][r];
      sums[i] += w_[bias][r];
    }
    return sums;
  }
  Values input_side(const double* x, std::int64_t inputs) const {
    Values sums;
    const std::int64_t rows = c_.G() * c_.H;
    for (std::int64_t r = 0; r < rows; ++r) sums.push_back(product(w_[kIh], r, x, inputs));
    return affine(sums, kNormIh, kBiasIh, 0);
  }
  // Gates first … last − 1.
  Values hidden_side(const Values& operand, std::int64_t first, std::int64_t last) const {
    const std::int64_t G = c_.G(), heads = maths_.heads;
    const std::int64_t units = c_.H / heads, outputs = c_.O() / heads;
    Values sums;
    for (std::int64_t g = first; g < last; ++g)
      for (std::int64_t u = 0; u < c_.H; ++u) {
        const std::int64_t head = u / units, row = (head * G + g) * units + u % units;
        sums.push_back(product(w_[kHh], row, &operand[size_of(head * outputs)], outputs));
      }
    return affine(sums, kNormHh, kBiasHh, first * c_.H);
  }

  Values rnn(const Values& in, const Values& seen) const {
    Values out = hidden_side(seen, 0, 1);
    for (std::size_t u = 0; u < out.size(); ++u) out[u] = std::tanh(in[u] + out[u]);
    return out;
  }
  Values lstm(const Values& in, const Values& seen, const Values& before, double* c) const {
    const std::size_t H = size_of(c_.H);
    Values a = hidden_side(seen, 0, 4), out(H), next(H);
    for (std::size_t i = 0; i < a.size(); ++i) a[i] += in[i];
    for (std::size_t u = 0; u < H && maths_.peephole; ++u) {
      a[u] += w_[kCi][u] * before[u];
      a[H + u] += w_[kCf][u] * before[u];
    }
    for (std::size_t u = 0; u < H; ++u)
      next[u] = sigmoid_of(a[H + u]) * before[u] + sigmoid_of(a[u]) * std::tanh(a[2 * H + u]);
    Values shown = maths_.layer_norm ? normalized(next) : next;
    for (std::size_t u = 0; u < H; ++u) {
      if (maths_.layer_norm) shown[u] = w_[kNormC][u] * shown[u] + w_[kNormCBias][u];
      if (maths_.peephole) a[3 * H + u] += w_[kCo][u] * next[u];
      out[u] = sigmoid_of(a[3 * H + u]) * std::tanh(shown[u]);
      c[u] = next[u];
    }
    return out;
  }
  Values gru(const Values& in, const Values& seen, const Values& before) const {
    const std::size_t H = size_of(c_.H);
    Values a = hidden_side(seen, 0, maths_.reset_after ? 3 : 2), operand(seen), out(H);
    for (std::size_t u = 0; u < H; ++u) operand[u] *= sigmoid_of(in[u] + a[u]);
    const Values n = maths_.reset_after ? Values() : hidden_side(operand, 2, 3);
    for (std::size_t u = 0; u < H; ++u) {
      const double r = sigmoid_of(in[u] + a[u]), z = sigmoid_of(in[H + u] + a[H + u]);
      const double sum = maths_.reset_after ? r * a[2 * H + u] : n[u];
      out[u] = (1 - z) * std::tanh(in[2 * H + u] + sum) + z * before[u];
    }
    return out;
  }

  void zoneout(const std::vector<unsigned char>& mask, double share, const Values& before,
               double* next) const {
    const auto units = static_cast<std::int64_t>(before.size());
    for (std::int64_t u = 0; u < units; ++u) {
      const double old_value = before[size_of(u)];
      if (mask.empty())
        next[u] = share * old_value + (1 - share) * next[u];
      else if (mask[size_of((group_ * c_.pairs() + place_) * units + u)])
        next[u] = old_value;
    }
  }

  const Inputs& c_;
  const CellOptions& maths_;
  const Values* w_;
  const std::int64_t group_, row_, place_;
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
          PlainStep(c, g, b, place).run(&layer_input[size_of(place * inputs)], inputs, h, state_c);
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
