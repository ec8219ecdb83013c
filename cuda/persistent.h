// Persistent kernels: a whole sequence of the recurrence in one launch, the weights staying on the
// multiprocessors. plan_persistent() says whether a case fits a device and by which kernel; the
// launches run it on a stream. The layers take them by persistent_layer.h.
//
//   block    one block has all units (128 at most); teams divide the rows
//   cluster  a cluster of up to 16 blocks shares h through distributed shared memory (sm_90)
//   ring     up to all multiprocessors share h through L2, under a cooperative launch
//
// Whatever does not fit, or cannot be launched (a device that is shared, without cooperative
// launches or with too little shared memory), has `kernel` null and the reason in `why`.
//
// Nothing here allocates on the device or waits for it. What is asked of a device is asked once and
// kept, so that a call that a graph captures asks nothing.
//
// Three definitions: launch.cu on a GPU, absent.cpp in builds without these kernels, and
// cuda/tests/host_persistent.cpp on a CPU. Where CUDA fails they throw std::runtime_error.
#pragma once

#include <cstdint>

#include "persistent/backward.h"
#include "persistent/forward.h"
#include "persistent/plan.h"

namespace fastrnn::persistent {

// The kernels of this build, `count` of them.
const Kernel* kernels(int* count);

// The kernel for the current device: chosen by its facts, and all blocks can be resident at once.
Plan plan_persistent(const Sizes& sizes);

// The arrays as forward.h and backward.h describe them; their `team` is ignored.
// std::uint16_t holds bfloat16 and float16. `workspace`: of the plan's size; `stream`: a
// cudaStream_t.
void launch_forward(const Plan& plan, Forward<std::uint16_t> arrays, void* workspace, void* stream);
void launch_forward(const Plan& plan, Forward<float> arrays, void* workspace, void* stream);
void launch_backward(const Plan& plan, Backward<std::uint16_t> arrays, void* workspace,
                     void* stream);
void launch_backward(const Plan& plan, Backward<float> arrays, void* workspace, void* stream);

}  // namespace fastrnn::persistent
