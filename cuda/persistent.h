// Persistent kernels: a whole sequence of the recurrence in one launch, with the weights kept on
// the multiprocessors. plan_persistent() determines whether a case fits a device and selects the
// kernel; the launch functions run it on a stream. The layers use them through persistent_layer.h.
//
//   block    one block has all units (at most 128); teams divide the rows
//   cluster  a cluster of up to 16 blocks exchanges h through distributed shared memory (sm_90)
//   ring     up to all multiprocessors exchange h through L2, in a cooperative launch
//
// If a case does not fit, or cannot be launched (a shared device, a device without cooperative
// launches or with too little shared memory), `kernel` is null and `why` has the reason.
//
// Nothing here allocates on the device or synchronises with it. Device properties are read once and
// kept, so a captured call makes no queries.
//
// There are three implementations: launch.cu on a GPU, absent.cpp in builds without these kernels,
// and cuda/tests/host_persistent.cpp on a CPU. If CUDA fails they throw std::runtime_error.
#pragma once

#include <cstdint>

#include "persistent/backward.h"
#include "persistent/forward.h"
#include "persistent/plan.h"

namespace fastrnn::persistent {

// The kernels of this build, `count` of them.
const Kernel* kernels(int* count);

// The kernel for the current device, chosen by its properties; all blocks can be co-resident.
Plan plan_persistent(const Sizes& sizes);

// The arrays are as described in forward.h and backward.h; their `team` is ignored. std::uint16_t
// holds bfloat16 and float16. `workspace` has the plan's size; `stream` is a cudaStream_t.
void launch_forward(const Plan& plan, Forward<std::uint16_t> arrays, void* workspace, void* stream);
void launch_forward(const Plan& plan, Forward<float> arrays, void* workspace, void* stream);
void launch_backward(const Plan& plan, Backward<std::uint16_t> arrays, void* workspace,
                     void* stream);
void launch_backward(const Plan& plan, Backward<float> arrays, void* workspace, void* stream);

}  // namespace fastrnn::persistent
