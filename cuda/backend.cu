// CUDA's backend: check → guard → stream → dispatch → launch → check the launch.
//
// The caller owns all memory, including the workspace. This code allocates nothing and does not
// synchronise with the device, so a call can be captured into a graph. It keeps between calls one
// cuBLASLt handle per device, and the device properties that it read to choose persistent kernels.
#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

#include "backend.h"
#include "cuda_info.h"
#include "stack.h"
#include "status.h"

namespace fastrnn {
namespace {

using cuda::Index;
using cuda::Stack;

void check(cudaError_t status, const char* what) { cuda::require(status, "", what); }

// Makes the arrays' device current during its lifetime.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&before_), "cannot determine the current CUDA device");
    if (device != before_) check(cudaSetDevice(device), "cannot select the CUDA device");
    changed_ = device != before_;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

std::string case_text(const Problem& p, Pass pass) {
  static constexpr const char* types[] = {"float32", "float64", "bfloat16", "float16"};
  const auto number = [](const char* name, Index value) {
    return std::string(", ") + name + " " + std::to_string(value);
  };
  return p.options.cell + (pass == Pass::forward ? " forward" : " backward") + ", " +
         types[static_cast<int>(p.dtype)] + number("T", p.T) + number("B", p.B) + number("I", p.I) +
         number("H", p.H) + number("layers", p.options.layers) + number("device", p.device);
}

// Calls f(stack) on the device of the arrays, and adds the case to the messages of errors.
template <class F>
auto on_device(const Problem& p, Pass pass, const F& f) {
  try {
    const DeviceGuard guard(p.device);
    Stack stack(p, pass);
    return f(stack);
  } catch (const std::runtime_error& error) {
    throw std::runtime_error(case_text(p, pass) + ": " + error.what());
  }
}

void run(const Problem& p, Pass pass) {
  on_device(p, pass,
            [&](Stack& stack) { pass == Pass::forward ? stack.forward() : stack.backward(); });
}

std::size_t workspace_size(const Problem& p, Pass pass) {
  return on_device(p, pass, [](const Stack& stack) { return stack.workspace_size(); });
}
void forward(const Problem& p) { run(p, Pass::forward); }
void backward(const Problem& p) { run(p, Pass::backward); }

}  // namespace

const Backend& cuda_backend() {
  static constexpr Backend backend{workspace_size, nullptr,  nullptr, nullptr,
                                   forward,        backward, nullptr, nullptr};
  return backend;
}

CudaKernels cuda_kernels(const Problem& p, Pass pass) {
  return on_device(p, pass, [](const Stack& stack) {
    return CudaKernels{stack.plan().kernel != nullptr, stack.plan().why};
  });
}

CudaKernels cuda_kernels_on_h200(const Problem& p, Pass pass) {
  const Stack stack(p, pass, [](const persistent::Sizes& sizes) {
    int count = 0;
    const persistent::Kernel* const all = persistent::kernels(&count);
    if (count == 0) return persistent::plan_persistent(sizes);  // says why there are none
    return persistent::choose_kernel(sizes, persistent::h200(), all, count);
  });
  return {stack.plan().kernel != nullptr, stack.plan().why};
}

}  // namespace fastrnn
