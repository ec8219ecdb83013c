// What a CUDA build can say of itself, of the machine it runs on and of the kernels that a case
// takes. Defined in cuda/ and only there: a CPU-only build has no such functions.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "backend.h"

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

// What computes the recurrence of a call, and why.
struct CudaKernels {
  bool persistent = false;  // a launch for a sequence; else one for each step
  std::string why;
};

// Reads sizes and options of the problem, and the presence of arrays. On the problem's device:
// throws std::runtime_error where there is none. Defined in cuda/backend.cu, as is the next.
CudaKernels cuda_kernels(const Problem&, Pass);
// By the data sheet of an H200, on any machine.
CudaKernels cuda_kernels_on_h200(const Problem&, Pass);

}  // namespace fastrnn
