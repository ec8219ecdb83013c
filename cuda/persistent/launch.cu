// Persistent kernels: the device's limits, and the launches (persistent.h).
#include <cuda_runtime_api.h>

#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "persistent.h"
#include "status.h"

namespace fastrnn::persistent {

// The translation units *_*.cu, one for each cell and operand.
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

void check(cudaError_t status, const char* what) {
  cuda::require(status, "persistent kernels: ", what);
}

// A launch configuration with its attributes.
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

// Whether this build has code of the kernel for the current device; for a cluster kernel, not the
// empty code of an architecture without clusters.
bool has_code(const Kernel& kernel) {
  cudaFuncAttributes found{};
  if (cudaFuncGetAttributes(&found, kernel.function) != cudaSuccess) {
    cudaGetLastError();
    return false;
  }
  return kernel.config.via != Via::cluster || found.ptxVersion >= 90;
}

// Allows the maximum of shared memory per block, and clusters of 16 blocks.
void allow(const Kernel& kernel, const DeviceFacts& facts) {
  check(cudaFuncSetAttribute(kernel.function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             facts.shared_bytes),
        "their shared memory");
  if (kernel.config.via == Via::cluster && facts.compute_major >= 9)
    check(cudaFuncSetAttribute(kernel.function, cudaFuncAttributeNonPortableClusterSizeAllowed, 1),
          "cannot allow clusters of 16");
}

int clusters_at_once(const Kernel& kernel, int blocks, int shared_bytes) {
  Launch launch(Via::cluster, blocks, blocks, shared_bytes, nullptr);
  int count = 0;
  if (cudaOccupancyMaxActiveClusters(&count, kernel.function, &launch.config) != cudaSuccess) {
    cudaGetLastError();
    return 0;
  }
  return count;
}

// Reads the number of clusters with a kernel that uses a whole multiprocessor, as all kernels do.
void ask_clusters(DeviceFacts* facts) {
  int count = 0;
  const Kernel* const all = kernels(&count);
  for (int i = 0; i < count; ++i) {
    if (all[i].config.via != Via::cluster) continue;
    if (!has_code(all[i])) return;
    allow(all[i], *facts);
    facts->clusters_of_16 = clusters_at_once(all[i], 16, facts->shared_bytes);
    facts->clusters_of_8 = clusters_at_once(all[i], 8, facts->shared_bytes);
    return;
  }
}

DeviceFacts read_facts(int device) {
  DeviceFacts facts;
  int cooperative = 0, cache = 0;
  const auto read = [&](int* to, cudaDeviceAttr which) {
    check(cudaDeviceGetAttribute(to, which, device), "cannot read a device attribute");
  };
  read(&facts.multiprocessors, cudaDevAttrMultiProcessorCount);
  read(&facts.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  read(&facts.compute_major, cudaDevAttrComputeCapabilityMajor);
  read(&cooperative, cudaDevAttrCooperativeLaunch);
  read(&cache, cudaDevAttrL2CacheSize);
  facts.cooperative = cooperative != 0;
  facts.cache_bytes = static_cast<std::size_t>(cache);
  if (facts.compute_major >= 9) ask_clusters(&facts);
  return facts;
}

// Removes the kernel from the plan if the device cannot run it: no code for the device, or, for a
// ring, not enough space for all blocks to be co-resident.
void check_runs(Plan* plan, const DeviceFacts& facts) {
  const Kernel& kernel = *plan->kernel;
  const auto refuse = [&](const char* why) {
    plan->kernel = nullptr;
    plan->why = why;
  };
  if (!has_code(kernel)) return refuse("this build has no code for the device");
  allow(kernel, facts);
  if (kernel.config.via != Via::ring) return;
  int each = 0;
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel.function, kThreads,
                                                      static_cast<std::size_t>(plan->shared_bytes)),
        "cannot read the number of co-resident blocks");
  if (each * facts.multiprocessors < plan->blocks)
    refuse("its blocks cannot all run at once on this device");
}

// A cache of device properties, and of the plans derived from them.
class Plans {
 public:
  Plan find(const Sizes& s) {
    int device = 0;
    check(cudaGetDevice(&device), "cannot determine the current device");
    const Case wanted{device, s.cell,  static_cast<int>(s.operand), static_cast<int>(s.pass), s.B,
                      s.H,    s.groups};
    const std::lock_guard<std::mutex> lock(mutex_);
    if (const auto found = plans_.find(wanted); found != plans_.end()) return found->second;
    const Plan plan = make(s, facts(device));
    if (plans_.size() >= kMost) plans_.clear();
    return plans_.emplace(wanted, plan).first->second;
  }

 private:
  // Device, cell, operand, pass, B, H, groups: a plan does not depend on T.
  using Case = std::tuple<int, std::string, int, int, int, int, int>;
  static constexpr std::size_t kMost = 4096;

  const DeviceFacts& facts(int device) {
    const auto found = facts_.find(device);
    return found != facts_.end() ? found->second
                                 : facts_.emplace(device, read_facts(device)).first->second;
  }
  static Plan make(const Sizes& s, const DeviceFacts& facts) {
    int count = 0;
    const Kernel* const all = kernels(&count);
    Plan plan = choose_kernel(s, facts, all, count);
    if (plan.kernel) check_runs(&plan, facts);
    return plan;
  }

  std::mutex mutex_;
  std::map<int, DeviceFacts> facts_;
  std::map<Case, Plan> plans_;
};

Plans& plans() {
  static Plans all;
  return all;
}

template <class Arrays>
void launch(const Plan& plan, Arrays& arrays, void* workspace, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  arrays.team = plan.team;
  arrays.team.ring_words = static_cast<u32*>(workspace);
  if (plan.workspace_bytes)  // sets every word to the sentinel
    check(cudaMemsetAsync(workspace, 0xff, plan.workspace_bytes, on), "cannot clear the ring");
  const Kernel& kernel = *plan.kernel;
  Launch launch(kernel.config.via, plan.blocks, plan.team.blocks, plan.shared_bytes, on);
  void* arguments[] = {&arrays};
  check(cudaLaunchKernelExC(&launch.config, kernel.function, arguments), plan.why.c_str());
}

// Checks that the plan matches the type of the arrays.
void expect(const Plan& plan, Pass pass, bool half) {
  if (!plan.kernel || plan.kernel->pass != pass || (plan.kernel->config.per_word == 2) != half)
    throw std::invalid_argument("persistent kernels: the plan is not of these arrays");
}

}  // namespace

Plan plan_persistent(const Sizes& sizes) { return plans().find(sizes); }

void launch_forward(const Plan& plan, Forward<std::uint16_t> arrays, void* workspace,
                    void* stream) {
  expect(plan, Pass::forward, true);
  launch(plan, arrays, workspace, stream);
}

void launch_forward(const Plan& plan, Forward<float> arrays, void* workspace, void* stream) {
  expect(plan, Pass::forward, false);
  launch(plan, arrays, workspace, stream);
}

void launch_backward(const Plan& plan, Backward<std::uint16_t> arrays, void* workspace,
                     void* stream) {
  expect(plan, Pass::backward, true);
  launch(plan, arrays, workspace, stream);
}

void launch_backward(const Plan& plan, Backward<float> arrays, void* workspace, void* stream) {
  expect(plan, Pass::backward, false);
  launch(plan, arrays, workspace, stream);
}

}  // namespace fastrnn::persistent
