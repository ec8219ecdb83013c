// A planned launch on the CPU (host_machine.h), and the device properties for its plans.
#pragma once

#include "host_machine.h"
#include "persistent/plan.h"

namespace fastrnn::persistent {

// A small device, so that there are several teams with few blocks.
inline DeviceFacts small_device() {
  DeviceFacts d;
  d.multiprocessors = 8;
  d.shared_bytes = 227 << 10;
  d.compute_major = 9;
  d.cooperative = true;
  d.clusters_of_16 = d.clusters_of_8 = 1;
  d.cache_bytes = 1 << 16;  // short epochs
  return d;
}

inline std::size_t ring_words(const Plan& plan) {
  if (plan.kernel->config.via != Via::ring) return 0;
  const std::int64_t teams = plan.blocks / plan.team.blocks;
  return static_cast<std::size_t>(teams * kEpochs * plan.team.period * message_bytes(plan.team) /
                                  4);
}

// Runs body(machine, arrays) on every thread of the plan's blocks. `ring`: ring_words() words.
template <class Arrays, class Body>
void launch_on_host(const Plan& plan, Arrays arrays, u32* ring, unsigned delays, Body body) {
  std::fill_n(ring, ring_words(plan), kSentinel);
  arrays.team = plan.team;
  arrays.team.ring_words = ring;
  const int teams = plan.blocks / plan.team.blocks;
  run_on_host(plan.blocks, plan.team.blocks, plan.shared_bytes,
              plan.kernel->config.via == Via::ring ? teams : 1, delays,
              [&](HostMachine& machine) { body(machine, arrays); });
}

}  // namespace fastrnn::persistent
