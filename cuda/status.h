// Converts errors of CUDA's runtime to exceptions. Only for translation units of the GPU.
#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

namespace fastrnn::cuda {

// Throws std::runtime_error "<where><what>: <why>".
inline void require(cudaError_t status, const char* where, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // clears the error, so that a later call does not return it
  throw std::runtime_error(std::string(where) + what + ": " + cudaGetErrorString(status));
}

}  // namespace fastrnn::cuda
