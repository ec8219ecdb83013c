// Information about the CUDA build and the devices. It reads only attributes and creates no
// context.
#include <cuda_runtime_api.h>

#include "cuda_info.h"
#include "library.h"

namespace fastrnn {
namespace {

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  return cudaDeviceGetAttribute(&value, which, device) == cudaSuccess ? value : 0;
}

}  // namespace

CudaInfo cuda_info() {
  CudaInfo info;
  info.build_version = CUDART_VERSION;
  cudaRuntimeGetVersion(&info.runtime_version);
  cudaDriverGetVersion(&info.driver_version);
  info.cublaslt = cuda::library_origin();

  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status != cudaSuccess) {
    cudaGetLastError();  // clears the error, so that a later call does not return it
    info.error = cudaGetErrorString(status);
    return info;
  }
  for (int device = 0; device < count; ++device) {
    cudaDeviceProp properties{};
    if (const cudaError_t failed = cudaGetDeviceProperties(&properties, device);
        failed != cudaSuccess) {
      cudaGetLastError();
      info.error = cudaGetErrorString(failed);
      continue;
    }
    info.devices.push_back({properties.name, attribute(cudaDevAttrComputeCapabilityMajor, device),
                            attribute(cudaDevAttrComputeCapabilityMinor, device),
                            attribute(cudaDevAttrMultiProcessorCount, device),
                            properties.totalGlobalMem});
  }
  return info;
}

}  // namespace fastrnn
