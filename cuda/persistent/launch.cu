// Persistent kernels: what the device can hold, and the launches (persistent.h).
#include <vector>

#include "persistent.h"

namespace fastrnn::resident {

// Of *_*.cu, one for each cell and operand.
#define FASTRNN_UNITS(f)                                                                          \
  f(lstm_bf16) f(lstm_f16) f(lstm_tf32) f(lstm_f32) f(gru_bf16) f(gru_f16) f(gru_tf32) f(gru_f32) \
      f(rnn_bf16) f(rnn_f16) f(rnn_tf32) f(rnn_f32)
#define FASTRNN_DECLARE(unit) const Kernel* unit##_kernels(int* count);
FASTRNN_UNITS(FASTRNN_DECLARE)

const Kernel* kernels(int* count) {
  static const std::vector<Kernel> all = [] {
    std::vector<Kernel> found;
    const auto add = [&](const Kernel* (*list)(int*)) {
      int n = 0;
      const Kernel* const first = list(&n);
      found.insert(found.end(), first, first + n);
    };
#define FASTRNN_ADD(unit) add(unit##_kernels);
    FASTRNN_UNITS(FASTRNN_ADD)
    return found;
  }();
  *count = static_cast<int>(all.size());
  return all.data();
}

namespace {

// The first error is the result.
class Checked {
 public:
  void operator()(cudaError_t status) {
    if (status != cudaSuccess && first_ == cudaSuccess) first_ = status;
  }
  cudaError_t result() {
    if (first_ != cudaSuccess) cudaGetLastError();  // read, so that a later call does not meet it
    return first_;
  }

 private:
  cudaError_t first_ = cudaSuccess;
};

cudaError_t allow(const Kernel& kernel, int shared_bytes, int cluster) {
  Checked check;
  check(cudaFuncSetAttribute(kernel.function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             shared_bytes));
  if (cluster > 8)
    check(cudaFuncSetAttribute(kernel.function, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
  return check.result();
}

// A launch, with room for its attributes.
struct Launch {
  cudaLaunchConfig_t config{};
  cudaLaunchAttribute attributes[1]{};

  Launch(Via via, int blocks, int blocks_of_team, int shared_bytes, cudaStream_t stream) {
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = static_cast<std::size_t>(shared_bytes);
    config.stream = stream;
    config.attrs = attributes;
    if (via == Via::ring) {
      attributes[0].id = cudaLaunchAttributeCooperative;
      attributes[0].val.cooperative = 1;
      config.numAttrs = 1;
    } else if (via == Via::cluster) {
      attributes[0].id = cudaLaunchAttributeClusterDimension;
      attributes[0].val.clusterDim.x = static_cast<unsigned>(blocks_of_team);
      attributes[0].val.clusterDim.y = attributes[0].val.clusterDim.z = 1;
      config.numAttrs = 1;
    }
  }
  Launch(const Launch&) = delete;
};

int clusters_at_once(const Kernel& kernel, int blocks, int shared_bytes) {
  if (allow(kernel, shared_bytes, blocks) != cudaSuccess) return 0;
  Launch launch(Via::cluster, blocks, blocks, shared_bytes, nullptr);
  int count = 0;
  if (cudaOccupancyMaxActiveClusters(&count, kernel.function, &launch.config) != cudaSuccess) {
    cudaGetLastError();
    return 0;
  }
  return count;
}

// Clusters by a kernel that takes all of a multiprocessor, as all of them do.
void ask_clusters(DeviceFacts* facts) {
  int count = 0;
  const Kernel* const all = kernels(&count);
  for (int i = 0; i < count; ++i) {
    if (all[i].shape.via != Via::cluster) continue;
    facts->clusters_of_16 = clusters_at_once(all[i], 16, facts->shared_bytes);
    facts->clusters_of_8 = clusters_at_once(all[i], 8, facts->shared_bytes);
    return;
  }
}

cudaError_t read_facts(DeviceFacts* facts) {
  Checked check;
  int device = 0, cooperative = 0, cache = 0;
  check(cudaGetDevice(&device));
  const auto read = [&](int* to, cudaDeviceAttr which) {
    check(cudaDeviceGetAttribute(to, which, device));
  };
  read(&facts->multiprocessors, cudaDevAttrMultiProcessorCount);
  read(&facts->shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  read(&facts->compute_major, cudaDevAttrComputeCapabilityMajor);
  read(&cooperative, cudaDevAttrCooperativeLaunch);
  read(&cache, cudaDevAttrL2CacheSize);
  facts->cooperative = cooperative != 0;
  facts->cache_bytes = static_cast<std::size_t>(cache);
  const cudaError_t status = check.result();
  if (status == cudaSuccess && facts->compute_major >= 9) ask_clusters(facts);
  return status;
}

// All blocks of a ring resident at once, by what this kernel takes on this device.
cudaError_t check_resident(Plan* plan, const DeviceFacts& facts) {
  const Kernel& kernel = *plan->kernel;
  if (const cudaError_t failed = allow(kernel, plan->shared_bytes, plan->team.blocks);
      failed != cudaSuccess)
    return failed;
  if (kernel.shape.via != Via::ring) return cudaSuccess;
  int each = 0;
  Checked check;
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(
      &each, kernel.function, kThreads, static_cast<std::size_t>(plan->shared_bytes)));
  if (const cudaError_t failed = check.result(); failed != cudaSuccess) return failed;
  if (each * facts.multiprocessors < plan->blocks) {
    plan->kernel = nullptr;
    plan->why = "its blocks cannot all run at once on this device";
  }
  return cudaSuccess;
}

template <class Arrays>
cudaError_t launch(const Plan& plan, Arrays arrays, Pass pass, void* workspace,
                   cudaStream_t stream) {
  if (!plan.kernel || plan.kernel->pass != pass) return cudaErrorInvalidValue;
  const Kernel& kernel = *plan.kernel;
  arrays.team = plan.team;
  arrays.team.ring_words = static_cast<u32*>(workspace);
  if (const cudaError_t failed = allow(kernel, plan.shared_bytes, plan.team.blocks);
      failed != cudaSuccess)
    return failed;
  Checked check;
  if (plan.workspace_bytes)  // every word the sentinel
    check(cudaMemsetAsync(workspace, 0xff, plan.workspace_bytes, stream));
  Launch launch(kernel.shape.via, plan.blocks, plan.team.blocks, plan.shared_bytes, stream);
  void* arguments[] = {&arrays};
  check(cudaLaunchKernelExC(&launch.config, kernel.function, arguments));
  return check.result();
}

bool is_half(const Plan& plan) {
  return plan.kernel && (plan.kernel->operand == OperandKind::bfloat16 ||
                         plan.kernel->operand == OperandKind::float16);
}

}  // namespace

cudaError_t plan_persistent(const Sizes& sizes, Plan* plan, const Via* only) {
  DeviceFacts facts;
  if (const cudaError_t failed = read_facts(&facts); failed != cudaSuccess) return failed;
  int count = 0;
  const Kernel* const all = kernels(&count);
  *plan = choose_kernel(sizes, facts, all, count, only);
  return plan->kernel ? check_resident(plan, facts) : cudaSuccess;
}

cudaError_t launch_forward(const Plan& plan, Forward<std::uint16_t> arrays, void* workspace,
                           cudaStream_t stream) {
  if (!is_half(plan)) return cudaErrorInvalidValue;
  return launch(plan, arrays, Pass::forward, workspace, stream);
}

cudaError_t launch_forward(const Plan& plan, Forward<float> arrays, void* workspace,
                           cudaStream_t stream) {
  if (is_half(plan)) return cudaErrorInvalidValue;
  return launch(plan, arrays, Pass::forward, workspace, stream);
}

cudaError_t launch_backward(const Plan& plan, Backward<std::uint16_t> arrays, void* workspace,
                            cudaStream_t stream) {
  if (!is_half(plan)) return cudaErrorInvalidValue;
  return launch(plan, arrays, Pass::backward, workspace, stream);
}

cudaError_t launch_backward(const Plan& plan, Backward<float> arrays, void* workspace,
                            cudaStream_t stream) {
  if (is_half(plan)) return cudaErrorInvalidValue;
  return launch(plan, arrays, Pass::backward, workspace, stream);
}

}  // namespace fastrnn::resident
