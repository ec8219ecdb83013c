// The CUDA kernels on the CPU, by their own source (emulator.h), against the CPU's engine: random
// stacks, sizes, rows, strides and gradients, in every storage type; and the same bits in whatever
// order the threads and blocks run. The persistent kernels take their place among them as a layer
// has it (host_persistent.h).
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "../../csrc/tests/check.h"
#include "backend.h"
#include "emulator.h"
#include "host_persistent.h"
#include "stack.h"
#include "storage.h"

namespace {

using namespace fastrnn;
using cuda::Order;

long checks = 0;

std::size_t size_of(std::int64_t n) { return static_cast<std::size_t>(n); }

const Backend& emulated_backend() {
  static constexpr Backend backend{
      [](const Problem& p, Pass pass) { return cuda::Stack(p, pass).workspace_size(); },
      nullptr,
      nullptr,
      [](const Problem& p) { cuda::Stack(p, Pass::forward).forward(); },
      [](const Problem& p) { cuda::Stack(p, Pass::backward).backward(); },
      nullptr,
      nullptr};
  return backend;
}

// ---- one case -----------------------------------------------------------------------------------

enum Kind { kPadded, kLengths, kPacked, kReset, kLengthsAndReset, kKinds };

struct Case {
  Options options;
  std::int64_t T = 1, B = 1, I = 1, H = 1;
  std::vector<std::int64_t> lengths, batch_sizes;
  std::vector<unsigned char> reset;
  bool training = true, every_layer = true, consume = false;
  bool biases = true, states = true;         // given
  bool turned = false, batch_first = false;  // strides
  bool persistent = false, tf32 = false;     // asked for and allowed
  bool d_output = true, d_states = true, d_finals = true, d_input = true, d_weights = true;

  std::int64_t D() const { return options.directions; }
  std::int64_t L() const { return options.layers; }
  std::int64_t P() const { return options.proj_size; }
  std::int64_t O() const { return P() ? P() : H; }
  std::int64_t heads() const { return options.maths.heads; }
  std::int64_t G() const { return cell_traits(options).gates; }
  std::int64_t kept_layers() const { return every_layer || training ? L() : 1; }
  std::int64_t pairs() const {
    if (batch_sizes.empty()) return T * B;
    return std::accumulate(batch_sizes.begin(), batch_sizes.end(), std::int64_t{0});
  }
  bool has_c() const { return cell_traits(options).states > 1; }
  bool packed() const { return !batch_sizes.empty(); }

  std::string text() const {
    const char* rows = packed()           ? "packed"
                       : !lengths.empty() ? (reset.empty() ? "lengths" : "lengths and reset")
                       : !reset.empty()   ? "reset"
                                          : "padded";
    char text[400];
    std::snprintf(text, sizeof(text),
                  "%s L%d D%d P%d T%d B%d I%d H%d K%d %s%s act %d gate %d%s%s%s%s%s%s%s",
                  options.cell.c_str(), int(L()), int(D()), int(P()), int(T), int(B), int(I),
                  int(H), int(heads()), rows, options.maths.reset_after ? "" : " reset-before",
                  int(options.maths.activation), int(options.maths.gate_activation),
                  training ? "" : " inference", consume ? " consume" : "", turned ? " turned" : "",
                  batch_first ? " batch-first" : "", biases ? "" : " no-bias",
                  states ? "" : " no-hx", persistent ? " persistent" : "");
    return text;
  }
};

using Random = std::mt19937;

std::int64_t between(Random& random, std::int64_t low, std::int64_t high) {
  return std::uniform_int_distribution<std::int64_t>(low, high)(random);
}
bool chance(Random& random, double p) { return std::bernoulli_distribution(p)(random); }

void choose_rows(Case& c, Kind kind, Random& random) {
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
  // Presence is said by the arrays, which an empty batch leaves empty.
  if (c.B == 0) c.lengths.clear(), c.reset.clear();
}

// Some, which the sizes then are multiples of; now and then one for each unit.
void choose_heads(Case& c, Random& random) {
  std::int64_t& heads = c.options.maths.heads;
  heads = chance(random, 0.2) && !c.P() ? c.H : between(random, 2, 5);
  c.H = (c.H + heads - 1) / heads * heads;
  if (!c.P()) return;
  c.options.proj_size = (c.P() + heads - 1) / heads * heads;
  if (c.P() >= c.H) c.H = c.P() + heads;
}

Case random_case(Random& random, bool smooth, bool many_rows) {
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
  std::vector<C> cell, gates;
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
std::vector<std::pair<std::int64_t, std::int64_t>> shapes(const Case& c) {
  std::vector<std::pair<std::int64_t, std::int64_t>> all;
  const std::int64_t rows = c.G() * c.H;
  for (std::int64_t g = 0; g < c.L() * c.D(); ++g) {
    all.emplace_back(rows, g < c.D() ? c.I : c.D() * c.O());
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
  const std::int64_t groups = c.L() * c.D(), N = c.pairs();
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
  // What stands in the padding of the input must not reach anything.
  for (std::int64_t b = 0; b < static_cast<std::int64_t>(c.lengths.size()); ++b)
    for (std::int64_t t = c.lengths[size_of(b)]; t < c.T; ++t)
      for (std::int64_t u = 0; u < c.I; ++u) {
        const std::int64_t n = c.batch_first ? b * c.T + t : t * c.B + b;
        std::memset(&a.input[size_of(n * c.I + u)], 0xff, sizeof(S));
      }
  return a;
}

// ---- running it ---------------------------------------------------------------------------------

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
  for (std::int64_t g = 0; g < c.L() * c.D(); ++g) {
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
DType dtype_of<float>() {
  return DType::f32;
}
template <>
DType dtype_of<double>() {
  return DType::f64;
}
template <>
DType dtype_of<Bf16>() {
  return DType::bf16;
}
template <>
DType dtype_of<F16>() {
  return DType::f16;
}

// A pointer that is not null even to nothing.
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
  if (c.training) p.gates = place(a.gates);
  return p;
}

// The workspace starts as NaN, and ends with what nobody may write.
struct Workspace {
  std::vector<unsigned char> memory;
  std::size_t bytes = 0;
  unsigned char* at = nullptr;

  void* take(std::size_t size) {
    bytes = size;
    memory = std::vector<unsigned char>(size + 128, 0xff);  // fresh: not as the last call left it
    const auto address = reinterpret_cast<std::uintptr_t>(memory.data());
    at = reinterpret_cast<unsigned char*>((address + 63) / 64 * 64);
    return at;
  }
  bool whole() const {
    const unsigned char* end = memory.data() + memory.size();
    return std::all_of<const unsigned char*>(at + bytes, end,
                                             [](unsigned char x) { return x == 0xff; });
  }
};

template <class S>
void run(const Backend& backend, const Case& c, Arrays<S>& a) {
  const std::int64_t groups = c.L() * c.D(), N = c.pairs();
  blank(a.hidden, c.kept_layers() * N * c.D() * c.O());
  blank(a.h_n, groups * c.B * c.O());
  blank(a.c_n, c.has_c() ? groups * c.B * c.H : 0);
  const bool all = c.every_layer || c.training;
  blank(a.cell, c.has_c() && all ? c.L() * N * c.D() * c.H : 0);
  blank(a.gates, c.training ? groups * N * cell_traits(c.options).saved_planes * padded(c.H) : 0);
  std::vector<Parameters> parameters = parameters_of(c, a.weights, c.turned), d_parameters;
  Problem p = problem_of(c, a);
  p.parameters = parameters.data();
  Workspace w;
  p.workspace = w.take(backend.workspace_size(p, Pass::forward));
  backend.forward(p);
  check::that("the end of forward's workspace", w.whole());
  if (!c.training) return;

  blank(a.d_input, c.d_input ? N * c.I : 0);
  blank(a.d_h0, c.states ? groups * c.B * c.O() : 0);
  blank(a.d_c0, c.states && c.has_c() ? groups * c.B * c.H : 0);
  a.d_weights = a.weights;
  for (auto& d : a.d_weights) blank(d, static_cast<std::int64_t>(d.size()));
  d_parameters = parameters_of(c, a.d_weights, false);
  p.consume_gates = c.consume;
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
  p.workspace = w.take(backend.workspace_size(p, Pass::backward));
  backend.backward(p);
  check::that("the end of backward's workspace", w.whole());
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
  if (!c.consume) same_bits("gates in another order", a.gates, b.gates);
  same_bits("d_input in another order", a.d_input, b.d_input);
  same_bits("d_h0 in another order", a.d_h0, b.d_h0);
  same_bits("d_c0 in another order", a.d_c0, b.d_c0);
  for (std::size_t k = 0; k < a.d_weights.size(); ++k)
    same_bits("d_weights in another order", a.d_weights[k], b.d_weights[k]);
}

template <class S>
void check_case(const char* type, const Case& c, Random& random, double tolerance) {
  check::context() = std::string(type) + " " + c.text();
  Arrays<S> expected = random_arrays<S>(c, random), got = expected;
  run(cpu_backend(), c, expected);
  cuda::emulator().order = Order::forwards;
  run(emulated_backend(), c, got);
  compare_all(c, got, expected, tolerance);
  // With layers side by side, where they can.
  cuda::emulator().multiprocessors = 1 << 20;
  for (const Order order : {Order::backwards, Order::shuffled, Order::forwards}) {
    Arrays<S> again = got;
    cuda::emulator().order = order;
    run(emulated_backend(), c, again);
    same_bits_of_all(c, got, again);
  }
  cuda::emulator().multiprocessors = 0;
}

template <class S>
void check_type(const char* type, double tolerance, bool smooth, int cases) {
  Random random(static_cast<unsigned>(sizeof(S)) * 100 + (tolerance > 1e-2));
  for (int k = 0; k < cases; ++k)
    check_case<S>(type, random_case(random, smooth, k % 8 == 7), random, tolerance);
  std::printf("%s: %d cases, %d failures so far\n", type, cases, check::failures());
}

// ---- persistent kernels in their place ----------------------------------------------------------

// Why a layer of the case has none; empty: it has one.
std::string reason(const Case& c, DType dtype, Pass pass) {
  Problem p;
  p.options = c.options;
  p.dtype = dtype;
  p.T = c.T, p.B = c.B, p.I = c.I, p.H = c.H;
  p.persistent = c.persistent, p.allow_tf32 = c.tf32;
  const std::vector<Parameters> parameters(size_of(c.L() * c.D()));
  p.parameters = parameters.data();
  const cuda::Stack stack(p, pass);
  return stack.plan().kernel ? "" : stack.plan().why;
}

// Whether a layer of the case has a persistent kernel: one of a single head always, of several
// where the blocks of all fit.
template <class S>
bool has_one(const Case& c, Pass pass) {
  const bool known = !c.P() && c.options.maths.reset_after && c.B > 0;
  return known && (c.heads() == 1 || reason(c, dtype_of<S>(), pass).empty());
}

template <class S>
void check_persistent_type(const char* type, double tolerance, bool tf32, int cases) {
  Random random(static_cast<unsigned>(sizeof(S)) * 1000 + tf32 + (tolerance > 1e-2));
  long expected = 0, of_heads = 0;
  const long before = resident::persistent_launches();
  for (int k = 0; k < cases; ++k) {
    Case c = random_case(random, true, false);
    c.persistent = true, c.tf32 = tf32;
    if (k % 8) c.options.proj_size = 0, c.options.maths.reset_after = true;
    check_case<S>(type, c, random, tolerance);
    // check_case runs it four times. Of several heads a direction is a launch by itself.
    const std::int64_t launches = c.L() * (c.heads() > 1 ? c.D() : 1);
    if (has_one<S>(c, Pass::forward)) expected += 4 * launches, of_heads += c.heads() > 1;
    if (c.training && has_one<S>(c, Pass::backward)) expected += 4 * launches;
  }
  check::context() = type;
  ++checks;
  check::that("every layer that can has a persistent kernel",
              resident::persistent_launches() - before == expected);
  check::that("some of them have heads", of_heads > 0 || cases < 10);
  std::printf("%s, persistent: %d cases, %ld launches, %d failures so far\n", type, cases, expected,
              check::failures());
}

void check_reasons() {
  check::context() = "reasons";
  Case c;
  c.options.cell = "LSTM";
  c.T = 3, c.B = 2, c.I = 4, c.H = 8;
  const auto expect = [](const std::string& got, const char* wanted) {
    ++checks;
    check::that((got + ", expected " + wanted).c_str(), got == wanted);
  };
  expect(reason(c, DType::f32, Pass::forward), "persistent kernels are not asked for");
  c.persistent = true;
  expect(reason(c, DType::f32, Pass::forward), "");
  expect(reason(c, DType::f16, Pass::backward), "");
  expect(reason(c, DType::f64, Pass::forward), "float64 has no persistent kernel");
  c.options.maths.heads = 2;
  expect(reason(c, DType::bf16, Pass::forward), "");
  c.options.maths.heads = 1, c.H = 300;
  expect(reason(c, DType::f32, Pass::forward), "more blocks than multiprocessors");
  c.H = 8, c.options.proj_size = 3;
  expect(reason(c, DType::f32, Pass::backward), "proj_size has no persistent kernel");
  c.options.proj_size = 0, c.options.cell = "GRU", c.options.maths.reset_after = false;
  expect(reason(c, DType::f32, Pass::forward), "reset_after=False has no persistent kernel");
  c.options.maths.reset_after = true, c.T = 1 << 25, c.B = 1 << 7;
  expect(reason(c, DType::f32, Pass::forward), "the projections of all steps take more than 4 GiB");
}

int check_persistent(int percent) {
  check_persistent_type<float>("float32", 3e-5, false, 24 * percent / 100);
  check_persistent_type<float>("tf32", 8e-3, true, 12 * percent / 100);
  check_persistent_type<Bf16>("bfloat16", 2e-2, false, 24 * percent / 100);
  check_persistent_type<F16>("float16", 4e-3, false, 24 * percent / 100);
  check_reasons();
  return check::result("kernels_test persistent", checks);
}

// Lengths that the host cannot have seen count as the nearest possible ones.
void check_lengths_out_of_range() {
  check::context() = "lengths out of range";
  Random random(5);
  Case c;
  c.options.cell = "GRU";
  c.T = 4, c.B = 3, c.I = 2, c.H = 5;
  c.lengths = {-3, 2, 9};
  Case allowed = c;
  allowed.lengths = {0, 2, 4};
  Arrays<double> a = random_arrays<double>(allowed, random), b = a;
  run(emulated_backend(), allowed, a);
  run(emulated_backend(), c, b);
  same_bits_of_all(c, a, b);
}

// Rows of a batch do not influence each other's bits.
void check_rows_apart() {
  check::context() = "rows apart";
  Random random(6);
  Case c;
  c.options.cell = "LSTM";
  c.T = 5, c.B = 9, c.I = 4, c.H = 21;
  Arrays<float> a = random_arrays<float>(c, random), b = a;
  for (std::int64_t t = 0; t < c.T; ++t)
    for (std::int64_t u = 0; u < c.I; ++u) b.input[size_of((t * c.B + 4) * c.I + u)] = NAN;
  run(emulated_backend(), c, a);
  run(emulated_backend(), c, b);
  for (std::int64_t t = 0; t < c.T; ++t)
    for (std::int64_t i = 0; i < c.B; ++i, ++checks) {
      if (i == 4) continue;
      const std::size_t at = size_of((t * c.B + i) * c.H);
      check::that("hidden of another row",
                  std::memcmp(&a.hidden[at], &b.hidden[at], size_of(c.H) * sizeof(float)) == 0);
    }
}

// In how many pieces of time layers run side by side, or one after the other.
void check_pieces() {
  check::context() = "pieces of time";
  Case c;
  c.options.cell = "LSTM";
  c.options.layers = 3, c.T = 7, c.B = 9, c.H = 20;  // 2·3 blocks
  const auto expect = [&](const char* what, std::int64_t wanted) {
    Problem p;
    p.options = c.options;
    p.T = c.T, p.B = c.B, p.I = c.I, p.H = c.H, p.persistent = c.persistent;
    const std::vector<Parameters> parameters(size_of(c.L() * c.D()));
    p.parameters = parameters.data();
    ++checks;
    check::that(what, cuda::Stack(p, Pass::forward).pieces() == wanted);
    check::that(what, cuda::Stack(p, Pass::backward).pieces() == wanted);
  };
  cuda::emulator().multiprocessors = 12;
  expect("a step leaves half of the device idle", 4);
  cuda::emulator().multiprocessors = 11;
  expect("a step fills more than half of the device", 1);
  cuda::emulator().multiprocessors = 1000;
  c.options.directions = 2;
  expect("two directions", 1);
  c.options.directions = 1, c.options.layers = 1;
  expect("one layer", 1);
  c.options.layers = 2, c.T = 2;
  expect("few steps", 1);
  c.T = 8, c.persistent = true, c.B = 2, c.H = 8;
  expect("a persistent kernel", 1);
  cuda::emulator().multiprocessors = 0;
}

// Many steps: the table of packed rows takes more than one launch.
void check_many_steps() {
  Random random(7);
  Case c;
  c.options.cell = "RNN";
  c.options.directions = 2;
  c.T = 2 * cuda::PackedTable::kSteps + 50, c.I = 1, c.H = 2;
  for (std::int64_t t = 0; t < c.T; ++t)
    c.batch_sizes.push_back(t < 100 ? 3 : t < cuda::PackedTable::kSteps ? 2 : 1);
  c.B = 3;
  check_case<double>("many steps", c, random, 1e-11);
}

}  // namespace

// kernels_test [PERCENT [persistent]]: so many of the random cases, all by default; the others, or
// those with persistent kernels.
int main(int count, char** arguments) {
  const int percent = count > 1 ? std::atoi(arguments[1]) : 100;
  std::printf("matrix products: %s\n", cuda::library_origin());
  if (count > 2 && !std::strcmp(arguments[2], "persistent")) return check_persistent(percent);
  check_type<double>("float64", 1e-12, false, 150 * percent / 100);
  check_type<float>("float32", 1e-5, false, 150 * percent / 100);
  check_type<Bf16>("bfloat16", 2e-2, true, 80 * percent / 100);
  check_type<F16>("float16", 4e-3, true, 80 * percent / 100);
  check_lengths_out_of_range();
  check_rows_apart();
  check_many_steps();
  check_pieces();
  std::printf("%ld launches, layers side by side %ld times\n", cuda::emulator().launches,
              cuda::emulator().joins);
  ++checks;
  check::that("layers run side by side", cuda::emulator().joins >= percent);
  return check::result("kernels_test", checks);
}
