// The persistent kernels as a route of the layers on a CPU: persistent.h by fibers
// (cuda/persistent/tests/host_machine.h), with kernels of small configurations.
#pragma once

namespace fastrnn::persistent {

// Since the program began.
long persistent_launches();

}  // namespace fastrnn::persistent
