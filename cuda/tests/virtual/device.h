// The interface of the virtual device for tests. runtime.cpp replaces CUDA's runtime: the host code
// that nvcc compiled is linked with it, registers its kernels, and launches them as on a GPU.
#pragma once

#include <random>

#include "machine.h"

namespace fastrnn::virtual_device {

struct Device {
  int multiprocessors = 8;
  Order order = Order::in_turn;
  // Whether launches run immediately, or at the next synchronisation.
  bool at_once = true;
  std::mt19937 random{1};
  long launches = 0, cluster_launches = 0, cooperative_launches = 0;
};

Device& device();

// Runs all queued launches. Throws std::runtime_error if a kernel makes an error.
void synchronize();

}  // namespace fastrnn::virtual_device
