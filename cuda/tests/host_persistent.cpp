#include "host_persistent.h"

#include <stdexcept>
#include <vector>

#include "../persistent/tests/host_launch.h"
#include "persistent.h"

namespace fastrnn::persistent {
namespace {

long launches = 0;

// The launch functions of a kernel; one of the two is null.
template <class S>
struct Launcher {
  void (*forward)(const Plan&, const Forward<S>&, u32* ring) = nullptr;
  void (*backward)(const Plan&, const Backward<S>&, u32* ring) = nullptr;
};

template <class C>
void run_forward(const Plan& plan, const Forward<Storage<typename C::Operand>>& arrays, u32* ring) {
  launch_on_host(plan, arrays, ring, 0,
                 [](HostMachine& machine, const auto& a) { forward<C>(machine, a); });
}
template <class C>
void run_backward(const Plan& plan, const Backward<Storage<typename C::Operand>>& arrays,
                  u32* ring) {
  launch_on_host(plan, arrays, ring, 0,
                 [](HostMachine& machine, const auto& a) { backward<C>(machine, a); });
}

// Kernel::function points to a Launcher.
template <class F, class B>
void add(std::vector<Kernel>& all) {
  using S = Storage<typename F::Operand>;
  static const Launcher<S> forth{run_forward<F>, nullptr}, back{nullptr, run_backward<B>};
  all.push_back(kernel_of<F>(Pass::forward, &forth));
  all.push_back(kernel_of<B>(Pass::backward, &back));
}

// Each operand type uses one way of exchange; cuda/persistent/tests tests all combinations.
template <class Cell>
void add_cell(std::vector<Kernel>& all) {
  constexpr int G = Cell::gates;
  add<Config<Cell, Float32, Via::ring, G, 1, 1, 1, 2>,
      Config<Cell, Float32, Via::ring, 1, 1, 1, 2, 2>>(all);
  add<Config<Cell, Tf32, Via::cluster, G, 2, 1, 1, 1>,
      Config<Cell, Tf32, Via::cluster, 1, 2, 3, 5, 1>>(all);
  add<Config<Cell, BFloat16, Via::block, G, 8, 3, 1, 1>,
      Config<Cell, BFloat16, Via::block, 1, 8, 15, 1, 1>>(all);
  add<Config<Cell, Float16, Via::ring, G, 1, 1, 1, 1>,
      Config<Cell, Float16, Via::ring, 1, 1, 1, 1, 1>>(all);
}

const std::vector<Kernel>& list() {
  static const std::vector<Kernel> all = [] {
    std::vector<Kernel> found;
    add_cell<Lstm>(found);
    add_cell<Gru>(found);
    add_cell<Elman>(found);
    return found;
  }();
  return all;
}

template <class S>
const Launcher<S>& launcher(const Plan& plan, Pass pass) {
  if (!plan.kernel || plan.kernel->pass != pass ||
      (plan.kernel->config.per_word == 2) != (sizeof(S) == 2))
    throw std::invalid_argument("the plan is not of these arrays");
  ++launches;
  return *static_cast<const Launcher<S>*>(plan.kernel->function);
}

}  // namespace

long persistent_launches() { return launches; }

const Kernel* kernels(int* count) {
  *count = static_cast<int>(list().size());
  return list().data();
}

Plan plan_persistent(const Sizes& sizes) {
  return choose_kernel(sizes, small_device(), list().data(), static_cast<int>(list().size()));
}

void launch_forward(const Plan& plan, Forward<std::uint16_t> arrays, void* workspace, void*) {
  launcher<std::uint16_t>(plan, Pass::forward).forward(plan, arrays, static_cast<u32*>(workspace));
}
void launch_forward(const Plan& plan, Forward<float> arrays, void* workspace, void*) {
  launcher<float>(plan, Pass::forward).forward(plan, arrays, static_cast<u32*>(workspace));
}
void launch_backward(const Plan& plan, Backward<std::uint16_t> arrays, void* workspace, void*) {
  launcher<std::uint16_t>(plan, Pass::backward)
      .backward(plan, arrays, static_cast<u32*>(workspace));
}
void launch_backward(const Plan& plan, Backward<float> arrays, void* workspace, void*) {
  launcher<float>(plan, Pass::backward).backward(plan, arrays, static_cast<u32*>(workspace));
}

}  // namespace fastrnn::persistent
