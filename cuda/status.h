// What CUDA's runtime answers, as an exception. For units of a GPU alone.
#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

namespace fastrnn::cuda {

// Throws std::runtime_error "<where><what>: <why>".
inline void require(cudaError_t status, const char* where, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // read, so that a later call does not meet it
  throw std::runtime_error(std::string(where) + what + ": " + cudaGetErrorString(status));
}

}  // namespace fastrnn::cuda
