// Replaces launch.cu in builds without the persistent kernels (FASTRNN_CUDA_PERSISTENT): no case
// has a kernel.
#include <stdexcept>

#include "persistent.h"

namespace fastrnn::persistent {
namespace {

constexpr const char* kAbsent =
    "this build has no persistent kernels; build with FASTRNN_CUDA_PERSISTENT=ON";

Plan no_plan() {
  Plan plan;
  plan.why = kAbsent;
  return plan;
}

[[noreturn]] void refuse() { throw std::runtime_error(kAbsent); }

}  // namespace

const Kernel* kernels(int* count) {
  *count = 0;
  return nullptr;
}

Plan plan_persistent(const Sizes&) { return no_plan(); }

void launch_forward(const Plan&, Forward<std::uint16_t>, void*, void*) { refuse(); }
void launch_forward(const Plan&, Forward<float>, void*, void*) { refuse(); }
void launch_backward(const Plan&, Backward<std::uint16_t>, void*, void*) { refuse(); }
void launch_backward(const Plan&, Backward<float>, void*, void*) { refuse(); }

}  // namespace fastrnn::persistent
