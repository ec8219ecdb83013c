// The source of the CUDA kernels on the CPU (emulator.h), compared with the CPU engine: random
// stacks, sizes, rows, strides and gradients, in every storage type; and the same bits in every
// order of threads and blocks. Layers also run with persistent kernels (host_persistent.h).
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "cases.h"
#include "emulator.h"
#include "host_persistent.h"
#include "stack.h"

namespace {

using namespace fastrnn;
using namespace fastrnn::cases;
using cuda::Order;

const Backend& emulated_backend() {
  static constexpr Backend backend =
      backend_of([](const Problem& p, Pass pass) { return cuda::Stack(p, pass).workspace_size(); },
                 [](const Problem& p) { cuda::Stack(p, Pass::forward).forward(); },
                 [](const Problem& p) { cuda::Stack(p, Pass::backward).backward(); });
  return backend;
}

// ---- the checks ---------------------------------------------------------------------------------

template <class S>
void check_case(const char* type, const Case& c, Random& random, double tolerance) {
  check::context() = std::string(type) + " " + c.text();
  Arrays<S> expected = random_arrays<S>(c, random), got = expected;
  run_reference(c, expected);
  cuda::emulator().order = Order::forwards;
  run(emulated_backend(), c, got);
  compare_all(c, got, expected, tolerance);
  for (const Order order : {Order::backwards, Order::shuffled}) {
    Arrays<S> again = got;
    cuda::emulator().order = order;
    run(emulated_backend(), c, again);
    same_bits_of_all(c, got, again);
  }
}

template <class S>
void check_type(const char* type, double tolerance, bool smooth, int cases) {
  Random random(static_cast<unsigned>(sizeof(S)) * 100 + (tolerance > 1e-2));
  for (int k = 0; k < cases; ++k)
    check_case<S>(type, random_case(random, smooth, k % 8 == 7), random, tolerance);
  std::printf("%s: %d cases, %d failures so far\n", type, cases, check::failures());
}

// ---- layers with persistent kernels -------------------------------------------------------------

// Why a layer of the case has no persistent kernel; empty: it has one.
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

// Whether a layer of the case has a persistent kernel: always with a single head; with several
// heads if the blocks of all heads fit.
template <class S>
bool has_one(const Case& c, Pass pass) {
  const bool known = !c.P() && c.options.maths.reset_after && c.B > 0;
  return known && (c.heads() == 1 || reason(c, dtype_of<S>(), pass).empty());
}

template <class S>
void check_persistent_type(const char* type, double tolerance, bool tf32, int cases) {
  Random random(static_cast<unsigned>(sizeof(S)) * 1000 + tf32 + (tolerance > 1e-2));
  long expected = 0, of_heads = 0;
  const long before = persistent::persistent_launches();
  for (int k = 0; k < cases; ++k) {
    Case c = random_case(random, true, false);
    c.persistent = true, c.tf32 = tf32;
    if (k % 8) c.options.proj_size = 0, c.options.maths.reset_after = true;
    check_case<S>(type, c, random, tolerance);
    // check_case runs it three times. With several heads each direction is a separate launch.
    const std::int64_t launches = c.L() * (c.heads() > 1 ? c.D() : 1);
    if (has_one<S>(c, Pass::forward)) expected += 3 * launches, of_heads += c.heads() > 1;
    if (c.training && has_one<S>(c, Pass::backward)) expected += 3 * launches;
  }
  check::context() = type;
  ++checks;
  check::that("every layer that can has a persistent kernel",
              persistent::persistent_launches() - before == expected);
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
  expect(reason(c, DType::f32, Pass::forward), "persistent kernels are not requested");
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

// Lengths outside 0…T, which the host cannot check, are clamped.
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

// kernels_test [PERCENT [persistent]]: runs PERCENT of the random cases, by default all; with
// `persistent` those with persistent kernels, otherwise the others.
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
  std::printf("%ld launches\n", cuda::emulator().launches);
  return check::result("kernels_test", checks);
}
