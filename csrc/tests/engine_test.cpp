// The engine through its Backend table, in double: forward against plain loops, backward against
// central differences of forward, over cells, directions, layers, projection, lengths, packed rows
// and resets; then the bits: twice, in any batch, on one thread and two.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "backend.h"
#include "check.h"
#include "cpu/isa.h"

namespace {

using namespace fastrnn;
using Values = std::vector<double>;

long checks = 0;

std::size_t size_of(std::int64_t n) { return static_cast<std::size_t>(n); }

// One case: the sizes, and every array that a call reads or writes.
struct Case {
  Options options;
  std::int64_t T = 5, B = 3, I = 3, H = 5;
  int threads = 1;
  std::vector<std::int64_t> lengths, batch_sizes;
  std::vector<unsigned char> reset;

  Values input, h0, c0, hidden, h_n, c_n, cell, gates;
  std::vector<Values> weights;
  Values d_output, d_h_n, d_c_n, d_input, d_h0, d_c0;
  std::vector<Values> d_weights;

  std::int64_t D() const { return options.directions; }
  std::int64_t L() const { return options.layers; }
  std::int64_t O() const { return options.proj_size ? options.proj_size : H; }
  std::int64_t pairs() const {
    if (batch_sizes.empty()) return T * B;
    std::int64_t n = 0;
    for (const std::int64_t b : batch_sizes) n += b;
    return n;
  }
  bool has_c() const { return cell_traits(options).states > 1; }
};

void fill(Case& c, unsigned seed) {
  std::mt19937 random(seed);
  std::uniform_real_distribution<double> uniform(-0.8, 0.8);
  const auto some = [&](std::int64_t n) {
    Values v(size_of(n));
    for (double& x : v) x = uniform(random);
    return v;
  };
  const std::int64_t G = cell_traits(c.options).gates, groups = c.L() * c.D();
  c.input = some(c.pairs() * c.I);
  c.h0 = some(groups * c.B * c.O());
  c.c0 = some(groups * c.B * c.H);
  c.d_output = some(c.pairs() * c.D() * c.O());
  c.d_h_n = some(groups * c.B * c.O());
  c.d_c_n = some(groups * c.B * c.H);
  for (std::int64_t g = 0; g < groups; ++g) {
    const std::int64_t inputs = g < c.D() ? c.I : c.D() * c.O();
    for (const std::int64_t n :
         {G * c.H * inputs, G * c.H * c.O(), G * c.H, G * c.H, c.options.proj_size * c.H})
      c.weights.push_back(some(n));
    // Sums of order one whatever the width: a chaotic recurrence would show rounding, not errors.
    for (double& w : c.weights[c.weights.size() - 4])
      w *= std::min(1.0, 4.0 / std::sqrt(static_cast<double>(c.H)));
    for (double& w : c.weights.back())
      w *= std::min(1.0, 4.0 / std::sqrt(static_cast<double>(c.H)));
  }
}

Parameters parameters_of(std::vector<Values>& w, std::int64_t g, std::int64_t inputs,
                         std::int64_t O, std::int64_t H) {
  Values* at = &w[size_of(g * 5)];
  Parameters p;
  p.weight_ih = {at[0].data(), inputs, 1};
  p.weight_hh = {at[1].data(), O, 1};
  p.bias_ih = {at[2].data(), 0, 1};
  p.bias_hh = {at[3].data(), 0, 1};
  if (!at[4].empty()) p.weight_hr = {at[4].data(), H, 1};
  return p;
}

Problem problem_of(Case& c, std::vector<Parameters>& parameters) {
  Problem p;
  p.options = c.options;
  p.dtype = DType::f64;
  p.T = c.T;
  p.B = c.B;
  p.I = c.I;
  p.H = c.H;
  p.threads = c.threads;
  if (!c.batch_sizes.empty()) p.batch_sizes = c.batch_sizes.data();
  if (!c.lengths.empty()) p.lengths = c.lengths.data();
  if (!c.reset.empty()) p.reset = reinterpret_cast<const bool*>(c.reset.data());
  p.reset_step = c.B;
  p.reset_row = 1;
  p.input = {c.input.data(), c.B * c.I, c.I, 1};
  p.h0 = {c.h0.data(), c.B * c.O(), c.O(), 1};
  if (c.has_c()) p.c0 = {c.c0.data(), c.B * c.H, c.H, 1};
  for (std::int64_t g = 0; g < c.L() * c.D(); ++g)
    parameters.push_back(parameters_of(c.weights, g, g < c.D() ? c.I : c.D() * c.O(), c.O(), c.H));
  p.parameters = parameters.data();
  p.all_layers = true;
  const std::int64_t groups = c.L() * c.D();
  c.hidden.assign(size_of(c.L() * c.pairs() * c.D() * c.O()), -7);
  c.h_n.assign(size_of(groups * c.B * c.O()), -7);
  c.c_n.assign(size_of(groups * c.B * c.H), -7);
  c.cell.assign(size_of(c.L() * c.pairs() * c.D() * c.H), -7);
  p.hidden = c.hidden.data();
  p.h_n = c.h_n.data();
  if (c.has_c()) {
    p.c_n = c.c_n.data();
    p.cell = c.cell.data();
  }
  return p;
}

// The workspace starts as NaN: what reads it before writing shows.
struct Workspace {
  Values memory;
  void* take(const Problem& p, Pass pass) {
    memory.assign(cpu_backend().workspace_size(p, pass) / sizeof(double) + 8, std::nan(""));
    const auto at = reinterpret_cast<std::uintptr_t>(memory.data());
    return reinterpret_cast<void*>((at + 63) / 64 * 64);
  }
};

Problem forward_problem(Case& c, std::vector<Parameters>& parameters, bool save) {
  Problem p = problem_of(c, parameters);
  if (save) {
    c.gates.assign(
        size_of(c.L() * c.D() * c.pairs() * cell_traits(c.options).saved_planes * padded(c.H)),
        std::nan(""));
    p.gates = c.gates.data();
  }
  return p;
}

void run_forward(Case& c, bool save) {
  std::vector<Parameters> parameters;
  Problem p = forward_problem(c, parameters, save);
  Workspace w;
  p.workspace = w.take(p, Pass::forward);
  cpu_backend().forward(p);
}

Problem backward_problem(Case& c, std::vector<Parameters>& parameters,
                         std::vector<Parameters>& d_parameters) {
  const Values hidden = c.hidden, h_n = c.h_n, c_n = c.c_n, cell = c.cell;
  Problem p = problem_of(c, parameters);
  c.hidden = hidden, c.h_n = h_n, c.c_n = c_n, c.cell = cell;
  p.hidden = c.hidden.data(), p.h_n = c.h_n.data();
  if (c.has_c()) p.c_n = c.c_n.data(), p.cell = c.cell.data();
  p.gates = c.gates.data();
  p.d_output = {c.d_output.data(), c.B * c.D() * c.O(), c.D() * c.O(), 1};
  p.d_h_n = {c.d_h_n.data(), c.B * c.O(), c.O(), 1};
  if (c.has_c()) p.d_c_n = {c.d_c_n.data(), c.B * c.H, c.H, 1};
  c.d_input.assign(c.input.size(), -7);
  c.d_h0.assign(c.h0.size(), -7);
  c.d_c0.assign(c.c0.size(), -7);
  c.d_weights = c.weights;
  for (std::int64_t g = 0; g < c.L() * c.D(); ++g)
    d_parameters.push_back(
        parameters_of(c.d_weights, g, g < c.D() ? c.I : c.D() * c.O(), c.O(), c.H));
  p.d_input = c.d_input.data();
  p.d_h0 = c.d_h0.data();
  if (c.has_c()) p.d_c0 = c.d_c0.data();
  p.d_parameters = d_parameters.data();
  return p;
}

void run_backward(Case& c) {
  std::vector<Parameters> parameters, d_parameters;
  Problem p = backward_problem(c, parameters, d_parameters);
  Workspace w;
  p.workspace = w.take(p, Pass::backward);
  cpu_backend().backward(p);
}

// The members of an ensemble, in one run for each pass.
void run_together(std::vector<Case>& members) {
  for (const Pass pass : {Pass::forward, Pass::backward}) {
    std::vector<std::vector<Parameters>> parameters(members.size()), d_parameters(members.size());
    std::vector<Problem> problems;
    for (std::size_t i = 0; i < members.size(); ++i)
      problems.push_back(pass == Pass::forward
                             ? forward_problem(members[i], parameters[i], true)
                             : backward_problem(members[i], parameters[i], d_parameters[i]));
    const auto count = static_cast<std::int64_t>(members.size());
    const std::size_t bytes = cpu_backend().ensemble_workspace_size(problems.data(), count, pass);
    Values memory(bytes / sizeof(double) + 8, std::nan(""));
    const auto at = reinterpret_cast<std::uintptr_t>(memory.data());
    problems[0].workspace = reinterpret_cast<void*>((at + 63) / 64 * 64);
    cpu_backend().run_ensemble(problems.data(), count, pass);
  }
}

// ---- plain loops ------------------------------------------------------------------------------

double sigmoid_of(double x) { return 1 / (1 + std::exp(-x)); }

double product(const Values& w, std::int64_t row, const double* x, std::int64_t n) {
  double sum = 0;
  for (std::int64_t k = 0; k < n; ++k) sum += w[size_of(row * n + k)] * x[k];
  return sum;
}

// One step of one row: h (O) and c (H) in place.
void plain_step(const Case& c, const Values* w, const double* x, std::int64_t inputs, double* h,
                double* state_c) {
  const std::int64_t H = c.H, O = c.O();
  const Values before(h, h + O);
  const auto in = [&](std::int64_t r) { return product(w[0], r, x, inputs) + w[2][size_of(r)]; };
  const auto rec = [&](std::int64_t r, const double* operand) {
    return product(w[1], r, operand, O) + w[3][size_of(r)];
  };
  Values hidden(size_of(H)), operand(before);
  if (c.options.cell == "GRU" && !c.options.maths.reset_after)
    for (std::int64_t u = 0; u < H; ++u)
      operand[size_of(u)] *= sigmoid_of(in(u) + rec(u, before.data()));
  for (std::int64_t u = 0; u < H; ++u) {
    double& out = hidden[size_of(u)];
    if (c.options.cell == "RNN") {
      out = std::tanh(in(u) + rec(u, before.data()));
    } else if (c.options.cell == "LSTM") {
      double a[4];
      for (int g = 0; g < 4; ++g) a[g] = in(g * H + u) + rec(g * H + u, before.data());
      state_c[u] = sigmoid_of(a[1]) * state_c[u] + sigmoid_of(a[0]) * std::tanh(a[2]);
      out = sigmoid_of(a[3]) * std::tanh(state_c[u]);
    } else {
      const double r = sigmoid_of(in(u) + rec(u, before.data()));
      const double z = sigmoid_of(in(H + u) + rec(H + u, before.data()));
      const double n = c.options.maths.reset_after
                           ? std::tanh(in(2 * H + u) + r * rec(2 * H + u, before.data()))
                           : std::tanh(in(2 * H + u) + rec(2 * H + u, operand.data()));
      out = (1 - z) * n + z * before[size_of(u)];
    }
  }
  for (std::int64_t o = 0; o < O; ++o)
    h[o] = c.options.proj_size ? product(w[4], o, hidden.data(), H) : hidden[size_of(o)];
}

std::int64_t length_of(const Case& c, std::int64_t b) {
  if (!c.lengths.empty()) return c.lengths[size_of(b)];
  if (c.batch_sizes.empty()) return c.T;
  std::int64_t t = 0;
  while (t < c.T && c.batch_sizes[size_of(t)] > b) ++t;
  return t;
}

std::int64_t place_of(const Case& c, std::int64_t t, std::int64_t b) {
  if (c.batch_sizes.empty()) return t * c.B + b;
  std::int64_t n = b;
  for (std::int64_t s = 0; s < t; ++s) n += c.batch_sizes[size_of(s)];
  return n;
}

struct Plain {
  Values output, h_n, c_n;
};

Plain plain_forward(const Case& c) {
  Plain r;
  Values layer_input = c.input;
  std::int64_t inputs = c.I;
  r.h_n = c.h0;
  r.c_n = c.c0;
  for (std::int64_t l = 0; l < c.L(); ++l) {
    Values out(size_of(c.pairs() * c.D() * c.O()), 0);
    for (std::int64_t d = 0; d < c.D(); ++d)
      for (std::int64_t b = 0; b < c.B; ++b) {
        const std::int64_t g = l * c.D() + d, n = length_of(c, b);
        double* h = &r.h_n[size_of((g * c.B + b) * c.O())];
        double* state_c = &r.c_n[size_of((g * c.B + b) * c.H)];
        for (std::int64_t s = 0; s < n; ++s) {
          const std::int64_t t = d ? n - 1 - s : s, boundary = d ? t + 1 : t;
          if (!c.reset.empty() && boundary < n && c.reset[size_of(boundary * c.B + b)]) {
            std::fill_n(h, c.O(), 0);
            std::fill_n(state_c, c.H, 0);
          }
          const std::int64_t place = place_of(c, t, b);
          plain_step(c, &c.weights[size_of(g * 5)], &layer_input[size_of(place * inputs)], inputs,
                     h, state_c);
          std::copy_n(h, c.O(), &out[size_of((place * c.D() + d) * c.O())]);
        }
      }
    layer_input = out;
    inputs = c.D() * c.O();
  }
  r.output = layer_input;
  return r;
}

// ---- the checks -------------------------------------------------------------------------------

void all_close(const char* what, const Values& got, const Values& expected, double tolerance) {
  for (std::size_t i = 0; i < expected.size(); ++i, ++checks)
    check::close(what, got[i], expected[i], tolerance);
}

Values last_layer(const Case& c) {
  return {c.hidden.end() - static_cast<std::ptrdiff_t>(c.pairs() * c.D() * c.O()), c.hidden.end()};
}

void check_forward(Case& c) {
  const Plain plain = plain_forward(c);
  for (const bool save : {false, true}) {
    run_forward(c, save);
    all_close("output", last_layer(c), plain.output, 1e-12);
    all_close("h_n", c.h_n, plain.h_n, 1e-12);
    if (c.has_c()) all_close("c_n", c.c_n, plain.c_n, 1e-12);
  }
}

double loss(const Case& c) {
  const Plain r = plain_forward(c);
  double sum = 0;
  for (std::size_t i = 0; i < r.output.size(); ++i) sum += r.output[i] * c.d_output[i];
  for (std::size_t i = 0; i < r.h_n.size(); ++i) sum += r.h_n[i] * c.d_h_n[i];
  if (c.has_c())
    for (std::size_t i = 0; i < r.c_n.size(); ++i) sum += r.c_n[i] * c.d_c_n[i];
  return sum;
}

// A few entries of `values` moved either way, against the engine's gradient.
void check_gradient(const char* what, Case& c, Values& values, const Values& gradient) {
  const std::size_t stride = values.size() / 7 + 1;
  for (std::size_t i = 0; i < values.size(); i += stride, ++checks) {
    const double at = values[i], h = 1e-6;
    values[i] = at + h;
    const double above = loss(c);
    values[i] = at - h;
    const double below = loss(c);
    values[i] = at;
    check::close(what, gradient[i], (above - below) / (2 * h), 2e-8);
  }
}

void check_backward(Case& c) {
  run_forward(c, true);
  run_backward(c);
  check_gradient("d_input", c, c.input, c.d_input);
  check_gradient("d_h0", c, c.h0, c.d_h0);
  if (c.has_c()) check_gradient("d_c0", c, c.c0, c.d_c0);
  for (std::size_t w = 0; w < c.weights.size(); ++w)
    check_gradient("d_weight", c, c.weights[w], c.d_weights[w]);
}

void check_bits(const std::string& where, const Case& a, const Case& b) {
  const auto same = [&](const char* what, const Values& x, const Values& y) {
    ++checks;
    check::that((what + (" " + where)).c_str(),
                x.empty() || std::memcmp(x.data(), y.data(), x.size() * sizeof(double)) == 0);
  };
  same("hidden", a.hidden, b.hidden);
  same("h_n", a.h_n, b.h_n);
  same("d_input", a.d_input, b.d_input);
  same("d_h0", a.d_h0, b.d_h0);
  for (std::size_t w = 0; w < a.d_weights.size(); ++w)
    same("d_weight", a.d_weights[w], b.d_weights[w]);
}

// The same bits on one thread and on two, directions, rows or units being split.
void check_threads(Case c) {
  c.threads = 1;
  run_forward(c, true);
  run_backward(c);
  Case other = c;
  other.threads = 2;
  run_forward(other, true);
  run_backward(other);
  check_bits("on two threads", c, other);
}

// The same bits in an ensemble, on one thread and shared out over several.
void check_ensemble(const Case& like, unsigned seed) {
  std::vector<Case> apart(5, like);
  for (Case& c : apart) {
    fill(c, ++seed);
    run_forward(c, true);
    run_backward(c);
  }
  for (const int threads : {1, 2, 8}) {
    std::vector<Case> together = apart;
    for (Case& c : together) c.threads = threads;
    run_together(together);
    for (std::size_t i = 0; i < apart.size(); ++i)
      check_bits("in an ensemble on " + std::to_string(threads) + " threads", apart[i],
                 together[i]);
  }
}

std::vector<Options> all_options() {
  std::vector<Options> all;
  for (const char* cell : {"RNN", "LSTM", "GRU"})
    for (std::int64_t directions : {1, 2})
      for (std::int64_t layers : {1, 2}) {
        Options o;
        o.cell = cell;
        o.directions = directions;
        o.layers = layers;
        all.push_back(o);
        if (o.cell == "LSTM") o.proj_size = 2, all.push_back(o);
        if (o.cell == "GRU") o.maths.reset_after = false, all.push_back(o);
      }
  return all;
}

void name_case(const Case& c, const char* rows) {
  const Options& o = c.options;
  check::context() = o.cell + " layers " + std::to_string(o.layers) + " directions " +
                     std::to_string(o.directions) + " proj_size " + std::to_string(o.proj_size) +
                     (o.maths.reset_after ? " " : " reset before ") + rows;
}

void rows(Case& c, int kind) {
  if (kind == 1) c.lengths = {4, 0, 5};
  if (kind == 2) c.batch_sizes = {3, 3, 2, 1, 1};
  if (kind == 3 || kind == 4) c.reset = {0, 1, 0, 0, 0, 1, 1, 0, 1, 0, 0, 0, 0, 1, 0};
  if (kind == 4) c.lengths = {5, 2, 3};
}

}  // namespace

int main() {
  try {
    std::printf("instruction set: %s\n", cpu_isa());
  } catch (const std::exception& e) {
    std::printf("engine_test: skipped, %s\n", e.what());
    return check::kSkipped;
  }
  unsigned seed = 0;
  for (const Options& options : all_options())
    for (int kind = 0; kind < 5; ++kind) {
      Case c;
      c.options = options;
      rows(c, kind);
      static constexpr const char* names[] = {"padded", "lengths", "packed", "reset",
                                              "lengths and reset"};
      name_case(c, names[kind]);
      check_ensemble(c, seed);
      fill(c, ++seed);
      check_forward(c);
      check_backward(c);
    }
  for (const Options& options : all_options()) {
    Case wide;  // enough work for a team, few rows: units are split, with barriers
    wide.options = options;
    if (options.proj_size) wide.options.proj_size = 150;
    name_case(wide, "few rows");
    wide.T = 3, wide.B = 2, wide.I = 40, wide.H = 400;
    fill(wide, ++seed);
    check_forward(wide);
    check_threads(wide);
    Case members = wide;  // enough work to be shared out
    members.weights.clear();
    check_ensemble(members, seed);
    Case tall;  // many rows of different lengths: rows are dealt
    tall.options = options;
    name_case(tall, "many rows");
    tall.T = 6, tall.B = 40, tall.I = 20, tall.H = 70;
    for (std::int64_t b = 0; b < tall.B; ++b) tall.lengths.push_back(b * 7 % 7);
    fill(tall, ++seed);
    check_forward(tall);
    check_threads(tall);
  }
  return check::result("engine_test", checks);
}
