// A program of every kind of instruction, run by the engine on the instruction set in use, against
// plain loops. Every array ends with its last element, so that a sanitizer sees any access beyond;
// the results are the same bits on any number of threads.
#include "../program.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "check.h"
#include "instruction_set.h"

namespace {

using namespace fastrnn;
using Index = std::int64_t;

long checks = 0;

struct Sizes {
  Index T, B, I, H;
  bool reverse;
};

// Numbers of the values below.
enum {
  kX,
  kPrevious,
  kY,
  kZ,
  kWeightIh,
  kWeightHh,
  kBias,
  kGain,
  kCarry,
  kNext,
  kInput,
  kSum,
  kMean,
  kTile
};

PointOperand vector_of(int value, Index offset = 0) {
  return {PointOperand::Kind::vector, {value, offset}};
}

// a = x·W_ihᵀ + b; u = h·W_hh + a; h' = y = tanh(u − gain·mean u); z = y backwards, and its sum.
// Summed over the pairs: a ⊗ x of the step before, and a.
ProgramText text_of(DType dtype, const Sizes& s) {
  const Index I = s.I, H = s.H;
  ProgramText t;
  t.dtype = dtype;
  t.values = {{Home::sequence, 0, I, 0},     {Home::sequence, 0, I, -1}, {Home::sequence, 1, H, 0},
              {Home::sequence, 2, H + 1, 0}, {Home::shared, 0, 1, 0},    {Home::shared, 1, 1, 0},
              {Home::shared, 2, H, 0},       {Home::fixed, 0, H, 0},     {Home::carry, 0, H, 0},
              {Home::next, 0, H, 0},         {Home::block, 0, H, 0},     {Home::local, 0, H, 0},
              {Home::local, 1, 1, 0},        {Home::tile, 3, 0, 0}};
  using Kind = Instruction::Kind;
  const Product input{{kInput, 0}, {kX, 0}, {kWeightIh, 0}, {kBias, 0}, 1, 0, 0, 0, 1, I, I, H};
  const Product state{{kSum, 0}, {kCarry, 0}, {kWeightHh, 0}, {kInput, 0}, 1, 0, 0, 0, H, 1, H, H};
  const Reduce sum{Reduce::Kind::sum, {kMean, 0}, {kSum, 0}, 1, 0, H, 1, {}};
  const Collect backwards{{kZ, 0}, {kY, 0}, H + 1, 0};
  t.phases[kBefore] = {{Kind::product, input, {}, {}, {}}};
  t.phases[kStep] = {{Kind::product, state, {}, {}, {}},
                     {Kind::reduce, {}, {}, sum, {}},
                     {Kind::run, {}, {H, 0, 4}, {}, {}}};
  t.phases[kAfter] = {{Kind::collect, {}, {}, {}, backwards}};
  t.constants = {-1.0 / static_cast<double>(H)};
  const PointOperand scale{PointOperand::Kind::constant, {-1, 0}};
  const PointOperand mean{PointOperand::Kind::scalar, {kMean, 0}};
  t.points = {{Point::mul, vector_of(kTile), {mean, scale, {}}},
              {Point::fma, vector_of(kTile), {vector_of(kTile), vector_of(kGain), vector_of(kSum)}},
              {Point::tanh, vector_of(kNext), {vector_of(kTile), {}, {}}},
              {Point::copy, vector_of(kY), {vector_of(kNext), {}, {}}}};
  ProgramTable table;
  for (Index u = 0; u <= H; ++u) {
    table.starts.push_back(static_cast<Index>(table.indices.size()));
    for (Index v = u < H ? H - 1 - u : 0; v < (u < H ? H - u : H); ++v) table.indices.push_back(v);
  }
  table.starts.push_back(static_cast<Index>(table.indices.size()));
  t.tables = {table};
  PairSum outer, columns;
  outer.outer = true;
  outer.d = columns.d = {kInput, 0};
  outer.x = {kPrevious, 0};
  outer.w_k = 1;
  outer.w_n = outer.K = I;
  outer.N = columns.N = H;
  columns.target = 1;
  columns.w_n = 1;
  t.sums = {outer, columns};
  return t;
}

template <class C>
std::vector<C> numbers(Index count, double start) {
  std::vector<C> values(static_cast<std::size_t>(count));
  for (std::size_t i = 0; i < values.size(); ++i)
    values[i] = static_cast<C>(std::sin(start + 1.7 * static_cast<double>(i)));
  return values;
}

template <class C>
struct Arrays {
  std::vector<C> x, first, w_ih, w_hh, b, gain, h0, y, z, h_n, d_w, d_b;
  explicit Arrays(const Sizes& s)
      : x(numbers<C>(s.T * s.B * s.I, 1)),
        first(numbers<C>(s.B * s.I, 2)),
        w_ih(numbers<C>(s.H * s.I, 3)),
        w_hh(numbers<C>(s.H * s.H, 4)),
        b(numbers<C>(s.H, 5)),
        gain(numbers<C>(s.B * s.H, 6)),
        h0(numbers<C>(s.B * s.H, 7)),
        y(numbers<C>(s.T * s.B * s.H, 8)),
        z(numbers<C>(s.T * s.B * (s.H + 1), 8)),
        h_n(numbers<C>(s.B * s.H, 8)),
        d_w(numbers<C>(s.H * s.I, 8)),
        d_b(numbers<C>(s.H, 8)) {
    for (C& w : w_hh) w /= static_cast<C>(s.H);
  }
};

// The same in plain loops, double.
void reference(const Sizes& s, Arrays<double>& a) {
  std::vector<double> h = a.h0, input(static_cast<std::size_t>(s.H)), sum(input);
  std::fill(a.d_w.begin(), a.d_w.end(), 0.0);
  std::fill(a.d_b.begin(), a.d_b.end(), 0.0);
  const auto size = [](Index i) { return static_cast<std::size_t>(i); };
  for (Index step = 0; step < s.T; ++step)
    for (Index row = 0; row < s.B; ++row) {
      const Index t = s.reverse ? s.T - 1 - step : step, pair = t * s.B + row;
      const double* x = &a.x[size(pair * s.I)];
      const double* before = t > 0 ? x - s.B * s.I : &a.first[size(row * s.I)];
      double* state = &h[size(row * s.H)];
      double mean = 0;
      for (Index u = 0; u < s.H; ++u) {
        double value = a.b[size(u)];
        for (Index k = 0; k < s.I; ++k) value += x[k] * a.w_ih[size(u * s.I + k)];
        input[size(u)] = value;
        a.d_b[size(u)] += value;
        for (Index k = 0; k < s.I; ++k) a.d_w[size(u * s.I + k)] += value * before[k];
        for (Index k = 0; k < s.H; ++k) value += state[k] * a.w_hh[size(k * s.H + u)];
        sum[size(u)] = value;
        mean += value / static_cast<double>(s.H);
      }
      double all = 0;
      for (Index u = 0; u < s.H; ++u) {
        state[u] = std::tanh(sum[size(u)] - mean * a.gain[size(row * s.H + u)]);
        a.y[size(pair * s.H + u)] = state[u];
        a.z[size(pair * (s.H + 1) + s.H - 1 - u)] = state[u];
        all += state[u];
      }
      a.z[size(pair * (s.H + 1) + s.H)] = all;
    }
  a.h_n = h;
}

template <class C>
void run(const Program& program, const Sizes& s, Arrays<C>& a, int threads) {
  const void* shared[] = {a.w_ih.data(), a.w_hh.data(), a.b.data()};
  const Sequence sequences[] = {{a.x.data(), s.B * s.I, s.I, 1},
                                {a.y.data(), s.B * s.H, s.H, 1},
                                {a.z.data(), s.B * (s.H + 1), s.H + 1, 1}};
  const State firsts[] = {{a.first.data(), 0, s.I, 1}, {}, {}};
  const State fixed[] = {{a.gain.data(), 0, s.H, 1}}, inits[] = {{a.h0.data(), 0, s.H, 1}};
  void* const finals[] = {a.h_n.data()};
  void* const gradients[] = {a.d_w.data(), a.d_b.data()};
  const Index gradient_sizes[] = {s.H * s.I, s.H};
  ProgramCall call;
  call.program = &program;
  call.T = s.T;
  call.B = s.B;
  call.reverse = s.reverse;
  call.threads = threads;
  call.shared = shared;
  call.sequences = sequences;
  call.firsts = firsts;
  call.fixed = fixed;
  call.inits = inits;
  call.finals = finals;
  call.gradients = gradients;
  call.gradient_sizes = gradient_sizes;
  const std::size_t bytes = program_workspace_size(call);
  const std::unique_ptr<char[]> memory(new char[bytes + 64]);
  std::memset(memory.get(), 0xff, bytes + 64);  // NaN, so that a read before a write shows
  call.workspace =
      reinterpret_cast<void*>((reinterpret_cast<std::uintptr_t>(memory.get()) + 63) / 64 * 64);
  run_program(call);
}

template <class C>
void compare(const char* name, const std::vector<C>& values, const std::vector<double>& expected,
             double tolerance) {
  for (std::size_t i = 0; i < values.size(); ++i, ++checks)
    check::close(name, static_cast<double>(values[i]), expected[i], tolerance);
}

template <class C>
bool same(const std::vector<C>& a, const std::vector<C>& b) {
  return a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(C)) == 0;
}

template <class C>
void against_loops(DType dtype, const Sizes& s, double tolerance) {
  check::context() = std::to_string(s.T) + "×" + std::to_string(s.B) + ", " + std::to_string(s.I) +
                     " to " + std::to_string(s.H) + (s.reverse ? ", reverse" : "") +
                     (sizeof(C) == 4 ? ", float32" : ", float64");
  const Program program(text_of(dtype, s));
  Arrays<double> expected(s);
  reference(s, expected);
  Arrays<C> one(s);
  run(program, s, one, 1);
  compare("y", one.y, expected.y, tolerance);
  compare("z", one.z, expected.z, 10 * tolerance);
  compare("h_n", one.h_n, expected.h_n, tolerance);
  compare("the sum of outer products", one.d_w, expected.d_w, 10 * tolerance);
  compare("the sum of columns", one.d_b, expected.d_b, 10 * tolerance);
  for (int threads = 2; threads <= 4; ++threads, checks += 5) {
    Arrays<C> team(s);
    run(program, s, team, threads);
    check::that("y on threads", same(team.y, one.y));
    check::that("z on threads", same(team.z, one.z));
    check::that("h_n on threads", same(team.h_n, one.h_n));
    check::that("sums on threads", same(team.d_w, one.d_w) && same(team.d_b, one.d_b));
  }
}

// So few rows of so many units that the threads divide the columns of a step.
constexpr Sizes kWide{30, 1, 20, 700, false};

void shares() {
  const auto team_of = [](const Sizes& s) {
    const Program program(text_of(DType::f32, s));
    ProgramCall call;
    call.program = &program;
    call.T = s.T;
    call.B = s.B;
    call.threads = 4;
    return program_team(call);
  };
  check::that("few rows of many units: columns are divided", team_of(kWide).columns);
  const ProgramTeam rows = team_of({100, 64, 64, 256, false});
  check::that("many rows are divided", rows.threads == 4 && !rows.columns);
  check::that("little work runs on one thread", team_of({2, 2, 3, 5, false}).threads == 1);
  checks += 3;
}

// Malformed programs through the binding: tests/test_program_engine.py.
void refuses() {
  const Sizes s{1, 1, 3, 5, false};
  const auto refused = [&](const char* what, const std::function<void(ProgramText&)>& change) {
    ProgramText text = text_of(DType::f32, s);
    change(text);
    bool thrown = false;
    try {
      const Program program(text);
    } catch (const std::invalid_argument& error) {
      thrown = std::string(error.what()).find(what) != std::string::npos;
    }
    check::that(what, thrown);
    ++checks;
  };
  refused("before[0] (product): inp", [](ProgramText& t) { t.phases[0][0].product.K = 4; });
  refused("step[1] (reduce): inp", [](ProgramText& t) { t.phases[1][1].reduce.element = -1; });
  refused("step[2] (run) op 1", [](ProgramText& t) { t.points[1].from[1].at.offset = 1; });
  refused("after[0] (collect): inp", [](ProgramText& t) { t.tables[0].indices[0] = 5; });
  refused("reductions[0]: d", [](ProgramText& t) { t.sums[0].N = 6; });
  refused("dtype", [](ProgramText& t) { t.dtype = DType::bf16; });
}

}  // namespace

int main() {
  if (!check::runs_here("program_test")) return check::kSkipped;
  const Sizes all[] = {{0, 3, 2, 4, false},    {4, 0, 2, 4, false},     {1, 1, 1, 1, false},
                       {7, 3, 5, 17, true},    {40, 1, 33, 300, false}, {12, 65, 16, 48, true},
                       {300, 2, 3, 20, false}, {3, 210, 7, 64, false},  kWide};
  for (const Sizes& s : all) {
    against_loops<float>(DType::f32, s, 2e-5);
    against_loops<double>(DType::f64, s, 1e-13);
  }
  check::context().clear();
  shares();
  refuses();
  return check::result("program_test", checks);
}
