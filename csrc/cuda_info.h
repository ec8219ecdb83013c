// What a CUDA build can say of itself and of the machine it runs on. Defined in cuda/device.cu,
// and only there: a CPU-only build has no such function.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

namespace fastrnn {

struct CudaDevice {
  std::string name;
  int major = 0, minor = 0;  // compute capability
  int multiprocessors = 0;
  std::size_t memory = 0;  // bytes
};

// Versions as CUDA counts them: 1000·major + 10·minor. Zero: none.
struct CudaInfo {
  int build_version = 0;    // the compiler's
  int runtime_version = 0;  // the runtime's inside this library
  int driver_version = 0;   // the newest CUDA the installed driver supports
  std::vector<CudaDevice> devices;
  std::string error;     // why `devices` is empty; empty when nothing went wrong
  std::string cublaslt;  // the library of matrix products in use, or why there is none
};

// Never throws for a missing driver or device: says so in `error`.
CudaInfo cuda_info();

}  // namespace fastrnn
