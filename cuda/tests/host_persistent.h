// The persistent kernels for layers on a CPU: persistent.h implemented with fibers
// (cuda/persistent/tests/host_machine.h), and kernels of small configurations.
#pragma once

namespace fastrnn::persistent {

// The number of launches since the start of the program.
long persistent_launches();

}  // namespace fastrnn::persistent
