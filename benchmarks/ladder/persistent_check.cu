// Every persistent kernel on a GPU against plain kernels, then its time for a step beside the
// estimate.
//
// The plain kernels launch once for each step and multiply by a loop; they share the cells and the
// addressing with the persistent ones, which cuda/persistent/tests checks on a CPU, and nothing of
// the products, the exchange and the teams. Cases have rows of unequal lengths and resets, and one
// group in each direction.
//
// Usage: persistent_check [--small] [--json FILE]
//   --small   one small case of every kernel, nothing timed: for compute-sanitizer
#include <cstdint>
#include <cstring>
#include <exception>
#include <string>
#include <vector>

#include "persistent.h"
#include "report.h"

namespace {

using namespace fastrnn;
using namespace fastrnn::resident;
using ladder::check;

int failures = 0;

// ---- memory -----------------------------------------------------------------------------------

__device__ float uniform_at(std::uint64_t i, unsigned seed) {  // [-1, 1), splitmix64
  std::uint64_t z = i * 0x9e3779b97f4a7c15ull + seed * 0xd1b54a32d192ed03ull;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return static_cast<float>((z ^ (z >> 31)) >> 40) * 0x1p-23f - 1.0f;
}

template <class Operand>
__global__ void fill_stored(Storage<Operand>* to, std::int64_t n, float scale, unsigned seed) {
  for (std::int64_t i = blockIdx.x * 256ll + threadIdx.x; i < n; i += gridDim.x * 256ll)
    to[i] = Operand::store(scale * uniform_at(static_cast<std::uint64_t>(i), seed));
}

__global__ void fill_floats(float* to, std::int64_t n, float scale, unsigned seed) {
  for (std::int64_t i = blockIdx.x * 256ll + threadIdx.x; i < n; i += gridDim.x * 256ll)
    to[i] = scale * uniform_at(static_cast<std::uint64_t>(i), seed);
}

// Freed together at the end of a case.
class Memory {
 public:
  Memory() = default;
  Memory(const Memory&) = delete;
  ~Memory() {
    for (void* m : all_) cudaFree(m);
  }
  template <class T>
  T* take(std::int64_t n) {
    void* m = nullptr;
    check(cudaMalloc(&m, static_cast<std::size_t>(n > 0 ? n : 1) * sizeof(T)), "cudaMalloc");
    all_.push_back(m);
    return static_cast<T*>(m);
  }
  template <class T>
  T* poisoned(std::int64_t n) {
    T* const m = take<T>(n);
    check(cudaMemset(m, 0xff, static_cast<std::size_t>(n) * sizeof(T)), "cudaMemset");
    return m;
  }
  template <class T>
  T* copied(const std::vector<T>& values) {
    T* const m = take<T>(static_cast<std::int64_t>(values.size()));
    check(cudaMemcpy(m, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice), "copy");
    return m;
  }

 private:
  std::vector<void*> all_;
};

template <class T>
std::vector<T> fetched(const T* from, std::int64_t n) {
  std::vector<T> values(static_cast<std::size_t>(n));
  check(cudaMemcpy(values.data(), from, values.size() * sizeof(T), cudaMemcpyDeviceToHost), "copy");
  return values;
}

// ---- the plain kernels ------------------------------------------------------------------------

template <class Cell, class Operand>
using Plain = Config<Cell, Operand, Via::block, Cell::gates, 8, 1, 0, 1>;

struct Place {
  int group, row, unit;
  bool exists;
};

__device__ Place place_of_thread(int groups, int B, int H) {
  const std::int64_t i = blockIdx.x * 256ll + threadIdx.x;
  return {static_cast<int>(i / H / B), static_cast<int>(i / H % B), static_cast<int>(i % H),
          i < static_cast<std::int64_t>(groups) * B * H};
}

// A step forward. h and c: float [groups][B][H]; h from one buffer to the other.
template <class Cell, class Operand>
__global__ void plain_forward(Forward<Storage<Operand>> p, int groups, int s, const float* from,
                              float* to, float* c) {
  const int H = p.team.units, T = p.steps.T;
  const Place at = place_of_thread(groups, p.steps.B, H);
  if (!at.exists) return;
  const std::int64_t row = (static_cast<std::int64_t>(at.group) * p.steps.B + at.row) * H;
  const bool reverse = at.group >= p.reverse_from;
  const int t = reverse ? T - 1 - s : s;
  to[row + at.unit] = from[row + at.unit];
  if (!p.steps.is_active(t, at.row)) return;
  const bool fresh = p.steps.starts_fresh(t, at.row, reverse);
  float x[Cell::gates], sum[Cell::gates];
  for (int m = 0; m < Cell::gates; ++m) {
    const Storage<Operand>* const w =
        p.weight_hh + ((static_cast<std::int64_t>(at.group) * Cell::gates + m) * H + at.unit) * H;
    sum[m] = 0;
    for (int k = 0; k < H && !fresh; ++k) sum[m] += Operand::load(w[k]) * from[row + k];
    x[m] = *p.x_gates.at(at.group, p.steps.pair(t, at.row), m, at.unit);
  }
  Position me{};
  me.group = at.group;
  Item item{};
  item.row = at.row, item.unit = at.unit;
  float h = from[row + at.unit];
  run_cell<Plain<Cell, Operand>>(p, me, t, item, fresh, x, sum, h, c + row + at.unit);
  to[row + at.unit] = h;
}

// A step backward: the cell. d_h, d_c, from_product float [groups][B][H]; out
// [groups][B][gates][H].
template <class Cell, class Operand>
__global__ void plain_backward(Backward<Storage<Operand>> p, int groups, int s, float* d_h,
                               float* d_c, const float* from_product, float* out) {
  const int H = p.team.units, T = p.steps.T;
  const Place at = place_of_thread(groups, p.steps.B, H);
  if (!at.exists) return;
  const std::int64_t pair = static_cast<std::int64_t>(at.group) * p.steps.B + at.row;
  const std::int64_t mine = pair * H + at.unit;
  const int t = at.group >= p.reverse_from ? s : T - 1 - s;
  Position me{};
  me.group = at.group, me.rows = p.steps.B;
  Item item{};
  item.exists = true, item.row = at.row, item.unit = at.unit;
  StepValues<Cell> values;
  read_values<Plain<Cell, Operand>>(p, me, t, item, values);
  float gates[Cell::gates] = {};
  if (values.active)
    run_cell_backward<Plain<Cell, Operand>, Cell::gates>(p, me, t, item, values, from_product[mine],
                                                         d_h + mine, d_c + mine, gates);
  else
    d_h[mine] += from_product[mine];
  for (int m = 0; m < Cell::gates; ++m)
    out[(pair * Cell::gates + m) * H + at.unit] = rounded<Operand>(gates[m]);
}

// And the product with the weights.
template <class Cell, class Operand>
__global__ void plain_product(Backward<Storage<Operand>> p, int groups, const float* out,
                              float* product) {
  const int H = p.team.units, rows = Cell::gates * H;
  const Place at = place_of_thread(groups, p.steps.B, H);
  if (!at.exists) return;
  const std::int64_t pair = static_cast<std::int64_t>(at.group) * p.steps.B + at.row;
  const Storage<Operand>* const w = p.weight_hh + static_cast<std::int64_t>(at.group) * rows * H;
  float sum = 0;
  for (int k = 0; k < rows; ++k)
    sum += out[pair * rows + k] * Operand::load(w[static_cast<std::int64_t>(k) * H + at.unit]);
  product[pair * H + at.unit] = sum;
}

// ---- a case -----------------------------------------------------------------------------------

struct Size {
  int T, B, H, groups;
  bool rows;  // lengths and resets
};

template <class Operand>
struct Precision {
  static constexpr double forward = 1e-5, backward = 2e-5;
};
template <>
struct Precision<BFloat16> {
  static constexpr double forward = 2e-2, backward = 5e-2;
};
template <>
struct Precision<Float16> {
  static constexpr double forward = 3e-3, backward = 8e-3;
};
template <>
struct Precision<Tf32> {
  static constexpr double forward = 4e-3, backward = 8e-3;
};

// The arrays of a case, on the device; what a pass writes is there twice, [0] the plain kernels'.
template <class Cell, class Operand>
struct Case {
  using S = Storage<Operand>;
  Size size;
  Memory memory;
  std::int64_t N = 0, units = 0;
  StepTable steps;
  Forward<S> forward[2];
  Backward<S> backward[2];

  explicit Case(const Size& of) : size(of) {
    choose_rows();
    const std::int64_t H = size.H, B = size.B, D = size.groups;
    units = D * B * H;
    Forward<S> f;
    f.team.units = size.H;
    f.steps = steps;
    f.reverse_from = size.groups - 1 > 0 ? size.groups - 1 : 1 << 30;
    f.aligned = H % (4 * Operand::per_word) == 0;
    f.weight_hh = stored(D * Cell::gates * H * H, 1 / std::sqrt(float(H)), 1);
    f.hidden_bias = floats(D * Cell::gates * H, 0.5f, 2);
    f.x_gates = {floats(D * N * Cell::gates * H, 1, 3), N * Cell::gates * H, Cell::gates * H, H};
    f.h0 = {stored(units, 1, 4), B * H, H};
    f.c0 = {stored(units, 1, 5), B * H, H};
    const S* const d_output = stored(D * N * H, 1, 6);
    const StateOf<const S> d_h_n{stored(units, 1, 7), B * H, H},
        d_c_n{stored(units, 1, 8), B * H, H};
    const std::int64_t step = steps.offset ? H : B * H;
    for (int k = 0; k < 2; ++k) {
      f.hidden = {memory.poisoned<S>(D * N * H), N * H, step, H};
      f.cell = {memory.poisoned<float>(D * N * H), N * H, step, H};
      f.saved = {memory.poisoned<float>(D * N * Cell::saved * H), N * Cell::saved * H,
                 Cell::saved * H, H};
      f.h_n = {memory.poisoned<S>(units), B * H, H};
      f.c_n = {memory.poisoned<S>(units), B * H, H};
      forward[k] = f;
      Backward<S>& b = backward[k];
      b.team.units = size.H;
      b.steps = steps;
      b.reverse_from = f.reverse_from;
      b.weight_hh = f.weight_hh;
      b.hidden = {forward[0].hidden.data, N * H, step,
                  H};  // both passes back from the same forward
      b.cell = {forward[0].cell.data, N * H, step, H};
      b.saved = {forward[0].saved.data, N * Cell::saved * H, Cell::saved * H, H};
      b.h0 = f.h0, b.c0 = f.c0;
      b.d_output = {d_output, N * H, step, H};
      b.d_h_n = d_h_n, b.d_c_n = d_c_n;
      b.d_gates = {memory.poisoned<S>(D * N * Cell::gradients * H), N * Cell::gradients * H,
                   Cell::gradients * H, H};
      b.d_h0 = {memory.poisoned<S>(units), B * H, H};
      b.d_c0 = {memory.poisoned<S>(units), B * H, H};
    }
  }

  unsigned grid() const { return static_cast<unsigned>((units + 255) / 256); }

  void run_plain() {
    float* h[2] = {memory.take<float>(units), memory.take<float>(units)};
    float* const c = memory.take<float>(units);
    load_states(forward[0].h0.data, forward[0].c0.data, h[0], c);
    for (int s = 0; s < size.T; ++s)
      plain_forward<Cell, Operand>
          <<<grid(), 256>>>(forward[0], size.groups, s, h[s & 1], h[(s + 1) & 1], c);
    store_states(h[size.T & 1], c, forward[0].h_n.data, forward[0].c_n.data);
    float* const product = memory.take<float>(units);
    float* const out = memory.take<float>(units * Cell::gates);
    check(cudaMemset(product, 0, static_cast<std::size_t>(units) * 4), "cudaMemset");
    load_states(backward[0].d_h_n.data, backward[0].d_c_n.data, h[0], c);
    for (int s = 0; s < size.T; ++s) {
      plain_backward<Cell, Operand>
          <<<grid(), 256>>>(backward[0], size.groups, s, h[0], c, product, out);
      plain_product<Cell, Operand><<<grid(), 256>>>(backward[0], size.groups, out, product);
    }
    add(h[0], product);
    store_states(h[0], c, backward[0].d_h0.data, backward[0].d_c0.data);
    check(cudaGetLastError(), "the plain kernels");
    check(cudaDeviceSynchronize(), "the plain kernels");
  }

 private:
  const S* stored(std::int64_t n, float scale, unsigned seed) {
    S* const to = memory.take<S>(n);
    fill_stored<Operand><<<512, 256>>>(to, n, scale, seed);
    return to;
  }
  const float* floats(std::int64_t n, float scale, unsigned seed) {
    float* const to = memory.take<float>(n);
    fill_floats<<<512, 256>>>(to, n, scale, seed);
    return to;
  }
  void choose_rows() {
    steps.T = size.T, steps.B = size.B;
    N = std::int64_t(size.T) * size.B;
    if (!size.rows) return;
    std::vector<std::int64_t> active, offset;
    N = 0;
    for (int t = 0; t < size.T; ++t) {  // the first row is full, the last ends early
      const std::int64_t n = 1 + std::int64_t(size.B - 1) * (size.T - t) / size.T;
      active.push_back(n), offset.push_back(N);
      N += n;
    }
    std::vector<std::uint8_t> fresh(static_cast<std::size_t>(N));
    for (std::size_t i = 0; i < fresh.size(); ++i) fresh[i] = i * 2654435761u % 7 == 0;
    steps.active = memory.copied(active);
    steps.offset = steps.position = memory.copied(offset);
    steps.fresh = memory.copied(fresh);
  }
  // Few values: through the host.
  void load_states(const S* h_from, const S* c_from, float* h, float* c) {
    for (const auto& [from, to] : {std::pair{h_from, h}, std::pair{c_from, c}}) {
      std::vector<float> values;
      for (const S s : fetched(from, units)) values.push_back(Operand::load(s));
      check(cudaMemcpy(to, values.data(), values.size() * 4, cudaMemcpyHostToDevice), "copy");
    }
  }
  void store_states(const float* h, const float* c, S* h_to, S* c_to) {
    for (const auto& [from, to] : {std::pair{h, h_to}, std::pair{c, c_to}}) {
      std::vector<S> values;
      for (const float x : fetched(from, units)) values.push_back(Operand::store(x));
      check(cudaMemcpy(to, values.data(), values.size() * sizeof(S), cudaMemcpyHostToDevice),
            "copy");
    }
  }
  void add(float* to, const float* more) {
    std::vector<float> a = fetched(to, units), b = fetched(more, units);
    for (std::size_t i = 0; i < a.size(); ++i) a[i] += b[i];
    check(cudaMemcpy(to, a.data(), a.size() * 4, cudaMemcpyHostToDevice), "copy");
  }
};

// The largest difference over the largest value; a NaN on one side alone is infinitely far.
template <class T, class Load>
double difference(const T* got, const T* expected, std::int64_t n, Load load) {
  const std::vector<T> a = fetched(got, n), b = fetched(expected, n);
  double most = 0, largest = 1e-3;
  for (std::size_t i = 0; i < a.size(); ++i) {
    const double x = load(a[i]), y = load(b[i]);
    if (std::isnan(x) && std::isnan(y)) continue;
    const double d = std::fabs(x - y);
    if (!(d <= most)) most = std::isnan(d) ? INFINITY : d;
    largest = std::fmax(largest, std::fabs(y));
  }
  return most / largest;
}

template <class Cell, class Operand>
double forward_error(const Case<Cell, Operand>& c) {
  const auto stored = [](Storage<Operand> s) { return double(Operand::load(s)); };
  const auto plain = [](float x) { return double(x); };
  const std::int64_t n = c.size.groups * c.N * c.size.H;
  const auto &a = c.forward[1], &b = c.forward[0];
  double most = difference(a.hidden.data, b.hidden.data, n, stored);
  most = std::fmax(most, difference(a.h_n.data, b.h_n.data, c.units, stored));
  most = std::fmax(most, difference(a.saved.data, b.saved.data, n * Cell::saved, plain));
  if (Cell::states > 1) {
    most = std::fmax(most, difference(a.cell.data, b.cell.data, n, plain));
    most = std::fmax(most, difference(a.c_n.data, b.c_n.data, c.units, stored));
  }
  return most;
}

template <class Cell, class Operand>
double backward_error(const Case<Cell, Operand>& c) {
  const auto stored = [](Storage<Operand> s) { return double(Operand::load(s)); };
  const std::int64_t n = c.size.groups * c.N * c.size.H;
  const auto &a = c.backward[1], &b = c.backward[0];
  double most = difference(a.d_gates.data, b.d_gates.data, n * Cell::gradients, stored);
  most = std::fmax(most, difference(a.d_h0.data, b.d_h0.data, c.units, stored));
  if (Cell::states > 1)
    most = std::fmax(most, difference(a.d_c0.data, b.d_c0.data, c.units, stored));
  return most;
}

template <class S>
void launch(const Plan& plan, const Forward<S>& arrays, void* workspace) {
  launch_forward(plan, arrays, workspace, nullptr);
}
template <class S>
void launch(const Plan& plan, const Backward<S>& arrays, void* workspace) {
  launch_backward(plan, arrays, workspace, nullptr);
}

// One pass by one way of exchange: its error, twice the same bits, its time.
template <class Cell, class Operand, class Arrays, class Error, class Written>
void check_pass(ladder::Report& report, Case<Cell, Operand>& c, Pass pass, Via via, bool timed,
                const Arrays& arrays, double tolerance, Error error, Written written) {
  const Size& s = c.size;
  const Plan plan =
      plan_persistent_by(via, {Cell::name, kind_of<Operand>, pass, s.T, s.B, s.H, s.groups});
  const std::string what =
      std::string(Cell::name) + (pass == Pass::forward ? " forward" : " backward") + " T" +
      std::to_string(s.T) + " B" + std::to_string(s.B) + " H" + std::to_string(s.H) +
      (s.groups > 1 ? " two directions" : "") + ", " + name_of(via);
  if (!plan.kernel) return;
  void* const workspace = c.memory.template take<char>(std::int64_t(plan.workspace_bytes) + 16);
  launch(plan, arrays, workspace);
  check(cudaDeviceSynchronize(), what.c_str());
  const double found = error();
  const auto first = written();
  launch(plan, arrays, workspace);
  const bool same = first == written();
  const bool right = found <= tolerance && same;
  failures += !right;
  report.add(what + ", " + plan.why +
                 (right  ? ""
                  : same ? ", WRONG"
                         : ", NOT REPEATABLE"),
             found, "largest error");
  if (!timed) return;
  const double ms = ladder::median_ms([&] { launch(plan, arrays, workspace); });
  report.add("  time", ms * 1e3 / s.T, "us a step");
  report.add("  estimate at 1.75 GHz", plan.clocks / 1750, "us a step");
}

template <class Cell, class Operand>
void check_size(ladder::Report& report, const Size& size, bool timed) {
  Case<Cell, Operand> c(size);
  c.run_plain();
  for (const Via via : {Via::block, Via::cluster, Via::ring}) {
    check_pass(
        report, c, Pass::forward, via, timed, c.forward[1], Precision<Operand>::forward,
        [&] { return forward_error(c); },
        [&] {
          return fetched(reinterpret_cast<const unsigned char*>(c.forward[1].hidden.data),
                         c.size.groups * c.N * c.size.H * sizeof(Storage<Operand>));
        });
    check_pass(
        report, c, Pass::backward, via, timed, c.backward[1], Precision<Operand>::backward,
        [&] { return backward_error(c); },
        [&] {
          return fetched(
              reinterpret_cast<const unsigned char*>(c.backward[1].d_gates.data),
              c.size.groups * c.N * c.size.H * Cell::gradients * sizeof(Storage<Operand>));
        });
  }
}

template <class Cell, class Operand>
void check_all(ladder::Report& report, const char* operand, bool small) {
  report.note(std::string(Cell::name) + ", " + operand, "---");
  check_size<Cell, Operand>(report, {5, 11, 60, 2, true}, false);
  if (small) return;
  for (const Size& size : {Size{40, 1, 64, 1, false}, Size{17, 33, 100, 2, true},
                           Size{12, 70, 300, 2, true}, Size{9, 20, 1000, 1, true}})
    check_size<Cell, Operand>(report, size, false);
  for (const int H : {128, 256, 512, 768, 1024, 1536, 2048})
    for (const int B : {1, 16, 64}) check_size<Cell, Operand>(report, {100, B, H, 1, false}, true);
}

// All operands; what is known is written after each, as the time may end before the last.
template <class Cell>
void check_cell(ladder::Report& report, bool small, const char* json) {
  const auto check = [&](auto operand, const char* name) {
    check_all<Cell, decltype(operand)>(report, name, small);
    if (json) report.write(json);
  };
  check(BFloat16{}, "bfloat16");
  check(Float16{}, "float16");
  check(Tf32{}, "TF32");
  check(Float32{}, "3xTF32");
}

}  // namespace

int main(int count, char** arguments) try {
  bool small = false;
  const char* json = nullptr;
  for (int i = 1; i < count; ++i) {
    if (!std::strcmp(arguments[i], "--small"))
      small = true;
    else if (!std::strcmp(arguments[i], "--json") && i + 1 < count)
      json = arguments[++i];
    else {
      std::fprintf(stderr, "persistent_check: %s is not known; [--small] [--json FILE]\n",
                   arguments[i]);
      return 2;
    }
  }
  if (!ladder::has_device()) return ladder::kNoDevice;
  ladder::Report report;
  for (const auto check : {check_cell<Lstm>, check_cell<Gru>, check_cell<Elman>})
    check(report, small, json);
  std::printf("%d failures\n", failures);
  return failures ? 1 : 0;
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
