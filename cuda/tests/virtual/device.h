// The virtual device as a test sees it. runtime.cpp stands in for CUDA's runtime: the host code
// that nvcc compiled is linked against it, registers its kernels there, and launches them as on a
// GPU.
#pragma once

#include <random>

#include "machine.h"

namespace fastrnn::virtual_device {

struct Device {
  int multiprocessors = 8;
  Order order = Order::in_turn;
  // What is issued runs at once, or when somebody waits for it.
  bool at_once = true;
  std::mt19937 random{1};
  long launches = 0, cluster_launches = 0, cooperative_launches = 0;
};

Device& device();

// Runs all that is queued. Throws std::runtime_error at what a kernel did wrong.
void synchronize();

}  // namespace fastrnn::virtual_device
