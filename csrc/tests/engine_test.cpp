// The engine through its Backend table, in double: forward against plain loops, backward against
// central differences of forward, over cells, directions, layers, projection, lengths, packed rows
// and resets; then the bits: on one thread and more, in ensembles, and with recompute.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "backend.h"
#include "check.h"
#include "instruction_set.h"
#include "reference.h"

namespace {

using namespace fastrnn;
using namespace fastrnn::cases;

// A case with every array that its passes read or write.
struct Call : Inputs {
  Call() { T = 5, B = 3, I = 3, H = 5; }

  Values hidden, output, h_n, c_n, cell, saved;
  Values d_output, d_h_n, d_c_n, d_input, d_h0, d_c0;
  std::vector<Values> d_weights;
};

struct Random {
  std::mt19937 engine;
  std::uniform_real_distribution<double> uniform{-0.8, 0.8};
  explicit Random(unsigned seed) : engine(seed) {}
  Values values(std::int64_t n) {
    Values v(size_of(n));
    for (double& x : v) x = uniform(engine);
    return v;
  }
};

void fill(Call& c, unsigned seed) {
  Random random(seed);
  const std::int64_t G = c.G(), groups = c.groups();
  c.input = random.values(c.pairs() * c.I);
  c.h0 = random.values(groups * c.B * c.O());
  c.c0 = random.values(groups * c.B * c.H);
  c.d_output = random.values(c.pairs() * c.D() * c.O());
  c.d_h_n = random.values(groups * c.B * c.O());
  c.d_c_n = random.values(groups * c.B * c.H);
  for (std::int64_t g = 0; g < groups; ++g) {
    const std::int64_t inputs = c.inputs(g);
    for (const std::int64_t n :
         {G * c.H * inputs, G * c.H * c.O(), G * c.H, G * c.H, c.options.proj_size * c.H})
      c.weights.push_back(random.values(n));
    // Sums of order one whatever the width: a chaotic recurrence would show rounding, not errors.
    for (const int which : {kHh, kHr})
      for (double& w : c.weights[size_of(g * kEach + which)])
        w *= std::min(1.0, 4.0 / std::sqrt(static_cast<double>(c.H)));
  }
}

Parameters parameters_of(std::vector<Values>& w, std::int64_t g, std::int64_t inputs,
                         const Call& c) {
  Values* at = &w[size_of(g * kEach)];
  Parameters p;
  p.weight_ih = {at[kIh].data(), inputs, 1};
  p.weight_hh = {at[kHh].data(), c.O(), 1};
  p.bias_ih = {at[kBiasIh].data(), 0, 1};
  p.bias_hh = {at[kBiasHh].data(), 0, 1};
  if (!at[kHr].empty()) p.weight_hr = {at[kHr].data(), c.H, 1};
  return p;
}

Problem problem_of(Call& c, std::vector<Parameters>& parameters) {
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
  for (std::int64_t g = 0; g < c.groups(); ++g)
    parameters.push_back(parameters_of(c.weights, g, c.inputs(g), c));
  p.parameters = parameters.data();
  if (!c.reset_h.empty()) p.reset_h = {c.reset_h.data(), c.O(), 0, 1};
  if (!c.reset_c.empty()) p.reset_c = {c.reset_c.data(), c.H, 0, 1};
  p.all_layers = true;
  const std::int64_t groups = c.groups();
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

Problem forward_problem(Call& c, std::vector<Parameters>& parameters, bool save) {
  Problem p = problem_of(c, parameters);
  c.output.assign(size_of(c.pairs() * c.D() * c.O()), -7);
  p.output = c.output.data();
  if (save && !c.options.recompute) {
    c.saved.assign(
        size_of(c.groups() * c.pairs() * cell_traits(c.options).saved_planes * padded(c.H)),
        std::nan(""));
    p.saved = c.saved.data();
  }
  return p;
}

void run_forward(Call& c, bool save) {
  std::vector<Parameters> parameters;
  Problem p = forward_problem(c, parameters, save);
  Workspace w;
  p.workspace = w.take(cpu_backend().workspace_size(p, Pass::forward));
  cpu_backend().forward(p);
  check::that("the end of forward's workspace", w.is_whole());
}

// With weights that were packed before the call.
void run_packed(Call& c) {
  std::vector<Parameters> parameters;
  Problem p = forward_problem(c, parameters, true);
  const Backend& backend = cpu_backend();
  Workspace packed;
  void* const weights = packed.take(backend.packed_size(p));
  backend.pack(p, weights);
  p.packed = weights;
  Workspace w;
  p.workspace = w.take(cpu_backend().workspace_size(p, Pass::forward));
  backend.forward(p);
}

Problem backward_problem(Call& c, std::vector<Parameters>& parameters,
                         std::vector<Parameters>& d_parameters) {
  const Values hidden = c.hidden, h_n = c.h_n, c_n = c.c_n, cell = c.cell;
  Problem p = problem_of(c, parameters);
  c.hidden = hidden, c.h_n = h_n, c.c_n = c_n, c.cell = cell;
  p.hidden = c.hidden.data(), p.h_n = c.h_n.data();
  if (c.has_c()) p.c_n = c.c_n.data(), p.cell = c.cell.data();
  p.saved = c.options.recompute ? nullptr : c.saved.data();
  p.consume_saved = c.consume;
  p.d_output = {c.d_output.data(), c.B * c.D() * c.O(), c.D() * c.O(), 1};
  p.d_h_n = {c.d_h_n.data(), c.B * c.O(), c.O(), 1};
  if (c.has_c()) p.d_c_n = {c.d_c_n.data(), c.B * c.H, c.H, 1};
  c.d_input.assign(c.input.size(), -7);
  c.d_h0.assign(c.h0.size(), -7);
  c.d_c0.assign(c.c0.size(), -7);
  c.d_weights = c.weights;
  for (std::int64_t g = 0; g < c.groups(); ++g)
    d_parameters.push_back(parameters_of(c.d_weights, g, c.inputs(g), c));
  p.d_input = c.d_input.data();
  p.d_h0 = c.d_h0.data();
  if (c.has_c()) p.d_c0 = c.d_c0.data();
  p.d_parameters = d_parameters.data();
  return p;
}

void run_backward(Call& c) {
  std::vector<Parameters> parameters, d_parameters;
  Problem p = backward_problem(c, parameters, d_parameters);
  Workspace w;
  p.workspace = w.take(cpu_backend().workspace_size(p, Pass::backward));
  cpu_backend().backward(p);
  check::that("the end of backward's workspace", w.is_whole());
}

// The states after a reset, of forward alone.
void fill_reset_states(Call& c, unsigned seed) {
  Random random(seed);
  c.reset_h = random.values(c.groups() * c.O());
  if (c.has_c()) c.reset_c = random.values(c.groups() * c.H);
}

// The members of an ensemble, in one run for each pass.
void run_together(std::vector<Call>& members) {
  for (const Pass pass : {Pass::forward, Pass::backward}) {
    std::vector<std::vector<Parameters>> parameters(members.size()), d_parameters(members.size());
    std::vector<Problem> problems;
    for (std::size_t i = 0; i < members.size(); ++i)
      problems.push_back(pass == Pass::forward
                             ? forward_problem(members[i], parameters[i], true)
                             : backward_problem(members[i], parameters[i], d_parameters[i]));
    const auto count = static_cast<std::int64_t>(members.size());
    const std::size_t bytes = cpu_backend().ensemble_workspace_size(problems.data(), count, pass);
    Workspace w;
    problems[0].workspace = w.take(bytes);
    cpu_backend().run_ensemble(problems.data(), count, pass);
  }
}

// ---- the checks -------------------------------------------------------------------------------

void all_close(const char* what, const Values& got, const Values& expected, double tolerance) {
  for (std::size_t i = 0; i < expected.size(); ++i, ++checks)
    check::close(what, got[i], expected[i], tolerance);
}

Values last_layer(const Call& c) {
  return {c.hidden.end() - static_cast<std::ptrdiff_t>(c.pairs() * c.D() * c.O()), c.hidden.end()};
}

void check_forward(Call& c) {
  const Plain plain = plain_forward(c);
  for (const bool save : {false, true}) {
    run_forward(c, save);
    all_close("output", last_layer(c), plain.output, 1e-12);
    all_close("output of its own", c.output, last_layer(c), 0);
    all_close("h_n", c.h_n, plain.h_n, 1e-12);
    if (c.has_c()) all_close("c_n", c.c_n, plain.c_n, 1e-12);
  }
}

double loss(const Call& c) {
  const Plain r = plain_forward(c);
  double sum = 0;
  for (std::size_t i = 0; i < r.output.size(); ++i) sum += r.output[i] * c.d_output[i];
  for (std::size_t i = 0; i < r.h_n.size(); ++i) sum += r.h_n[i] * c.d_h_n[i];
  if (c.has_c())
    for (std::size_t i = 0; i < r.c_n.size(); ++i) sum += r.c_n[i] * c.d_c_n[i];
  return sum;
}

// Central differences of some entries of `values`, against the engine's gradient.
void check_gradient(const char* what, Call& c, Values& values, const Values& gradient) {
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

void check_backward(Call& c) {
  run_forward(c, true);
  run_backward(c);
  check_gradient("d_input", c, c.input, c.d_input);
  check_gradient("d_h0", c, c.h0, c.d_h0);
  if (c.has_c()) check_gradient("d_c0", c, c.c0, c.d_c0);
  for (std::size_t w = 0; w < c.weights.size(); ++w)
    check_gradient("d_weight", c, c.weights[w], c.d_weights[w]);
}

void same(const char* what, const Values& a, const Values& b) {
  ++checks;
  check::that(what, a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(double)) == 0);
}

void same_results(const Call& c, const Call& other) {
  same("hidden", c.hidden, other.hidden);
  same("h_n", c.h_n, other.h_n);
  same("c_n", c.c_n, other.c_n);
  same("d_input", c.d_input, other.d_input);
  same("d_h0", c.d_h0, other.d_h0);
  if (c.has_c()) same("d_c0", c.d_c0, other.d_c0);
}

// The same bits in everything.
void same_everywhere(const char* where, const Call& c, const Call& other) {
  const std::string context = check::context();
  check::context() += where + std::to_string(other.threads) + " threads";
  same_results(c, other);
  for (std::size_t w = 0; w < c.d_weights.size(); ++w)
    same("d_weight", c.d_weights[w], other.d_weights[w]);
  check::context() = context;
}

// The same bits on one thread and on more, with directions, rows or units split.
void check_threads(Call c, int threads = 2) {
  c.threads = 1;
  run_forward(c, true);
  run_backward(c);
  Call other = c;
  other.threads = threads;
  run_forward(other, true);
  run_backward(other);
  same_everywhere(" on ", c, other);
}

// The same bits whether the weights are packed before the call, in it, or read in place.
void check_packed(Call c) {
  run_forward(c, true);
  Call other = c;
  run_packed(other);
  same("hidden of packed weights", c.hidden, other.hidden);
  same("output of packed weights", c.output, other.output);
  same("h_n of packed weights", c.h_n, other.h_n);
  same("c_n of packed weights", c.c_n, other.c_n);
  same("cell of packed weights", c.cell, other.cell);
}

// The same bits in an ensemble, on one thread and divided among several.
void check_ensemble(std::vector<Call> apart) {
  for (Call& c : apart) {
    run_forward(c, true);
    run_backward(c);
  }
  for (const int threads : {1, 2, 8}) {
    std::vector<Call> together = apart;
    for (Call& c : together) c.threads = threads;
    run_together(together);
    for (std::size_t i = 0; i < apart.size(); ++i)
      same_everywhere(" in an ensemble on ", apart[i], together[i]);
  }
}

std::vector<Call> members_like(const Call& like, unsigned seed) {
  std::vector<Call> members(5, like);
  for (Call& c : members) fill(c, ++seed);
  return members;
}

// The same bits whether or not the gates' gradients overwrite the gates.
void check_consumed(Call c) {
  run_forward(c, true);
  run_backward(c);
  Call other = c;
  other.consume = true;
  run_backward(other);
  same_results(c, other);
  for (std::size_t w = 0; w < c.d_weights.size(); ++w)
    same("d_weight of consumed gates", c.d_weights[w], other.d_weights[w]);
}

// Recomputed gates have the same bits; sums over the pairs are added in another order.
void check_recompute(Call c) {
  run_forward(c, true);
  run_backward(c);
  Call other = c;
  other.options.recompute = true;
  run_forward(other, true);
  run_backward(other);
  const std::string context = check::context();
  check::context() += " recomputed";
  same_results(c, other);
  for (std::size_t w = 0; w < c.d_weights.size(); ++w)
    all_close("d_weight", other.d_weights[w], c.d_weights[w], 1e-12);
  check::context() = context;
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

void name_case(const Call& c, const char* what) { check::context() = c.text() + " " + what; }

void rows(Call& c, int kind) {
  if (kind == 1) c.lengths = {4, 0, 5};
  if (kind == 2) c.batch_sizes = {3, 3, 2, 1, 1};
  if (kind == 3 || kind == 4) c.reset = {0, 1, 0, 0, 0, 1, 1, 0, 1, 0, 0, 0, 0, 1, 0};
  if (kind == 4) c.lengths = {5, 2, 3};
}

constexpr const char* kRows[] = {"padded", "lengths", "packed", "reset", "lengths and reset"};

void check_plain() {
  unsigned seed = 0;
  for (const Options& options : all_options())
    for (int kind = 0; kind < 5; ++kind) {
      Call c;
      c.options = options;
      rows(c, kind);
      name_case(c, kRows[kind]);
      check_ensemble(members_like(c, seed));
      fill(c, ++seed);
      check_forward(c);
      check_backward(c);
      check_consumed(c);
      check_recompute(c);
      check_packed(c);
      fill_reset_states(c, seed);
      name_case(c, "reset states");
      check_forward(c);
      check_packed(c);
    }
  for (Options options : all_options())  // few rows and steps: weights are read in place
    for (const std::int64_t H : {8, 20, 37})
      for (const std::int64_t T : {1, 3})
        for (const std::int64_t B : {1, 4}) {
          Call c;
          if (options.proj_size) options.proj_size = H - 3;
          c.options = options;
          c.T = T, c.B = B, c.I = 3 * H - 5, c.H = H;
          fill(c, ++seed);
          name_case(c, "few rows and steps");
          check_forward(c);
          check_packed(c);
        }
  for (const Options& options : all_options()) {
    Call wide;  // enough work for a team, few rows: units are split, with barriers
    wide.options = options;
    if (options.proj_size) wide.options.proj_size = 150;
    name_case(wide, "few rows");
    wide.T = 3, wide.B = 2, wide.I = 40, wide.H = 400;
    fill(wide, ++seed);
    check_forward(wide);
    check_packed(wide);
    check_threads(wide);
    Call like = wide;  // enough work to be divided among threads
    like.weights.clear();
    check_ensemble(members_like(like, seed));
    Call tall;  // many rows of different lengths: rows are dealt
    tall.options = options;
    name_case(tall, "many rows");
    tall.T = 6, tall.B = 40, tall.I = 20, tall.H = 70;
    for (std::int64_t b = 0; b < tall.B; ++b) tall.lengths.push_back(b * 7 % 7);
    fill(tall, ++seed);
    check_forward(tall);
    check_threads(tall);
  }
}

// Enough steps for several parts, with rows that end or are reset anywhere in them.
void check_parts() {
  unsigned seed = 2000;
  for (const Options& options : all_options())
    for (const bool packed : {false, true}) {
      Call c;
      c.options = options;
      c.T = 70, c.B = 30, c.I = 4, c.H = 6;
      std::mt19937 random(++seed);
      for (std::int64_t b = 0; b < c.B && !packed; ++b)
        c.lengths.push_back(b == 3 ? c.T : static_cast<std::int64_t>(random()) % (c.T + 1));
      for (std::int64_t t = 0; t < c.T && packed; ++t) c.batch_sizes.push_back(c.B - t * 2 / 5);
      for (std::int64_t i = 0; i < c.T * c.B && !packed; ++i) c.reset.push_back(random() % 11 == 0);
      fill(c, seed);
      name_case(c, packed ? "parts of packed rows" : "parts");
      check_recompute(c);
      c.options.recompute = true;
      check_threads(c);
      if (options.layers > 1) check_ensemble({c, c, c});
    }
}

// Enough steps for several solo phases of a team.
void check_solo_phases() {
  unsigned seed = 4000;
  for (Options options : all_options()) {
    Call c;
    if (options.proj_size) options.proj_size = 50;
    c.options = options;
    c.T = 150, c.B = 2, c.I = 20, c.H = 300;
    fill(c, ++seed);
    name_case(c, "solo phases");
    for (const int threads : {2, 3}) check_threads(c, threads);
  }
}

}  // namespace

// Without an argument all checks; `solo`: those for a build in which every wait is long.
int main(int count, char** arguments) {
  if (!check::runs_here("engine_test")) return check::kSkipped;
  if (count > 1 && std::string(arguments[1]) == "solo") {
    check_solo_phases();
  } else {
    check_plain();
    check_parts();
  }
  return check::result("engine_test", checks);
}
