// Sequences with int8 products through the Backend table: close to the same in float; the same bits
// as one step after the other, each row and direction alone, from and to any states; the same bits
// on one thread and on three, and with strided input. Every array that is written has a border that
// must not change, and packed weights unpack to what they were packed from.
#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "backend.h"
#include "case.h"
#include "check.h"
#include "instruction_set.h"
#include "quantize.h"

namespace {

using namespace fastrnn;
using namespace fastrnn::cases;

constexpr float kUntouched = -7.5f;
constexpr std::int64_t kBorder = 40;

struct Written {
  std::vector<float> memory;
  std::int64_t count = 0;
  float* of(std::int64_t n) {
    count = n;
    memory.assign(size_of(n + 2 * kBorder), kUntouched);
    return memory.data() + kBorder;
  }
  const float* begin() const { return memory.data() + kBorder; }
  void check_border() const {
    for (std::int64_t i = 0; i < kBorder; ++i)
      check::that("border", memory[size_of(i)] == kUntouched &&
                                memory[size_of(count + kBorder + i)] == kUntouched);
  }
};

// The matrices of one layer and direction as int8.
struct Quantised {
  std::vector<std::int8_t> q[3];
  std::vector<float> scale[3];
};

// A case with the arrays that it reads.
struct Sequences : Case {
  std::vector<std::vector<float>> weights;  // five to a layer and direction
  std::vector<float> input, h0, c0;
};

void fill(Sequences& c, unsigned seed) {
  std::mt19937 random(seed);
  const auto some = [&](std::int64_t n, double size) {
    std::uniform_real_distribution<float> uniform(static_cast<float>(-size),
                                                  static_cast<float>(size));
    std::vector<float> v(size_of(n));
    for (float& x : v) x = uniform(random);
    return v;
  };
  const std::int64_t G = c.G();
  const double bound = 1 / std::sqrt(static_cast<double>(c.H));
  c.input = some(c.pairs() * c.I, 1);
  c.h0 = some(c.groups() * c.B * c.O(), 1);
  c.c0 = some(c.groups() * c.B * c.H, 1);
  for (std::int64_t g = 0; g < c.groups(); ++g)
    for (const std::int64_t n :
         {G * c.H * c.inputs(g), G * c.H * c.O(), G * c.H, G * c.H, c.P() * c.H})
      c.weights.push_back(some(n, bound));
}

// The weights of a case as a Problem's parameters, float or int8.
struct Weights {
  std::vector<Parameters> parameters;
  std::vector<Quantised> quantised;

  Weights(Sequences& c, bool int8) : quantised(size_of(c.groups())) {
    for (std::int64_t g = 0; g < c.groups(); ++g) {
      std::vector<float>* w = &c.weights[size_of(5 * g)];
      Parameters p;
      p.weight_ih = {w[0].data(), c.inputs(g), 1};
      p.weight_hh = {w[1].data(), c.O(), 1};
      if (c.biases) p.bias_ih = {w[2].data(), 0, 1};
      if (c.biases) p.bias_hh = {w[3].data(), 0, 1};
      if (c.P()) p.weight_hr = {w[4].data(), c.H, 1};
      const std::int64_t rows[] = {c.G() * c.H, c.G() * c.H, c.P()},
                         columns[] = {c.inputs(g), c.O(), c.H};
      Weight* const matrices[] = {&p.weight_ih, &p.weight_hh, &p.weight_hr};
      for (int m = 0; int8 && m < 3; ++m) {
        Quantised& to = quantised[size_of(g)];
        to.q[m].resize(size_of(rows[m] * columns[m]));
        to.scale[m].resize(size_of(rows[m]));
        if (rows[m] == 0) continue;
        quantize_rows(*matrices[m], rows[m], columns[m], to.q[m].data(), to.scale[m].data());
        *matrices[m] = {to.q[m].data(), columns[m], 1, 0, to.scale[m].data()};
      }
      parameters.push_back(p);
    }
  }
};

void check_unpacking(Sequences& c, Problem p, const void* packed, const Weights& weights) {
  Weights again(c, true);
  std::vector<std::vector<float>> biases;
  for (Quantised& each : again.quantised)
    for (int m = 0; m < 3; ++m) {
      std::fill(each.q[m].begin(), each.q[m].end(), std::int8_t{99});
      std::fill(each.scale[m].begin(), each.scale[m].end(), kUntouched);
    }
  const std::vector<std::vector<float>> before = c.weights;
  p.parameters = again.parameters.data();
  p.packed = packed;
  for (std::int64_t i = 0; i < c.groups() && c.biases; ++i)
    for (int bias : {2, 3}) {
      auto& values = c.weights[size_of(5 * i + bias)];
      std::fill(values.begin(), values.end(), kUntouched);
    }
  cpu_backend().unpack(p);
  bool equal = c.weights == before;
  for (std::size_t i = 0; i < again.quantised.size(); ++i)
    for (int m = 0; m < 3; ++m)
      equal = equal && again.quantised[i].q[m] == weights.quantised[i].q[m] &&
              again.quantised[i].scale[m] == weights.quantised[i].scale[m];
  check::that("unpacked", equal);
  ++checks;
}

struct Results {
  Written hidden, h_n, c_n;
};

Results run(Sequences& c, bool int8, int threads, std::int64_t unit) {
  const std::int64_t groups = c.groups(), O = c.O();
  const Weights weights(c, int8);
  std::vector<float> input(size_of(c.pairs() * c.I * unit), std::nanf(""));
  for (std::int64_t i = 0; i < c.pairs() * c.I; ++i) input[size_of(i * unit)] = c.input[size_of(i)];
  Results r;
  Problem p;
  p.options = c.options;
  p.options.int8 = int8;
  p.T = c.T;
  p.B = c.B;
  p.I = c.I;
  p.H = c.H;
  p.threads = threads;
  p.input = {input.data(), c.B * c.I * unit, c.I * unit, unit};
  if (!c.lengths.empty()) p.lengths = c.lengths.data();
  if (!c.batch_sizes.empty()) p.batch_sizes = c.batch_sizes.data();
  if (!c.reset.empty()) p.reset = reinterpret_cast<const bool*>(c.reset.data());
  p.reset_step = c.B;
  p.reset_row = 1;
  if (c.states) p.h0 = {c.h0.data(), c.B * O, O, 1};
  p.hidden = r.hidden.of(c.pairs() * c.D() * O);
  p.h_n = r.h_n.of(groups * c.B * O);
  if (c.has_c()) {
    if (c.states) p.c0 = {c.c0.data(), c.B * c.H, c.H, 1};
    p.c_n = r.c_n.of(groups * c.B * c.H);
  }
  Workspace packed, workspace;
  p.parameters = weights.parameters.data();
  void* const to = packed.take(cpu_backend().packed_size(p));
  cpu_backend().pack(p, to);
  check::that("the end of the packed weights", packed.is_whole());
  if (int8) check_unpacking(c, p, to, weights);
  p.packed = to;
  p.parameters = nullptr;
  p.workspace = workspace.take(cpu_backend().workspace_size(p, Pass::forward));
  cpu_backend().forward(p);
  for (const Written* w : {&r.hidden, &r.h_n, &r.c_n})
    if (w->count) w->check_border();
  check::that("the end of the workspace", workspace.is_whole());
  return r;
}

void close(const char* what, const Written& a, const Written& b) {
  for (std::int64_t i = 0; i < a.count; ++i, ++checks)
    check::close(what, static_cast<double>(a.begin()[i]), static_cast<double>(b.begin()[i]), 0.05);
}

void same(const char* what, const float* a, const float* b, std::int64_t count) {
  ++checks;
  check::that(what, count == 0 || std::memcmp(a, b, size_of(count) * sizeof(float)) == 0);
}

void same(const char* what, const Results& a, const Results& b) {
  same(what, a.hidden.begin(), b.hidden.begin(), a.hidden.count);
  same(what, a.h_n.begin(), b.h_n.begin(), a.h_n.count);
  same(what, a.c_n.begin(), b.c_n.begin(), a.c_n.count);
}

// ---- step by step -------------------------------------------------------------------------------

// One step of one layer, direction and row, from h and c, which it replaces.
void step(const Sequences& c, std::int64_t group, const float* x, float* h, float* cell) {
  Sequences one;
  one.options = c.options;
  one.options.layers = one.options.directions = 1;
  one.H = c.H;
  one.I = c.inputs(group);
  one.biases = c.biases;
  one.weights.assign(c.weights.begin() + 5 * group, c.weights.begin() + 5 * (group + 1));
  one.input.assign(x, x + one.I);
  one.h0.assign(h, h + c.O());
  one.c0.assign(cell, cell + c.H);
  const Results r = run(one, true, 1, 1);
  std::memcpy(h, r.h_n.begin(), size_of(c.O()) * sizeof(float));
  if (c.has_c()) std::memcpy(cell, r.c_n.begin(), size_of(c.H) * sizeof(float));
}

// The results of the whole, one row and one step after the other.
void check_by_steps(const Sequences& c, const Results& whole) {
  const std::int64_t D = c.D(), O = c.O(), H = c.H, row = c.B / 2, length = c.length_of(row);
  std::vector<float> below, above;
  for (std::int64_t t = 0; t < length; ++t) {
    const float* x = c.input.data() + c.place_of(t, row) * c.I;
    below.insert(below.end(), x, x + c.I);
  }
  for (std::int64_t g = 0; g < c.groups(); ++g) {
    const std::int64_t d = g % D, width = c.inputs(g);
    if (d == 0) above.assign(size_of(length * D * O), 0);
    const std::int64_t at = g * c.B + row;
    std::vector<float> h(size_of(O)), cell(size_of(H));
    if (c.states) h.assign(&c.h0[size_of(at * O)], &c.h0[size_of(at * O)] + O);
    if (c.states) cell.assign(&c.c0[size_of(at * H)], &c.c0[size_of(at * H)] + H);
    for (std::int64_t s = 0; s < length; ++s) {
      const std::int64_t t = d ? length - 1 - s : s, boundary = d ? t + 1 : t;
      if (!c.reset.empty() && boundary < length && c.reset[size_of(boundary * c.B + row)]) {
        std::fill(h.begin(), h.end(), 0.0f);
        std::fill(cell.begin(), cell.end(), 0.0f);
      }
      step(c, g, &below[size_of(t * width)], h.data(), cell.data());
      std::memcpy(&above[size_of((t * D + d) * O)], h.data(), size_of(O) * sizeof(float));
    }
    same("h_n by steps", whole.h_n.begin() + at * O, h.data(), O);
    if (c.has_c()) same("c_n by steps", whole.c_n.begin() + at * H, cell.data(), H);
    if (d == D - 1) below = above;
  }
  for (std::int64_t t = 0; t < length; ++t)
    same("output by steps", whole.hidden.begin() + c.place_of(t, row) * D * O,
         &below[size_of(t * D * O)], D * O);
  const std::vector<float> zeros(size_of(D * O));
  for (std::int64_t t = length; t < c.T && !c.packed(); ++t)
    same("padding", whole.hidden.begin() + (t * c.B + row) * D * O, zeros.data(), D * O);
}

void check_case(Sequences c, unsigned seed) {
  check::context() = c.text();
  fill(c, seed);
  const Results exact = run(c, false, 1, 1), rough = run(c, true, 1, 1);
  close("hidden", rough.hidden, exact.hidden);
  close("h_n", rough.h_n, exact.h_n);
  close("c_n", rough.c_n, exact.c_n);
  same("three threads", run(c, true, 3, 1), rough);
  same("strided input", run(c, true, 1, 3), rough);
  check_by_steps(c, rough);
}

// Every kind of steps.
void set_rows(Sequences& c, int kind) {
  c.states = kind != 1;
  if (kind == 1)
    for (std::int64_t b = 0; b < c.B; ++b) c.lengths.push_back((b * 3 + c.T) % (c.T + 1));
  if (kind == 2)
    for (std::int64_t t = 0; t < c.T; ++t)
      c.batch_sizes.push_back(std::max<std::int64_t>(1, c.B - t));
  if (kind == 3)
    for (std::int64_t i = 0; i < c.T * c.B; ++i) c.reset.push_back(i % 3 == 0);
}

}  // namespace

int main() {
  if (!check::runs_here("int8_test")) return check::kSkipped;
  unsigned seed = 0;
  for (const char* cell : {"RNN", "LSTM", "GRU"})
    for (const bool other : {false, true}) {  // GRU: reset before the product; LSTM: projection
      if (other && std::string(cell) == "RNN") continue;
      const auto make = [&](std::int64_t T, std::int64_t B, std::int64_t H, std::int64_t layers) {
        Sequences c;
        c.training = false;
        c.options.cell = cell;
        c.options.layers = layers;
        c.options.maths.reset_after = !other;
        if (other && c.options.cell == "LSTM") c.options.proj_size = (H + 1) / 2;
        c.T = T;
        c.B = B;
        c.H = H;
        c.I = H == 400 ? 300 : 5;
        c.biases = B != 4;
        return c;
      };
      for (const std::int64_t layers : {1, 3})
        for (const std::int64_t B : {1, 4, 9})
          for (const std::int64_t H : {1, 16, 37, 400}) {
            if (H == 400 && layers * B > 9) continue;
            check_case(make(1, B, H, layers), ++seed);
          }
      for (int kind = 0; kind < 4; ++kind)
        for (const std::int64_t directions : {1, 2})
          for (const std::int64_t B : {1, 5, 30})
            for (const std::int64_t H : {3, 40}) {
              Sequences c = make(B == 5 ? 7 : 3, B, H, 2);
              c.options.directions = directions;
              set_rows(c, kind);
              check_case(c, ++seed);
            }
      Sequences large = make(6, 3, 400, 2);  // on three threads: units are shared
      large.options.directions = 2;
      check_case(large, ++seed);
    }
  return check::result("int8_test", checks);
}
