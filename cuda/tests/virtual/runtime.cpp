// Replaces CUDA's runtime: the functions that the project's host code and nvcc's generated code
// call, with their error checks.
#include <cuda_runtime_api.h>

#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <stdexcept>
#include <utility>
#include <vector>

#include "device.h"

namespace fastrnn::virtual_device {
namespace {

constexpr int kSharedOfBlock = 227 << 10, kSharedWithoutAsking = 48 << 10;

// The parts of a fat binary that are read: uncompressed PTX.
struct FatWrapper {
  std::uint32_t magic, version;
  const unsigned char* data;
  void* unused;
};
struct FatHeader {
  std::uint32_t magic;
  std::uint16_t version, header_bytes;
  std::uint64_t bytes;
};
struct FatEntry {
  std::uint16_t kind, version;
  std::uint32_t header_bytes;
  std::uint64_t bytes;
};
constexpr std::uint16_t kPtx = 1;

struct Binary {
  const unsigned char* data;
  std::unique_ptr<Module> module;  // parsed at its first use

  const Module& ptx() {
    if (module) return *module;
    FatHeader header;
    std::memcpy(&header, data, sizeof(header));
    if (header.magic != 0xba55ed50u) throw std::runtime_error("no fat binary");
    const unsigned char* at = data + header.header_bytes;
    const unsigned char* const end = at + header.bytes;
    while (at < end) {
      FatEntry entry;
      std::memcpy(&entry, at, sizeof(entry));
      if (entry.kind == kPtx) {
        const auto* const text = reinterpret_cast<const char*>(at + entry.header_bytes);
        module = std::make_unique<Module>(std::string_view(text, strnlen(text, entry.bytes)));
        return *module;
      }
      at += entry.header_bytes + entry.bytes;
    }
    throw std::runtime_error("no PTX in the fat binary");
  }
};

// A kernel, identified on the host by the address of its stub.
struct Kernel {
  Binary* binary;
  std::string name;
  int dynamic_shared = kSharedWithoutAsking;
  bool any_cluster = false;

  const Function& function() const { return binary->ptx().function(name); }
};

std::vector<std::unique_ptr<Binary>>& binaries() {
  static std::vector<std::unique_ptr<Binary>> all;
  return all;
}
std::map<const void*, Kernel>& kernels() {
  static std::map<const void*, Kernel> all;
  return all;
}
std::deque<std::function<void()>>& queue() {
  static std::deque<std::function<void()>> one;
  return one;
}

cudaError_t last_error = cudaSuccess;
cudaError_t answer(cudaError_t status) {
  if (status != cudaSuccess) last_error = status;
  return status;
}

void issue(std::function<void()> task) {
  queue().push_back(std::move(task));
  if (device().at_once) synchronize();
}

// The attributes of a launch apart from its grid.
struct Asked {
  int cluster = 1;
  bool cooperative = false;
};
Asked asked(const cudaLaunchConfig_t& config) {
  Asked found;
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config.attrs[i];
    if (attribute.id == cudaLaunchAttributeCooperative)
      found.cooperative = attribute.val.cooperative != 0;
    else if (attribute.id == cudaLaunchAttributeClusterDimension)
      found.cluster = static_cast<int>(attribute.val.clusterDim.x);
    else
      throw std::runtime_error("a launch's attribute is unknown to the virtual device");
  }
  return found;
}

// Blocks of 256 threads per multiprocessor: one, with the maximum number of registers per thread.
int resident_blocks() { return device().multiprocessors; }

cudaError_t launch(const void* function, const cudaLaunchConfig_t& config, void** arguments) {
  const auto found = kernels().find(function);
  if (found == kernels().end()) return cudaErrorInvalidDeviceFunction;
  const Kernel& kernel = found->second;
  const Function& code = kernel.function();
  const Asked wants = asked(config);
  const dim3 grid = config.gridDim, block = config.blockDim;
  if (!grid.x || grid.y != 1 || grid.z != 1 || block.y != 1 || block.z != 1 || block.x > 1024 ||
      !block.x || block.x % kLanes)
    return cudaErrorInvalidConfiguration;
  if (static_cast<int>(config.dynamicSmemBytes) > kernel.dynamic_shared ||
      config.dynamicSmemBytes + code.shared_bytes > kSharedOfBlock)
    return cudaErrorInvalidValue;
  if (wants.cluster < 1 || wants.cluster > (kernel.any_cluster ? 16 : 8) ||
      static_cast<int>(grid.x) % wants.cluster || wants.cluster > resident_blocks())
    return cudaErrorInvalidClusterSize;
  if (wants.cooperative && static_cast<int>(grid.x) > resident_blocks())
    return cudaErrorCooperativeLaunchTooLarge;

  Launch made;
  made.function = &code;
  const auto* const first = static_cast<const unsigned char*>(arguments[0]);
  made.parameters.assign(first, first + code.parameter_bytes);
  made.blocks = static_cast<int>(grid.x);
  made.threads = static_cast<int>(block.x);
  made.cluster = wants.cluster;
  made.cooperative = wants.cooperative;
  made.dynamic_shared = config.dynamicSmemBytes;
  ++device().launches;
  device().cluster_launches += wants.cluster > 1;
  device().cooperative_launches += wants.cooperative;
  issue([made] { run(made, device().order, device().random); });
  return cudaSuccess;
}

int attribute(cudaDeviceAttr which) {
  switch (which) {
    case cudaDevAttrMultiProcessorCount:
      return device().multiprocessors;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      return kSharedOfBlock;
    case cudaDevAttrComputeCapabilityMajor:
      return 9;
    case cudaDevAttrComputeCapabilityMinor:
      return 0;
    case cudaDevAttrCooperativeLaunch:
      return 1;
    case cudaDevAttrL2CacheSize:
      return 1 << 16;  // small, for short epochs of the ring
    default:
      throw std::runtime_error("a device's attribute is unknown to the virtual device");
  }
}

// The launch configuration, between <<<>>> and the call of the stub.
struct Configuration {
  dim3 grid, block;
  std::size_t shared;
  cudaStream_t stream;
};
std::vector<Configuration>& configurations() {
  static std::vector<Configuration> all;
  return all;
}

}  // namespace

Device& device() {
  static Device one;
  return one;
}

void synchronize() {
  while (!queue().empty()) {
    const std::function<void()> run = std::move(queue().front());
    queue().pop_front();
    run();
  }
}

}  // namespace fastrnn::virtual_device

using namespace fastrnn::virtual_device;

// ---- functions for nvcc's generated code --------------------------------------------------------

extern "C" {

void** __cudaRegisterFatBinary(void* wrapper) {
  binaries().push_back(
      std::make_unique<Binary>(Binary{static_cast<const FatWrapper*>(wrapper)->data, nullptr}));
  return reinterpret_cast<void**>(binaries().back().get());
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 0; }
void __cudaRegisterFunction(void** binary, const char* stub, char*, const char* name, int, uint3*,
                            uint3*, dim3*, dim3*, int*) {
  kernels()[stub] = Kernel{reinterpret_cast<Binary*>(binary), name};
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* stub) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(stub));
  return cudaSuccess;
}
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, std::size_t shared,
                                     CUstream_st* stream) {
  configurations().push_back({grid, block, shared, stream});
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, std::size_t* shared, void* stream) {
  const Configuration last = configurations().back();
  configurations().pop_back();
  *grid = last.grid, *block = last.block, *shared = last.shared;
  *static_cast<cudaStream_t*>(stream) = last.stream;
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments,
                               std::size_t shared, cudaStream_t stream) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid, config.blockDim = block;
  config.dynamicSmemBytes = shared, config.stream = stream;
  return answer(launch(kernel, config, arguments));
}

// ---- functions for the project's code -----------------------------------------------------------

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function,
                                void** arguments) {
  return answer(launch(function, *config, arguments));
}
cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }
const char* cudaGetErrorString(cudaError_t status) {
  return status == cudaSuccess ? "no error" : "refused by the virtual device";
}

cudaError_t cudaGetDevice(int* which) { return *which = 0, cudaSuccess; }
cudaError_t cudaSetDevice(int which) {
  return answer(which == 0 ? cudaSuccess : cudaErrorInvalidDevice);
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  *properties = {};
  std::strcpy(properties->name, "virtual device");
  return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaDriverGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  return *value = attribute(which), cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* found, const void* function) {
  const auto at = kernels().find(function);
  if (at == kernels().end()) return answer(cudaErrorInvalidDeviceFunction);
  *found = {};
  found->ptxVersion = found->binaryVersion = 90;
  found->sharedSizeBytes = at->second.function().shared_bytes;
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute which, int value) {
  const auto at = kernels().find(function);
  if (at == kernels().end()) return answer(cudaErrorInvalidDeviceFunction);
  if (which == cudaFuncAttributeMaxDynamicSharedMemorySize) {
    if (value < 0 ||
        static_cast<std::size_t>(value) + at->second.function().shared_bytes > kSharedOfBlock)
      return answer(cudaErrorInvalidValue);
    at->second.dynamic_shared = value;
  } else if (which == cudaFuncAttributeNonPortableClusterSizeAllowed) {
    at->second.any_cluster = value != 0;
  } else {
    return answer(cudaErrorInvalidValue);
  }
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* count, const void*, int,
                                                          std::size_t) {
  return *count = 1, cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveClusters(int* count, const void*,
                                           const cudaLaunchConfig_t* config) {
  return *count = resident_blocks() / asked(*config).cluster, cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* to, int value, std::size_t bytes, cudaStream_t) {
  issue([=] { std::memset(to, value, bytes); });
  return cudaSuccess;
}
}
