// Steps with int8 products through the Backend table, against the same steps in float: close, and
// the same bits on one thread and on three, in a batch and alone, with strided input. Every array
// that is written has a border that must not change.
#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "backend.h"
#include "case.h"
#include "check.h"
#include "cpu/isa.h"

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

// A case of one step with the arrays that it reads.
struct Step : Case {
  std::vector<std::vector<float>> weights;  // five to a layer
  std::vector<float> input, h0, c0;
};

void fill(Step& c, unsigned seed) {
  std::mt19937 random(seed);
  const auto some = [&](std::int64_t n, double size) {
    std::uniform_real_distribution<float> uniform(static_cast<float>(-size),
                                                  static_cast<float>(size));
    std::vector<float> v(size_of(n));
    for (float& x : v) x = uniform(random);
    return v;
  };
  const std::int64_t G = c.G(), L = c.options.layers;
  const double bound = 1 / std::sqrt(static_cast<double>(c.H));
  c.input = some(c.B * c.I, 1);
  c.h0 = some(L * c.B * c.O(), 1);
  c.c0 = some(L * c.B * c.H, 1);
  for (std::int64_t l = 0; l < L; ++l)
    for (const std::int64_t n : {G * c.H * (l ? c.O() : c.I), G * c.H * c.O(), G * c.H, G * c.H,
                                 c.options.proj_size * c.H})
      c.weights.push_back(some(n, bound));
}

struct Results {
  Written hidden, h_n, c_n;
};

Results run(Step& c, bool int8, int threads, std::int64_t unit) {
  const std::int64_t L = c.options.layers, O = c.O();
  std::vector<Parameters> parameters;
  for (std::int64_t l = 0; l < L; ++l) {
    std::vector<float>* w = &c.weights[size_of(5 * l)];
    Parameters p;
    p.weight_ih = {w[0].data(), l ? O : c.I, 1};
    p.weight_hh = {w[1].data(), O, 1};
    p.bias_ih = {w[2].data(), 0, 1};
    p.bias_hh = {w[3].data(), 0, 1};
    if (c.options.proj_size) p.weight_hr = {w[4].data(), c.H, 1};
    parameters.push_back(p);
  }
  std::vector<float> input(size_of(c.B * c.I * unit), std::nanf(""));
  for (std::int64_t i = 0; i < c.B * c.I; ++i) input[size_of(i * unit)] = c.input[size_of(i)];
  Results r;
  Problem p;
  p.options = c.options;
  p.T = 1;
  p.B = c.B;
  p.I = c.I;
  p.H = c.H;
  p.threads = threads;
  p.int8 = int8;
  p.input = {input.data(), 0, c.I * unit, unit};
  p.h0 = {c.h0.data(), c.B * O, O, 1};
  p.hidden = r.hidden.of(c.B * O);
  p.h_n = r.h_n.of(L * c.B * O);
  if (c.has_c()) {
    p.c0 = {c.c0.data(), c.B * c.H, c.H, 1};
    p.c_n = r.c_n.of(L * c.B * c.H);
  }
  Workspace packed, workspace;
  p.parameters = parameters.data();
  void* const to = packed.take(cpu_backend().packed_size(p));
  cpu_backend().pack(p, to);
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
    check::close(what, static_cast<double>(a.begin()[i]), static_cast<double>(b.begin()[i]), 0.03);
}

void same(const char* what, const Written& a, const Written& b) {
  ++checks;
  check::that(what, a.count == b.count &&
                        (a.count == 0 ||
                         std::memcmp(a.begin(), b.begin(), size_of(a.count) * sizeof(float)) == 0));
}

void same(const char* what, const Results& a, const Results& b) {
  same(what, a.hidden, b.hidden);
  same(what, a.h_n, b.h_n);
  same(what, a.c_n, b.c_n);
}

// The middle row of a batch by itself.
Step row_of(const Step& c, std::int64_t row) {
  Step one = c;
  one.B = 1;
  const auto take = [&](const std::vector<float>& from, std::int64_t layers, std::int64_t units) {
    std::vector<float> taken;
    for (std::int64_t l = 0; l < layers; ++l) {
      const float* at = from.data() + (l * c.B + row) * units;
      taken.insert(taken.end(), at, at + units);
    }
    return taken;
  };
  one.input = take(c.input, 1, c.I);
  one.h0 = take(c.h0, c.options.layers, c.O());
  one.c0 = take(c.c0, c.options.layers, c.H);
  return one;
}

void check_case(Step c, unsigned seed) {
  fill(c, seed);
  const Results exact = run(c, false, 1, 1), rough = run(c, true, 1, 1);
  close("hidden", rough.hidden, exact.hidden);
  close("h_n", rough.h_n, exact.h_n);
  close("c_n", rough.c_n, exact.c_n);
  same("three threads", run(c, true, 3, 1), rough);
  same("strided input", run(c, true, 1, 3), rough);
  const std::int64_t row = c.B / 2, O = c.O();
  Step one = row_of(c, row);
  const Results alone = run(one, true, 1, 1);
  check::that("a row alone", std::memcmp(alone.hidden.begin(), rough.hidden.begin() + row * O,
                                         size_of(O) * sizeof(float)) == 0);
  ++checks;
}

}  // namespace

int main() {
  try {
    std::printf("instruction set: %s\n", cpu_isa());
  } catch (const std::exception& e) {
    std::printf("int8_test: skipped, %s\n", e.what());
    return check::kSkipped;
  }
  unsigned seed = 0;
  for (const char* cell : {"RNN", "LSTM", "GRU"})
    for (const bool other : {false, true}) {  // GRU: reset before the product; LSTM: projection
      if (other && std::string(cell) == "RNN") continue;
      for (const std::int64_t layers : {1, 3})
        for (const std::int64_t B : {1, 4, 9})
          for (const std::int64_t H : {1, 16, 37, 400}) {
            if (H == 400 && layers * B > 9) continue;
            Step c;
            c.options.cell = cell;
            c.options.layers = layers;
            c.options.maths.reset_after = !other;
            if (other && c.options.cell == "LSTM") c.options.proj_size = (H + 1) / 2;
            c.B = B;
            c.H = H;
            c.I = H == 400 ? 300 : 5;
            check::context() = c.options.cell + (other ? " other" : "") + " layers " +
                               std::to_string(layers) + " B " + std::to_string(B) + " H " +
                               std::to_string(H);
            check_case(c, ++seed);
          }
    }
  return check::result("int8_test", checks);
}
