// The source of the persistent kernels on the CPU (host_machine.h), compared with plain loops: each
// cell, operand and way of exchange, forward and backward, with sizes that are no multiples of the
// tiles, rows of unequal lengths, resets, two directions; and the same bits for all delays of
// blocks.
#include <cstdio>
#include <cstring>
#include <type_traits>

#include "../../../csrc/tests/check.h"
#include "host_launch.h"
#include "reference.h"

namespace {

using namespace fastrnn;
using namespace fastrnn::persistent;

long checks = 0;

struct Run {
  unsigned delays = 0;
  int period = 0;  // zero: the plan's
};

template <class C>
Plan plan_of(Pass pass, int T, int B, int H, int groups) {
  static const Kernel forward = kernel_of<C>(Pass::forward, nullptr);
  static const Kernel backward = kernel_of<C>(Pass::backward, nullptr);
  const Kernel& kernel = pass == Pass::forward ? forward : backward;
  return plan_for(kernel, {C::Cell::name, kernel.operand, pass, T, B, H, groups}, small_device());
}

template <class Arrays, class Body>
void launch(Plan plan, const Arrays& arrays, const Run& how, Body body) {
  if (how.period) plan.team.period = how.period;
  std::vector<u32> ring(ring_words(plan));
  launch_on_host(plan, arrays, ring.data(), how.delays, body);
}

template <class F, class B>
bool run(Trial<typename F::Cell, typename F::Operand>& p, const Run& how) {
  const Plan forth = plan_of<F>(Pass::forward, p.T, p.B, p.H, p.groups);
  const Plan back = plan_of<B>(Pass::backward, p.T, p.B, p.H, p.groups);
  check::that(("a plan: " + forth.why + "; " + back.why).c_str(), forth.kernel && back.kernel);
  if (!forth.kernel || !back.kernel) return false;
  const StepTable steps = table_of(p);
  launch(forth, forward_arrays(p, steps, true, in_place), how,
         [](HostMachine& machine, const auto& a) { forward<F>(machine, a); });
  launch(back, backward_arrays(p, steps, in_place), how,
         [](HostMachine& machine, const auto& a) { backward<B>(machine, a); });
  return true;
}

template <class T>
void same_bits(const char* what, const std::vector<T>& a, const std::vector<T>& b) {
  ++checks;
  check::that(what, std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

// Sizes: even and odd H, one tile and a part of a tile, fewer rows than a tile and more than a
// pass.
struct Sizes3 {
  int T, B, H;
};

template <class F, class B>
void check_config(const char* name, const std::vector<Sizes3>& sizes) {
  unsigned seed = 1;
  for (const Sizes3& size : sizes) {
    Trial<typename F::Cell, typename F::Operand> p;
    p.T = size.T, p.B = size.B, p.H = size.H;
    p.groups = seed % 3 == 0 ? 2 : 1;
    p.reverse_from = seed % 2 == 0 ? p.groups - 1 : 1 << 30;
    p.states = seed % 4 != 3;
    choose_rows(p, seed % 2 == 0, seed % 3 != 1, seed);
    fill(p, seed);
    check::context() = std::string(name) + " " + p.text();
    auto again = p;
    if (!run<F, B>(p, {})) continue;
    checks += compare(p, Reference<typename F::Cell, typename F::Operand>(p).run());
    if (run<F, B>(again, {50 + 20 * seed, 1})) {
      same_bits("hidden after delays", again.hidden, p.hidden);
      same_bits("saved after delays", again.saved, p.saved);
      same_bits("d_gates after delays", again.d_gates, p.d_gates);
      same_bits("d_h0 after delays", again.d_h0, p.d_h0);
    }
    ++seed;
  }
  std::printf("%s: %d failures so far\n", name, check::failures());
}

const std::vector<Sizes3> kRing = {{7, 3, 21}, {5, 17, 40}, {6, 33, 33}, {40, 9, 16}};
const std::vector<Sizes3> kCluster = {{7, 3, 37}, {5, 17, 70}, {6, 9, 64}};
const std::vector<Sizes3> kBlock = {{7, 3, 21}, {5, 17, 40}, {6, 9, 64}};

// Uses chunks in registers and in shared memory, and several chunks per slice if H allows it.
template <class Cell, class Operand>
void check_cell(const char* name, const char* operand) {
  constexpr int G = Cell::gates;
  const std::string text = std::string(name) + " " + operand + " ";
  check_config<Config<Cell, Operand, Via::ring, G, 1, 1, 1, 2>,
               Config<Cell, Operand, Via::ring, 1, 1, 1, 2, 2>>((text + "ring").c_str(), kRing);
  check_config<Config<Cell, Operand, Via::cluster, G, 2, 1, 1, 1>,
               Config<Cell, Operand, Via::cluster, 1, 2, 3, 5, 1>>((text + "cluster").c_str(),
                                                                   kCluster);
  check_config<Config<Cell, Operand, Via::block, G, 8, 3, 1, 1>,
               Config<Cell, Operand, Via::block, 1, 8, 32, 1, 1>>((text + "block").c_str(), kBlock);
}

enum class Part { LSTM, GRU, RNN, smallest };

template <Part part>
void check_part() {
  if constexpr (part == Part::LSTM) {
    check_cell<Lstm, BFloat16>("LSTM", "bfloat16");
    check_cell<Lstm, Float32>("LSTM", "3xTF32");
    check_cell<Lstm, Float16>("LSTM", "float16");
    check_cell<Lstm, Tf32>("LSTM", "TF32");
  } else if constexpr (part != Part::smallest) {  // the others differ only in the cell
    using Cell = std::conditional_t<part == Part::GRU, Gru, Elman>;
    check_cell<Cell, BFloat16>(Cell::name, "bfloat16");
    check_cell<Cell, Float32>(Cell::name, "3xTF32");
  } else {  // every way of exchange once: for sanitizers, which are slow
    check_config<Config<Gru, BFloat16, Via::ring, 3, 1, 1, 1, 1>,
                 Config<Gru, BFloat16, Via::ring, 1, 1, 1, 1, 1>>("ring", {{5, 9, 20}});
    check_config<Config<Gru, BFloat16, Via::cluster, 3, 2, 1, 1, 1>,
                 Config<Gru, BFloat16, Via::cluster, 1, 2, 1, 1, 1>>("cluster", {{5, 9, 40}});
    check_config<Config<Gru, BFloat16, Via::block, 3, 8, 1, 1, 1>,
                 Config<Gru, BFloat16, Via::block, 1, 8, 16, 1, 1>>("block", {{3, 9, 20}});
  }
}

}  // namespace

// FASTRNN_PART selects the checks of this program, so that the parts compile in parallel.
int main() {
  check_part<Part::FASTRNN_PART>();
  return check::result("persistent kernels", checks);
}
