// Persistent kernels: a whole sequence of the recurrence in one launch, the weights staying on the
// multiprocessors. plan_persistent() says whether a case fits a device and by which kernel; the
// launches run it on a stream. Nothing here allocates or synchronises, so a launch can be captured.
//
//   block    one block has all units (128 at most); teams divide the rows
//   cluster  a cluster of up to 16 blocks shares h through distributed shared memory (sm_90)
//   ring     up to all multiprocessors share h through L2, under a cooperative launch
//
// Whatever does not fit, or cannot be launched (a device that is shared, without cooperative
// launches or with too little shared memory), has `kernel` null and the reason in `why`.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "persistent/backward.h"
#include "persistent/forward.h"
#include "persistent/plan.h"

namespace fastrnn::resident {

// The kernels of this build, `count` of them.
const Kernel* kernels(int* count);

// Asks the current device for its facts, chooses, and checks that all blocks can be resident at
// once.
cudaError_t plan_persistent(const Sizes& sizes, Plan* plan, const Via* only = nullptr);

// The arrays as forward.h and backward.h describe them; their `team` is ignored.
// std::uint16_t holds bfloat16 and float16. Return the first error of CUDA, or cudaSuccess.
cudaError_t launch_forward(const Plan& plan, Forward<std::uint16_t> arrays, void* workspace,
                           cudaStream_t stream);
cudaError_t launch_forward(const Plan& plan, Forward<float> arrays, void* workspace,
                           cudaStream_t stream);
cudaError_t launch_backward(const Plan& plan, Backward<std::uint16_t> arrays, void* workspace,
                            cudaStream_t stream);
cudaError_t launch_backward(const Plan& plan, Backward<float> arrays, void* workspace,
                            cudaStream_t stream);

}  // namespace fastrnn::resident
