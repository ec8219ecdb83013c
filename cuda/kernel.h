// The form of every kernel: the work of one thread of one block between two barriers.
//
//   struct Kernel {
//     static constexpr const char* name;       // for the error of a launch
//     struct Shared { … };                     // the block's shared memory, plain data
//     struct Registers { … };                  // values that a thread keeps from phase to phase
//     static constexpr int phases;             // of a round, with a barrier between them
//     Index blocks() const;                    // of kThreads threads each; zero: nothing to do
//     Index rounds() const;                    // the same for every thread of the grid
//     template <int phase>
//     void run(Index block, int thread, Index round, Shared&, Registers&) const;
//   };
//
// Within a phase no thread reads what another thread writes; within a launch no block reads what
// another block writes. So the order of threads and blocks has no effect, and the same source runs
// on a CPU, one thread after another, in any order. The kernels are tested in this way without a
// GPU (cuda/tests/).
#pragma once

#include <cstdint>

#include "inline.h"

#if defined(__CUDACC__)
#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>
#endif

namespace fastrnn::cuda {

using Index = std::int64_t;

inline constexpr int kWarp = 32;
inline constexpr int kWarps = 8;
inline constexpr int kThreads = kWarp * kWarps;

FASTRNN_CELL Index ceil_div(Index a, Index b) { return (a + b - 1) / b; }
FASTRNN_CELL Index least(Index a, Index b) { return a < b ? a : b; }
FASTRNN_CELL Index greatest(Index a, Index b) { return a > b ? a : b; }

// Runs a kernel on a stream (a cudaStream_t). Throws std::runtime_error if the launch fails.
template <class Kernel>
void launch(void* stream, const Kernel& kernel);

struct Nothing {};

// The form of a kernel that processes `count()` elements independently:
//   Index count() const;  void element(Index n) const;
template <class Body>
struct Elementwise {
  static constexpr const char* name = Body::name;
  static constexpr int phases = 1;
  using Shared = Nothing;
  using Registers = Nothing;
  Body body;

  Index blocks() const { return ceil_div(body.count(), kThreads); }
  FASTRNN_CELL Index rounds() const { return 1; }
  template <int phase>
  FASTRNN_CELL void run(Index block, int thread, Index, Shared&, Registers&) const {
    const Index n = block * kThreads + thread;
    if (n < body.count()) body.element(n);
  }
};

template <class Body>
void launch_elements(void* stream, const Body& body) {
  launch(stream, Elementwise<Body>{body});
}

#if defined(__CUDACC__)

template <int phase, class Kernel>
__device__ __forceinline__ void run_phases(const Kernel& kernel, Index block, Index round,
                                           typename Kernel::Shared& shared,
                                           typename Kernel::Registers& registers) {
  kernel.template run<phase>(block, static_cast<int>(threadIdx.x), round, shared, registers);
  if constexpr (phase + 1 < Kernel::phases) {
    __syncthreads();
    run_phases<phase + 1>(kernel, block, round, shared, registers);
  }
}

template <class Kernel>
__global__ void __launch_bounds__(kThreads) run_kernel(const __grid_constant__ Kernel kernel) {
  __shared__ typename Kernel::Shared shared;
  typename Kernel::Registers registers;
  const Index rounds = kernel.rounds();
  for (Index round = 0; round < rounds; ++round) {
    if (round > 0) __syncthreads();
    run_phases<0>(kernel, static_cast<Index>(blockIdx.x), round, shared, registers);
  }
}

template <class Kernel>
void launch(void* stream, const Kernel& kernel) {
  const Index blocks = kernel.blocks();
  if (blocks <= 0) return;
  constexpr Index most = 0x7fffffff;
  if (blocks > most)
    throw std::runtime_error("CUDA kernel '" + std::string(Kernel::name) + "': a grid of " +
                             std::to_string(blocks) + " blocks exceeds CUDA's limit of 2^31 - 1");
  run_kernel<<<static_cast<unsigned>(blocks), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      kernel);
  if (const cudaError_t failed = cudaGetLastError(); failed != cudaSuccess)
    throw std::runtime_error("CUDA kernel '" + std::string(Kernel::name) +
                             "' could not be launched: " + cudaGetErrorString(failed));
}

#endif

}  // namespace fastrnn::cuda
